"""The model of scaling where the answer is known, against the record of its measurements, and that these run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scaling
from scaling_model import (
    Network,
    Remedies,
    Step,
    at_speed,
    calibrated,
    efficiency,
    ring_seconds,
    step_seconds,
)

ROOT = Path(__file__).parents[1]
FAST = Network(bytes_per_second=1.25e9, turn_seconds=1e-4, host_seconds_per_byte=1e-10)


def test_a_ring_sends_twice_all_but_an_nth_of_the_vector() -> None:
    network = Network(1e6, turn_seconds=0.0, host_seconds_per_byte=0.0)
    assert ring_seconds(4e6, 1, network) == 0
    for workers in (2, 3, 8):
        assert ring_seconds(4e6, workers, network) == pytest.approx(2 * (workers - 1) / workers * 4)
    slow = Network(1e12, turn_seconds=0.5, host_seconds_per_byte=0.0)
    assert ring_seconds(4, 8, slow) == pytest.approx(14 * 0.5)


def test_a_calibrated_network_gives_back_what_it_was_made_of() -> None:
    times = {size: ring_seconds(size, 2, FAST) for size in (1e6, 8e6, 24e6)}
    found = calibrated(times, 2, FAST.bytes_per_second)
    assert found.turn_seconds == pytest.approx(FAST.turn_seconds)
    assert found.host_seconds_per_byte == pytest.approx(FAST.host_seconds_per_byte)
    assert at_speed(found, 1e6).bytes_per_second == 1e6


def test_remedies_gain_what_they_can_and_no_more() -> None:
    step = Step(compute_seconds=0.03, gradient_bytes=60e6)
    plain = step_seconds(step, 8, FAST)
    assert plain == pytest.approx(0.03 + ring_seconds(60e6, 8, FAST))
    overlapped = step_seconds(step, 8, FAST, Remedies(buckets=3))
    assert plain - 0.03 * 2 / 3 < overlapped < plain, "more than the backward pass cannot be hidden"
    assert step_seconds(step, 8, FAST, Remedies(bytes_factor=0.5)) < plain
    assert step_seconds(step, 8, FAST, Remedies(accumulated=4)) == pytest.approx(0.03 + (plain - 0.03) / 4)
    assert efficiency(step, 1, FAST) == 1
    cheap = Step(compute_seconds=10.0, gradient_bytes=6e6)
    hidden = step_seconds(cheap, 8, FAST, Remedies(buckets=3)) - 10
    assert hidden == pytest.approx(ring_seconds(2e6, 8, FAST)), "all but the last bucket is hidden"


def test_the_record_agrees_with_the_model_within_15_percent() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/scaling.py")], capture_output=True, text=True, check=True, timeout=600
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert {(row["speed"], row["bytes"]) for row in result["comparison"]} == {
        (speed, size) for speed in scaling.SPEEDS for size in scaling.PREDICTED
    }
    for row in result["comparison"]:
        assert abs(row["error"]) < 0.15, row
    assert {(row["gigabits"], row["workers"]) for row in result["predictions"]} == {
        (gigabits, workers) for gigabits in (10, 25, 100) for workers in (8, 64, 512)
    }


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_sums_and_steps_are_measured_on_two_hosts(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--measure", "--gain", "--speeds", "1 Gb/s"]
    subprocess.run([*command, "--turns", "3", "--record", str(record)], check=True, timeout=600)
    sums, gain = (json.loads(line) for line in record.read_text().splitlines())
    assert 0.8e8 < sums["goodput"] < 1.25e8, "the link is not limited"
    assert min(sums["seconds"]["40000000"]) > 40e6 / 1.25e8
    assert set(gain["seconds"]) == {"float32", "bfloat16"}
