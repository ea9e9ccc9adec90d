"""Training without Ray: two processes give the same as one, and an interrupted training as one that was not."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fit_worker
import keras
import numpy as np
import pytest
from tiny_training import MODEL, TRAIN

import perceiver.model  # noqa: F401  registers its classes with Keras
from pipeline.training import recorder
from pipeline.training.recorder import Recorder
from pipeline.training.worker import NotFinite

pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
SGD: dict[str, Any] = {}
ADAMW = {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.05, "learning_rate_schedule": "cosine"}
EXECUTION = {
    "seconds",
    "checkpoint_seconds",
    "num_workers",
    "num_gpus",
    "images_per_second",
    "step_ms",
    "mfu",
    "data_wait_ms",
    "data_wait_share",
    "all_reduce_ms",
    "all_reduce_share",
}

Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Trains in `num_workers` processes; returns the folder with the checkpoints, `out` if that is given.

    A single worker trains in this process, which has imported TensorFlow already, unless it is to be deterministic,
    which TensorFlow cannot switch off again, or to be killed.
    """

    def run(
        num_workers: int,
        train: dict[str, Any],
        model: dict[str, Any] | None = None,
        out: Path | None = None,
        **orders: Any,
    ) -> Path:
        out = out or tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        out.mkdir(exist_ok=True)
        addresses = [f"127.0.0.1:{port}" for port in free_ports(num_workers)]
        workers = []
        for rank in range(num_workers):
            order = {"rank": rank, "addresses": addresses, "out": str(out), **orders}
            order |= {"model": MODEL | (model or {}), "train": TRAIN | train | {"num_workers": num_workers}}
            if num_workers == 1 and not train.get("deterministic") and "kill_rank" not in orders:
                fit_worker.main(order)
                return out
            command = [sys.executable, str(Path(__file__).with_name("fit_worker.py")), json.dumps(order)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            workers.append(subprocess.Popen(command, text=True, **pipes))  # type: ignore[call-overload]
        outputs = [worker.communicate(timeout=600)[0] for worker in workers]
        if "kill_rank" in orders:
            assert workers[orders["kill_rank"]].returncode == -signal.SIGKILL, "\n".join(outputs)
            assert all(worker.returncode for worker in workers), "a worker went on without the killed one"
        else:
            assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)
        return out

    yield run
    keras.config.set_dtype_policy("float32")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.iterdir())


def state(out: Path) -> dict[str, Any]:
    return json.loads((checkpoints(out)[-1] / "state.json").read_text())


def history(out: Path) -> list[dict[str, float]]:
    epochs = state(out)["history"]
    return [{name: value for name, value in epoch.items() if name not in EXECUTION} for epoch in epochs]


def weights(out: Path) -> dict[str, np.ndarray]:
    model = keras.saving.load_model(checkpoints(out)[-1] / "model.keras", compile=False)
    # Without the name of the model, in which Keras counts the models of a process.
    return {variable.path.partition("/")[2]: variable.numpy() for variable in model.trainable_variables}


def assert_same_training(one: Path, other: Path, tolerance: float, without: str | None = None) -> None:
    for left, right in zip(history(one), history(other), strict=True):
        assert left == pytest.approx(right, abs=tolerance)
    others = weights(other)
    for path, value in weights(one).items():
        if without is None or not path.endswith(without):
            np.testing.assert_allclose(value, others[path], atol=tolerance, rtol=0, err_msg=path)


@pytest.mark.slow  # the next test compares with AdamW, and perceiver_with_momentum in tests/multiworker with momentum
def test_two_workers_train_as_one_does_with_momentum(run: Run) -> None:
    one, two = run(1, SGD), run(2, SGD)
    assert_same_training(one, two, 1e-5)
    assert history(one)[-1]["loss"] < history(one)[0]["loss"] - 0.1


@pytest.mark.long
def test_two_workers_train_as_one_does_with_adamw(run: Run) -> None:
    # A key's bias shifts all logits of a query alike, so its true gradient is zero. Adam divides the rounding error by
    # its own size.
    mixed = ADAMW | {"cutmix": 0.5}
    one, two = run(1, mixed), run(2, mixed | {"cpus_per_worker": 2})  # in parts of 12 and 13 rows
    assert_same_training(one, two, 1e-5, without="key/bias")


