"""Trains a model as one worker: `fit`, the same function for a trial, for one worker and for many.

It does not depend on Ray. A `Worker` says how it reports, from which checkpoint it continues and how it is stopped.
"""

import contextlib
import math
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import keras
import tensorflow as tf

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline import multiworker
from pipeline.data.rows import Rows, RowSource
from pipeline.data.streamed_rows import StreamedRows
from pipeline.devices import communication_options, multiply_on_gpu
from pipeline.training import checkpoint
from pipeline.training.batches import steps_per_epoch
from pipeline.training.checkpoint import TrainingState
from pipeline.training.config import TrainingConfig
from pipeline.training.input_pipeline import training_dataset, validation_dataset
from pipeline.training.kept_models import Compiled, KeptModels
from pipeline.training.macs import macs_of
from pipeline.training.models import build_model
from pipeline.training.optimization import (
    PLATEAU_FACTOR,
    Accuracy,
    Rates,
    SmoothedCrossEntropy,
    TopKAccuracy,
    balanced_weights,
    optimizer,
)
from pipeline.training.own_model import OwnModel
from pipeline.training.parts import compute_in_parts, num_parts
from pipeline.training.recorder import EarlyStopping, Recorder, ReduceLROnPlateau
from pipeline.training.throughput import StepClock, StepReporter, matmul_peak
from pipeline.training.worker import InitialModelError, Worker

MODEL_FILE = "model.keras"
_OTHER_BYTES = 1 << 20
"""Of variables in a `.keras` file that belong to no weight, such as counters."""


def fit(
    model_config: PerceiverConfig | OwnModel,
    config: TrainingConfig,
    train: RowSource,
    validation: Rows | StreamedRows,
    worker: Worker,
    class_counts: Sequence[int] | None = None,
    kept: KeptModels | None = None,
) -> None:
    """Trains to the end and passes the results to `worker.report`. If the checkpoint is final, it reports nothing.

    The report of an epoch has its metrics and a checkpoint. The metrics are `epoch`, `loss`, `accuracy`,
    `top5_accuracy`, the same three with `val_`, `learning_rate`, `seconds`, `checkpoint_seconds`, `num_workers`,
    `num_gpus`, `images_per_second` and those of `StepClock.metrics`. `config.checkpoint_every_steps` adds checkpoints
    within an epoch. The last checkpoint also holds `model.keras`, the model with the weights of the epoch that had the
    lowest validation loss.

    Args:
        model_config: Model settings, or a model of one's own, with the pixel statistics of the data.
        config: Training settings.
        train: All training rows; this worker takes its share of every global batch.
        validation: All validation rows; this worker takes its share of every batch.
        worker: Rank, reports, and the checkpoint from which the training continues.
        class_counts: Number of training rows of each class; needed by `config.class_weights` alone.
        kept: Models of earlier trainings in this process, of which one is used again; for a single worker.

    Raises:
        Interrupted: after a stop was requested and a checkpoint was reported.
        NotFinite: if the loss is NaN or infinite; names epoch and step.
        InitialModelError: if the initial weights are those of another model.
        OwnModelError: if a model of one's own cannot be built, or does not give logits of all classes.
        CheckpointError: if a checkpoint could not be written; names the path.
        GpuError: if the GPU that `config` asks for does not compute.
        ValueError: if the checkpoint is of a training with other settings or another order of rows.
    """
    keras.config.set_dtype_policy(config.precision)
    strategy = _strategy(config, worker)
    # After the strategy, which must come before all of TensorFlow's operations.
    stop = kept.stop if kept else multiworker.StopSignal()
    if config.use_gpu:
        multiply_on_gpu("train.use_gpu")
    worker.on_stop(stop.request)
    steps = steps_per_epoch(len(train), config.global_batch_size)

    def build() -> Compiled:
        keras.utils.set_random_seed(config.seed)
        return _compiled(model_config, config, worker, class_counts, steps, strategy, stop, adjustable=kept is not None)

    if kept is None:
        lent: contextlib.AbstractContextManager[Compiled] = contextlib.nullcontext(build())
    else:
        assert isinstance(model_config, PerceiverConfig), "models of one's own are not searched"
        lent = kept.lend(model_config, config, class_counts, steps, build)
    with lent as compiled:
        _train(compiled, model_config, config, train, validation, worker, strategy, stop, steps)


def _compiled(
    model_config: PerceiverConfig | OwnModel,
    config: TrainingConfig,
    worker: Worker,
    class_counts: Sequence[int] | None,
    steps: int,
    strategy: tf.distribute.Strategy,
    stop: multiworker.StopSignal,
    adjustable: bool,
) -> Compiled:
    rates, parts = Rates(config) if adjustable else None, num_parts(model_config, config)
    with strategy.scope():
        model = build_model(model_config)
        if parts > 1:
            compute_in_parts(model, parts)
        model.compile(
            optimizer=optimizer(config, model, steps, rates),
            loss=SmoothedCrossEntropy(config.label_smoothing, _class_weights(config, class_counts)),
            metrics=[Accuracy(name="accuracy"), TopKAccuracy(5, name="top5_accuracy")],
            jit_compile=config.jit_compile,
        )
        macs = macs_of(model_config, model)
    peak = matmul_peak(keras.config.dtype_policy().compute_dtype, products=parts)
    clock = StepClock(config.global_batch_size, macs, peak, worker.num_workers)
    # TensorFlow refuses to look at the clock in a step that has to be deterministic.
    note = None if config.deterministic else clock.note
    multiworker.enable(
        model,
        stop,
        note,
        gradient_dtype=config.gradient_dtype,
        batch_norm="synchronize" if isinstance(model_config, OwnModel) else None,
    )
    return Compiled(model, rates, clock)


