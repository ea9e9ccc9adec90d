"""The output of a run: plain lines in a log, a live line on a terminal."""

import io
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from pipeline.data import image_progress
from pipeline.data.image_progress import ImageCounter
from pipeline.driver import progress
from pipeline.driver.progress import Progress
from pipeline.driver.trial_table import duration
from pipeline.settings.presets import quickstart
from pipeline.tasks.events import CheckpointsDamaged, Said, TrialChanged, Warned
from pipeline.training.worker import EpochEnded, StepProgress, WorkersStarted


def step(epoch: int, number: int) -> StepProgress:
    return StepProgress(epoch, number, steps=20, images_per_second=451.6, loss=2.34567, accuracy=0.4321)


EPOCH = EpochEnded({"epoch": 1, "loss": 2.0, "val_loss": 1.9, "val_accuracy": 0.5, "images_per_second": 450.0})


def plain() -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(quickstart(), Console(file=out, width=progress.PLAIN_WIDTH)), out


def test_a_log_gets_plain_lines_and_none_for_each_step() -> None:
    shown, out = plain()
    with shown:
        shown.started("train")
        shown.reported(step(1, 10))
        shown.reported(Said("ingest", "7 of [9] images"))
        shown.reported(EPOCH)
        shown.done("train", {"seconds": 12.34})
    lines = [re.sub(r"^ +\d+\.\d s  ", "", line).rstrip() for line in out.getvalue().splitlines()]
    assert lines == [
        "train      started",
        "ingest     7 of [9] images",
        "train      epoch 1/30: loss 2.0000, val_loss 1.9000, val_accuracy 0.5000, 450 images/s",
        "train      done in 12.3 s",
    ]


def test_damaged_checkpoints_are_a_warning_on_one_line() -> None:
    shown, out = plain()
    with shown:
        shown.reported(CheckpointsDamaged(("/runs/[1]/000011-000000000-ab",), 10))
    (line,) = out.getvalue().splitlines()
    said = "the checkpoint /runs/[1]/000011-000000000-ab is damaged and removed: the training goes on after epoch 10"
    assert line.endswith(f"train      warning: {said}")


def test_a_terminal_that_hangs_up_is_a_log_from_then_on() -> None:
    out = io.StringIO()
    shown = Progress(quickstart(), Console(file=out, force_terminal=True, width=80))
    with shown:
        shown.reported(step(1, 1))
        shown.hang_up()
        shown.reported(step(1, 2))
        before = len(out.getvalue())
        shown.reported(EPOCH)
        shown.done("train", {"seconds": 12.34})
    after = out.getvalue()[before:]
    assert "\x1b" in out.getvalue()[:before]
    assert "\x1b" not in after
    assert [line.split()[3] for line in after.splitlines()] == ["epoch", "done"]


def test_a_log_gets_a_line_now_and_then_in_a_long_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.05)
    shown, out = plain()
    with shown:
        shown.reported(step(1, 1))
        shown.reported(step(1, 2))
        time.sleep(0.1)
        shown.reported(step(1, 3))
        shown.reported(step(1, 4))
    (line,) = out.getvalue().splitlines()
    assert "epoch 1/30, step 3/20, 452 images/s, loss 2.3457, accuracy 0.4321, 0:" in line


def test_the_images_of_a_task_are_counted_with_their_bytes_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(image_progress, "_SECONDS", 0.1)
    shown, out = plain()
    with shown:
        counter = ImageCounter("ingest", "decoded", 4000, 3072, shown.reported)
        counter.add(500)  # too early for a line
        time.sleep(0.2)
        counter.add(500)
    (line,) = out.getvalue().splitlines()
    found = re.search(
        r"ingest +1,000 of 4,000 images decoded, 3 of 12 MB of pixels, ([\d,]+) images/s, 0:0\d left", line
    )
    assert found is not None, line
    assert 1000 < int(found[1].replace(",", "")) <= 5000


def test_a_terminal_gets_a_live_line_below_the_others() -> None:
    out = io.StringIO()
    shown = Progress(quickstart(), Console(force_terminal=True, file=out, width=120, color_system=None))
    with shown:
        shown.reported(step(2, 10))
        time.sleep(0.05)
        shown.reported(step(2, 11))
        time.sleep(0.3)  # it is drawn several times a second
        shown.reported(EPOCH)
    text = out.getvalue()
    assert re.search(r"train +epoch 2/30, step 11/20, 452 images/s, loss 2\.3457, accuracy 0\.4321, 0:\d\d left", text)
    assert "\x1b[2K" in text, "the live line is drawn anew in its place"
    assert text.index("step 11/20") < text.index("epoch 1/30: loss 2.0000")