@pytest.mark.slow
def test_two_workers_train_a_model_of_ones_own_as_one_does_with_the_moments_of_all_rows(run: Run) -> None:
    own = {"own_model": {"channels": 6}}
    one, two = run(1, SGD, **own), run(2, SGD, **own)
    assert_same_training(one, two, 1e-4)
    assert history(one)[-1]["loss"] < history(one)[0]["loss"] - 0.1
    killed = run(1, {"checkpoint_every_steps": 7}, **own, kill_rank=0, kill_at=[1, 10])
    assert (state(killed)["epoch"], state(killed)["step"]) == (1, 7)
    assert_same_training(one, run(1, {"checkpoint_every_steps": 7}, **own, out=killed), 1e-4)


@pytest.mark.long
def test_two_workers_train_as_one_does_with_weights_of_the_classes(run: Run) -> None:
    weighted = {"class_weights": "balanced", "cutmix": 0.5, "label_smoothing": 0.1}
    counts = {"class_counts": [910, *[10] * 9]}  # those of other rows, so that the weights differ: 0.11 and 10
    one, two = run(1, weighted, **counts), run(2, weighted, **counts)
    assert_same_training(one, two, 1e-4)
    assert history(one)[0]["loss"] > 2 * history(run(1, weighted | {"class_weights": "none", "epochs": 1}))[0]["loss"]


@pytest.mark.long
def test_streamed_rows_train_alike_on_one_and_two_workers_and_after_a_kill(run: Run) -> None:
    mixed = {"cutmix": 0.5, "checkpoint_every_steps": 7}
    one, two, in_memory = run(1, mixed, streams=True), run(2, mixed, streams=True), run(1, mixed)
    assert_same_training(one, two, 1e-5)
    killed = run(1, mixed, streams=True, kill_rank=0, kill_at=[1, 10])
    assert (state(killed)["epoch"], state(killed)["step"]) == (1, 7)
    assert_same_training(one, run(2, mixed, streams=True, out=killed), 1e-5)
    # In another order than in memory.
    assert history(one)[0]["loss"] != pytest.approx(history(in_memory)[0]["loss"], abs=1e-6)
    for trained in (one, in_memory):
        assert history(trained)[-1]["loss"] < history(trained)[0]["loss"] - 0.01


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_that_was_stopped_and_killed_within_an_epoch_ends_as_one_that_was_not(
    run: Run, num_workers: int
) -> None:
    settings = {"early_stopping_patience": 2, "learning_rate_schedule": "plateau", "plateau_patience": 1}
    settings |= {"deterministic": True}
    dropout = {"dropout": 0.1, "seed": 3}
    straight = run(num_workers, settings, dropout)
    # The worker that does not write the checkpoint requests the stop after the first epoch. All stop one step later.
    cut = run(num_workers, settings, dropout, stop_rank=num_workers - 1, stop_after=1)
    assert (state(cut)["epoch"], state(cut)["step"]) == (1, 1)
    # Then a worker is killed after a checkpoint within the last epoch.
    every_7 = settings | {"checkpoint_every_steps": 7}
    run(num_workers, every_7, dropout, out=cut, kill_rank=num_workers - 1, kill_at=[2, 10])
    assert (state(cut)["epoch"], state(cut)["step"]) == (2, 7)
    run(num_workers, every_7, dropout, out=cut)
    assert_same_training(straight, cut, 1e-6)