def _train(
    compiled: Compiled,
    model_config: PerceiverConfig | OwnModel,
    config: TrainingConfig,
    train: RowSource,
    validation: Rows | StreamedRows,
    worker: Worker,
    strategy: tf.distribute.Strategy,
    stop: multiworker.StopSignal,
    steps: int,
) -> None:
    model, clock = compiled.model, compiled.clock
    with strategy.scope():
        if worker.initial_model and not worker.resume_from:
            assert isinstance(model_config, PerceiverConfig), "initial weights are those of a Perceiver"
            _set_initial_weights(model, model_config, worker.initial_model, config)
        order = [config.seed, config.global_batch_size, len(train)]
        progress = checkpoint.load(worker.resume_from, model) if worker.resume_from else TrainingState(order=order)
    if progress.order != order:
        raise ValueError(
            f"the checkpoint is of a training with seed, global batch size and rows {progress.order}, this one has "
            f"{order}: epoch {progress.epoch}, step {progress.step} is another place there; train from the start"
        )
    checkpoint.check_settings(progress, model_config, config)
    progress.settings = checkpoint.settings_of(model_config, config)
    if progress.finished:
        return
    stopping: list[keras.callbacks.Callback] = [
        EarlyStopping(monitor="val_loss", patience=config.early_stopping_patience)
    ]
    if config.learning_rate_schedule == "plateau":
        stopping.append(ReduceLROnPlateau(monitor="val_loss", factor=PLATEAU_FACTOR, patience=config.plateau_patience))
    recorder = Recorder(config, worker, stop, progress, stopping, clock, steps)
    callbacks = [*stopping, clock, *([] if worker.rank else [StepReporter(clock, worker.on_step, steps)]), recorder]
    evaluated = validation_dataset(
        validation, config.global_batch_size, rank=worker.rank, num_workers=worker.num_workers
    )
    validation_data = multiworker.distribute(evaluated, strategy)
    while not recorder.progress.finished:
        # An epoch that was cut off in the middle has fewer steps left than the others, so it needs a `fit` of its own.
        steps_left = steps - progress.step
        until = config.epochs if progress.step == 0 else progress.epoch + 1
        batches = training_dataset(
            train,
            config,
            model_config.num_classes,
            rank=worker.rank,
            num_workers=worker.num_workers,
            epoch=progress.epoch,
            step=progress.step,
        )
        model.fit(
            multiworker.distribute(batches, strategy),
            initial_epoch=progress.epoch,
            epochs=until,
            steps_per_epoch=steps_left,
            validation_data=validation_data,
            validation_steps=math.ceil(len(validation) / config.global_batch_size),
            callbacks=callbacks,
            shuffle=False,  # the batches are in the epoch's order
            verbose=0,
        )
    if worker.rank:
        worker.report(progress.history[-1], None)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), model, progress)
        if worker.keep_model:
            final = build_model(model_config)
            final.set_weights(progress.best_weights)
            final.save(Path(folder) / MODEL_FILE)
        worker.report(progress.history[-1], Path(folder))


def _class_weights(config: TrainingConfig, class_counts: Sequence[int] | None) -> list[float] | None:
    if config.class_weights == "none":
        return None
    assert class_counts is not None, "balanced weights need the counts of the classes"
    return balanced_weights(class_counts)


def _set_initial_weights(model: Perceiver, model_config: PerceiverConfig, file: Path, config: TrainingConfig) -> None:
    # The weights alone: to load the model would build whatever the file describes, of any size.
    initial = Perceiver(**asdict(model_config))
    initial.build((None, *model_config.image_shape))
    try:
        # Four bytes a weight, and as many for up to three variables that an optimizer keeps for each.
        _check_size(file, 16 * initial.count_params() + _OTHER_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras warns of weights that it does not find
            initial.load_weights(file)
    except Exception as error:  # h5py raises what it likes for a damaged file
        raise InitialModelError(
            f"train.initial_model = {config.initial_model} is another model than the one to be trained, which has "
            f"{initial.count_params():,} parameters, or damaged: give the model settings with which it was trained"
        ) from error
    model.set_weights(initial.get_weights())


def _check_size(file: Path, most: int) -> None:
    """Refuses a `.keras` file whose variables, which may be compressed, have more than so many bytes."""
    sizes: list[int] = []

    def add(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            sizes.append(item.nbytes)

    with zipfile.ZipFile(file) as archive, archive.open("model.weights.h5") as stream, h5py.File(stream) as weights:
        weights.visititems(add)
    if sum(sizes) > most:
        raise ValueError(f"the variables have {sum(sizes):,} bytes, more than {most:,}")


def _strategy(config: TrainingConfig, worker: Worker) -> tf.distribute.Strategy:
    if worker.num_workers == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=communication_options(config.use_gpu))
