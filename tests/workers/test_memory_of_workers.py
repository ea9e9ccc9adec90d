"""A worker of several whose memory does not suffice ends the training with one message, and no further try."""

from pathlib import Path
from typing import Any

import memory_loops
import pytest
from test_survival import Run, manifest, storage  # noqa: F401  its fixtures

from pipeline.storage import Storage
from pipeline.workers import train as training
from pipeline.workers.in_process import TrainingError


@pytest.mark.slow  # two workers start twice
@pytest.mark.usefixtures("ray_cluster")
def test_exhausted_memory_of_one_of_two_workers_ends_the_training(
    storage: Storage,  # noqa: F811
    manifest: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    starts = tmp_path / "starts"

    def loop(settings: dict[str, Any]) -> dict[str, Any]:
        return memory_loops.exhausted_loop(settings | {"starts": str(starts)})

    monkeypatch.setattr(training, "train_loop_per_worker", loop)
    run = Run(storage, manifest, "exhausted", max_failures=3)
    run.start()
    with pytest.raises(
        TrainingError, match=r"^the memory of .* does not suffice: OOM when .*: take more workers than 2"
    ):
        run.result(280)
    assert starts.read_text().count("started") == 2, "the workers are started once more, and find the reason"
    # The file of one attempt does not end the next one, which may have more memory.
    monkeypatch.undo()
    again = Run(storage, manifest, "exhausted", max_failures=0, epochs=2, warmup_epochs=1)
    again.start()
    assert again.result(200)["epochs"] == 2
