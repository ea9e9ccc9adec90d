"""Trains one trial of the search, by the same code that trains the final model."""

import functools
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from perceiver.config import PerceiverConfig
from pipeline.data.rows import Rows
from pipeline.storage import Storage
from pipeline.tasks.events import Warned
from pipeline.training.checkpoint_store import STATE_FILE, CheckpointStore
from pipeline.training.config import TrainingConfig
from pipeline.training.worker import EpochEnded, Worker, WorkersStarted
from pipeline.workers.environment import choose_kernels
from pipeline.workers.in_process import train_in_process
from pipeline.workflow.channel import Channel
from tune.space import Sample, to_model, training_values
from tune.trial_process import Report, TrialStopped

if TYPE_CHECKING:
    from pipeline.training.kept_models import KeptModels

POLL_SECONDS = 0.2
# A trial that is cut off loses at most this much of its training, and an epoch.
COMMIT_SECONDS = 5.0


@dataclass(frozen=True)
class TrialTraining:
    """Trains samples of the search space: in this process, or on workers of their own.

    Attributes:
        model: Model settings that a sample changes, with the pixel statistics of the data.
        train: Training settings that a sample changes; epochs, workers and CPUs are those of a trial.
        manifest: Output of `preprocess`.
        data: Training and validation rows, for trials in this process.
        storage: Where the shards are and the checkpoints go.
        state: Storage prefix of the checkpoints.
        channel: Gets warnings, as `Warned`.
    """

    model: PerceiverConfig
    train: TrainingConfig
    manifest: dict[str, Any]
    data: "ray.ObjectRef[list[Rows]]"
    storage: Storage
    state: str
    channel: Channel

    def __call__(self, sample: Sample, *, trial: str, report: Report) -> None:
        model, train = to_model(sample, self.model), replace(self.train, **training_values(sample))
        state = f"{self.state}/{trial}"
        store = CheckpointStore(self.storage, f"{state}/checkpoints", kept=train.checkpoints_kept)
        try:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = Path(folder) / "checkpoint"
                found = store.restore_newest(checkpoint, lambda damage: self._warn(f"{trial}: {damage.warning}"))
                resume_from = checkpoint if found else None
                if resume_from:
                    for metrics in json.loads((checkpoint / STATE_FILE).read_text())["history"]:
                        report(metrics, again=True)
                if train.max_workers == 1:
                    self._in_process(model, train, store, resume_from, report)
                else:
                    self._on_workers(model, train, state, report)
        except TrialStopped:
            self.storage.delete(state)
            raise
        self.storage.delete(state)

    def _in_process(
        self,
        model: PerceiverConfig,
        train: TrainingConfig,
        store: CheckpointStore,
        resume_from: Path | None,
        report: Report,
    ) -> None:
        choose_kernels(model, train.use_gpu)  # before the import of TensorFlow
        kept = _kept_models()
        kept.free_memory()
        committed = time.monotonic()

        def commit_and_report(metrics: dict[str, Any], folder: Path | None) -> None:
            nonlocal committed
            if folder is not None and time.monotonic() - committed > COMMIT_SECONDS:
                store.commit(folder, metrics["epoch"], 0, metrics["val_loss"])
                committed = time.monotonic()
            report(metrics)

        rows, held_out = ray.get(self.data)
        worker = Worker(report=commit_and_report, resume_from=resume_from, keep_model=False)
        counts = self.manifest["splits"]["train"]["class_counts"]
        train_in_process(model, train, rows, held_out, worker, counts, kept, self._warn)

    def _warn(self, text: str) -> None:
        self.channel.report(Warned("search", text))

    def _on_workers(self, model: PerceiverConfig, train: TrainingConfig, state: str, report: Report) -> None:
        """Ray Train in a thread, since this one waits for what is decided about the trial after each epoch."""
        from pipeline.workers.train import train as train_on_workers

        channel = Channel()
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(
                train_on_workers, model, train, self.manifest, self.storage, state=state, channel=channel
            )
            reported, ended = 0, False
            try:
                while not ended:
                    time.sleep(POLL_SECONDS)
                    ended = training.done()  # before the look, so that nothing comes after the last one
                    for event in channel.take():
                        if isinstance(event, EpochEnded):
                            report(event.metrics)
                            reported = int(event.metrics["epoch"])
                        elif isinstance(event, WorkersStarted):
                            for warning in filter(None, (event.open_ports, event.precision)):
                                self._warn(warning)
            except TrialStopped:
                channel.request_stop()  # the workers leave, and with them what they hold of the cluster
                wait([training])
                raise
            # The events of the others were lost, with the process of the channel.
            for metrics in training.result()["history"][reported:]:
                report(metrics)


@functools.cache
def _kept_models() -> "KeptModels":
    """The models that this process keeps from trial to trial."""
    from pipeline.training.kept_models import KeptModels

    return KeptModels()