def test_the_time_left_follows_from_the_steps_that_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    time_left = progress._TimeLeft(num_epochs=3)
    assert time_left.after(step(1, 10)) is None
    now = 110.0
    # 15 steps in 10 s, and 35 of 3 x 20 are still to come
    assert time_left.after(step(2, 5)) == pytest.approx(35 * 10 / 15)


def trial(number: int, status: str = "running", accuracy: float | None = None, **more: Any) -> TrialChanged:
    return replace(
        TrialChanged(
            trial=f"trial-{number:04d}",
            values={"num_latents": 8 * number, "learning_rate": 1e-3},
            gflops=0.0123,
            status=status,
            epochs=2,
            best_value=accuracy,
            error=None,
            seconds_left=75.0,
            metrics=None,
        ),
        **more,
    )


TRIALS = [
    trial(1, epochs=0, seconds_left=None),
    trial(1, accuracy=0.25, metrics={"epoch": 2, "loss": 2.5, "val_loss": 2.25, "val_accuracy": 0.25}),
    trial(2),
    trial(1, "stopped early", 0.25),
    trial(2, "failed", error="NotFinite: the loss [nan]"),
]


def test_a_log_gets_a_line_for_what_happens_to_a_trial() -> None:
    shown, out = plain()
    with shown:
        for event in TRIALS:
            shown.reported(event)
    assert [re.sub(r"^ +\d+\.\d s  ", "", line).rstrip() for line in out.getvalue().splitlines()] == [
        "search     trial 1/4 started: num_latents=8 learning_rate=1.00e-03, 0.0123 GFLOPs an image",
        "search     trial 1/4 epoch 2/6: loss 2.5000, val_loss 2.2500, val_accuracy 0.2500",
        "search     trial 2/4 started: num_latents=16 learning_rate=1.00e-03, 0.0123 GFLOPs an image",
        "search     trial 1/4 stopped early after epoch 2/6, best val_accuracy 0.2500; 1:15 left",
        "search     trial 2/4 failed in epoch 3: NotFinite: the loss [nan]; 1:15 left",
    ]


def test_a_terminal_gets_a_table_of_the_trials() -> None:
    out = io.StringIO()
    shown = Progress(quickstart(), Console(force_terminal=True, file=out, width=140, color_system=None))
    with shown:
        for event in TRIALS:
            shown.reported(event)
        time.sleep(0.3)  # it is drawn several times a second
    text = out.getvalue()
    assert "search: 2 of 4 trials ended, 1:15 left" in text
    assert re.search(r"0001 +num_latents=8 learning_rate=1.00e-03 +0.0123 +stopped early +2/6 +0.2500", text)
    assert "trial 1/4 epoch 2/6" not in text, "the table has it"
    assert "trial 2/4 failed in epoch 3: NotFinite: the loss [nan]" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (4000, "1:06:40")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_task_that_does_not_begin_says_for_what_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.05)
    shown, out = plain()
    with shown:
        for task in ("ingest", "search", "train"):
            shown.started(task)
        time.sleep(0.3)
        shown.reported(WorkersStarted(("a:1", "b:2"), "TensorFlow's port is open"))
        time.sleep(0.3)
    text = out.getvalue()
    assert "train      has waited 0 s for 2 workers with 1 CPU each to start" in text
    assert "search     has waited 0 s for the first trial to start, which takes 1 CPU" in text
    assert "train      has waited 0 s for the workers at a:1, b:2 to find each other and to take their first" in text
    assert text.count("has waited") == 3
    assert "train      warning: TensorFlow's port is open" in text


def test_a_warning_that_comes_again_is_shown_once() -> None:
    shown, out = plain()
    with shown:
        for _ in range(2):  # of two trials, and of workers that were started again
            shown.reported(Warned("search", "slow [on] this"))
            shown.reported(WorkersStarted(("a:1",), precision="slow [on] this"))
    assert out.getvalue().count("search     warning: slow [on] this") == 1
    assert out.getvalue().count("train      warning: slow [on] this") == 1


def test_a_task_that_has_begun_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.2)
    shown, out = plain()
    with shown:
        shown.started("train")
        shown.reported(WorkersStarted(("a:1", "b:2")))
        shown.reported(step(1, 1))
        shown.started("search")
        shown.done("search", {"seconds": 0.1})
        time.sleep(0.4)
    assert "has waited" not in out.getvalue()
