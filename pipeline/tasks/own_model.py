"""The tasks of a training of a Keras model of one's own: those of the pipeline as far as the evaluation."""

import tempfile
from dataclasses import dataclass, replace
from typing import Any

from pipeline.fields import keyed
from pipeline.settings.config import PipelineConfig
from pipeline.tasks.graph import TASKS
from pipeline.tasks.steps import Context, evaluate_model, fetch_model, train_model
from pipeline.training.own_model import OwnModel
from pipeline.workflow.task import Task


def own_model_tasks(model: OwnModel) -> tuple[Task[PipelineConfig], ...]:
    """The data's tasks as for a Perceiver, so that their outputs are shared; then `train` and `evaluate` of `model`.

    Raises:
        ValueError: as `OwnModel.key`.
    """
    by_name, steps, key = {task.name: task for task in TASKS}, _Steps(model), model.key()
    return (
        by_name["ingest"],
        by_name["preprocess"],
        replace(
            by_name["train"],
            inputs=("preprocess",),
            section=lambda config: {"own_model": key, "train": keyed(config.train)},
            run=steps.train,
        ),
        replace(by_name["evaluate"], run=steps.evaluate),
    )


@dataclass(frozen=True)
class _Steps:
    """What the tasks do.

    Attributes:
        model: The model, without the data's shape and statistics.
    """

    model: OwnModel

    def train(self, context: Context) -> dict[str, Any]:
        return train_model(context, self.model.for_data(context.inputs["preprocess"]), context.config.train)

    def evaluate(self, context: Context) -> dict[str, Any]:
        import keras

        from pipeline.training.macs import count_macs
        from pipeline.training.models import build_model

        own, policy = self.model.for_data(context.inputs["preprocess"]), keras.config.dtype_policy()
        keras.config.set_dtype_policy(context.config.train.precision)
        try:
            # Built and given its weights: to load it, Keras would have to know the classes of its layers.
            model = build_model(own)
            with tempfile.TemporaryDirectory() as folder:
                model.load_weights(fetch_model(context, folder))
            size = {"parameters": model.count_params(), "macs_per_image": count_macs(model, own.image_shape)}
            return evaluate_model(context, model) | size
        finally:
            keras.config.set_dtype_policy(policy)  # Ray uses the process again
