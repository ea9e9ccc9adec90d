"""The tasks of a training of a Keras model of one's own: those of the pipeline as far as the evaluation."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.fields import keyed
from pipeline.settings.config import PipelineConfig
from pipeline.tasks.graph import TASKS
from pipeline.tasks.steps import Context, evaluate_model, fetch_model, train_model
from pipeline.training.own_model import OwnModel
from pipeline.workflow.task import Task


def own_model_tasks(model: OwnModel, call_id: str = "") -> tuple[Task[PipelineConfig], ...]:
    """The data's tasks as for a Perceiver, so that their outputs are shared; then `train` and `evaluate` of `model`.

    Args:
        model: The model.
        call_id: Id of this call, of `new_process.new_call_id`.

    Raises:
        ValueError: as `OwnModel.key` and `sealed`.
    """
    key = model.key()
    by_name, steps = {task.name: task for task in TASKS}, _Steps(sealed(model, key), call_id)
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


def sealed(model: OwnModel, key: Mapping[str, Any]) -> OwnModel:
    """`model` for Ray's workers; its builder is imported and compared with `key` in those that build it.

    Raises:
        ValueError: if the builder cannot be sent.
    """
    from ray import cloudpickle

    try:
        return model.sealed(cloudpickle.dumps(model.builder), key)
    except Exception as error:  # whatever the objects raise that the function uses
        raise ValueError(
            f"the builder {model.name} uses something that cannot be sent to Ray's workers ({error}): make it within "
            "the function, or put the function into a module of its own"
        ) from error


@dataclass(frozen=True)
class _Steps:
    """What the tasks do.

    Attributes:
        model: The model, sealed, without the data's shape and statistics.
        call_id: Id of the call, for processes that import the model; those that train are always new.
    """

    model: OwnModel
    call_id: str

    def train(self, context: Context) -> dict[str, Any]:
        return train_model(context, self.model.for_data(context.inputs["preprocess"]), context.config.train)

    def evaluate(self, context: Context) -> dict[str, Any]:
        from pipeline.tasks.new_process import call_in_new_process

        return call_in_new_process(self.call_id, _evaluate, self.model.for_data(context.inputs["preprocess"]), context)


def _evaluate(own: OwnModel, context: Context) -> dict[str, Any]:
    import keras

    from pipeline.training.macs import count_macs
    from pipeline.training.models import build_model

    keras.config.set_dtype_policy(context.config.train.precision)  # nothing else is computed in this process
    # Built and given its weights: to load it, Keras would have to know the classes of its layers.
    model = build_model(own)
    with tempfile.TemporaryDirectory() as folder:
        model.load_weights(fetch_model(context, folder))
    size = {"parameters": model.count_params(), "macs_per_image": count_macs(model, own.image_shape)}
    return evaluate_model(context, model) | size