def test_the_seconds_of_an_epoch_have_those_before_it_was_cut_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a training is computed from them. Here each of the 20 steps of an epoch takes a second."""
    now, after_step = 0.0, Recorder.on_train_batch_end

    def slow(recorder: Recorder, batch: int, logs: dict[str, Any] | None = None) -> None:
        nonlocal now
        now += 1
        after_step(recorder, batch, logs)

    monkeypatch.setattr(Recorder, "on_train_batch_end", slow)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: now))
    every_7 = {"epochs": 2, "checkpoint_every_steps": 7}
    out = run(1, every_7, stop_rank=0, stop_after=1)
    assert (state(out)["step"], state(out)["seconds"]) == (8, 8)
    run(1, every_7, out=out, stop_rank=0, stop_after=1)
    assert (state(out)["step"], state(out)["seconds"]) == (15, 15)
    run(1, every_7, out=out)
    assert [epoch["seconds"] for epoch in state(out)["history"]] == [20, 20]
    assert state(out)["seconds"] == 0
    # The rate stays that of the steps which the last process timed.
    assert all(epoch["images_per_second"] == pytest.approx(50e3 / epoch["step_ms"]) for epoch in state(out)["history"])


@pytest.mark.slow
def test_six_epochs_are_three_and_three_and_what_is_left_of_a_kill_in_the_fourth(run: Run) -> None:
    settings, dropout = (
        ADAMW | {"epochs": 6, "label_smoothing": 0.1, "cutmix": 0.5, "deterministic": True},
        {"dropout": 0.1, "seed": 3},
    )
    straight = run(2, settings, dropout)
    resumed = run(2, settings, dropout, stop_rank=1, stop_after=3)
    run(2, settings, dropout, out=resumed)
    assert_same_training(straight, resumed, 1e-6)
    killed = run(2, settings, dropout, kill_rank=0, kill_at=[3, 10])
    assert (state(killed)["epoch"], state(killed)["step"]) == (3, 0)
    run(2, settings, dropout, out=killed)
    assert_same_training(straight, killed, 1e-6)


def test_a_checkpoint_of_another_order_of_rows_is_refused(run: Run) -> None:
    out = run(1, {"epochs": 1})
    with pytest.raises(ValueError, match=r"rows \[0, 50, 1000\], this one has \[1, 50, 1000\]"):
        run(1, {"seed": 1}, out=out)


def test_a_finished_training_is_not_trained_on(run: Run) -> None:
    first = run(1, {"epochs": 1})
    before = checkpoints(first)
    run(1, {"epochs": 1}, out=first)
    assert checkpoints(first) == before


SLOW_PRECISIONS = [  # two workers with loss scaling are also in tests/multiworker
    pytest.param(num_workers, precision, marks=pytest.mark.slow)
    for num_workers, precision in ((1, "mixed_bfloat16"), (2, "mixed_float16"), (2, "mixed_bfloat16"))
]


@pytest.mark.parametrize(("num_workers", "precision"), [(1, "mixed_float16"), *SLOW_PRECISIONS])
def test_workers_train_in_mixed_precision(run: Run, num_workers: int, precision: str) -> None:
    half = history(run(num_workers, ADAMW | {"precision": precision}))
    assert half[-1]["loss"] < half[0]["loss"]
    assert half[-1]["val_loss"] < half[0]["val_loss"]


@pytest.mark.slow
def test_gradients_in_bfloat16_train_as_those_in_float32(run: Run) -> None:
    compressed = run(2, SGD | {"gradient_dtype": "bfloat16"})
    found, expected = history(compressed), history(run(1, SGD))
    for epoch, other in zip(found, expected, strict=True):
        for name in ("loss", "val_loss"):
            assert epoch[name] == pytest.approx(other[name], rel=0.01)
    assert found[-1]["loss"] != pytest.approx(expected[-1]["loss"], rel=1e-6), "nothing was rounded"
    assert found[-1]["loss"] < 0.96 * found[0]["loss"]


def test_the_final_model_has_the_weights_of_the_best_epoch(run: Run) -> None:
    # The learning rate rises until the validation loss does: it is 2.3 in the third epoch and 25 in the end.
    rising = {"learning_rate_schedule": "cosine", "warmup_epochs": 5.9, "epochs": 6}
    out = run(1, ADAMW | rising | {"learning_rate": 1.0})
    losses = [epoch["val_loss"] for epoch in history(out)]
    best = int(np.argmin(losses))
    assert best < len(losses) - 1, f"the last epoch is the best one, the test shows nothing: {losses}"
    with np.load(checkpoints(out)[best] / "arrays.npz") as arrays:
        kept = [arrays[f"best_{i}"] for i in range(len(weights(out)))]
    for value, (path, found) in zip(kept, weights(out).items(), strict=True):
        np.testing.assert_array_equal(value, found, err_msg=path)


@pytest.mark.parametrize(
    ("xla", "remedy"), [(False, ""), (True, r", or compute without XLA \(--train.no-jit-compile\)")]
)
def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_step(run: Run, xla: bool, remedy: str) -> None:
    message = rf"training loss is nan at epoch 1, step \d: lower train.learning_rate = 100\.0{remedy}$"
    with pytest.raises(NotFinite, match=message):
        run(1, {"learning_rate": 100.0, "jit_compile": xla})
