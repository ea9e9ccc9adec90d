"""The features of Keras in two processes give the same as in one: losses, metrics, weights and predictions.

The quick cases of tests/multiworker_cases.py share one start of the processes. The features and their cases:

| feature | case |
|---|---|
| `fit`, `evaluate` and `predict` of arrays, `validation_data`, LearningRateScheduler | arrays |
| an uneven last batch, of which a worker gets no row | arrays, and most others |
| a `tf.data.Dataset` of global batches | global_dataset |
| workers with shards of unequal length; `predict` of them | shards_of_unequal_length |
| EarlyStopping with restore_best_weights, ReduceLROnPlateau | early_stopping_and_plateau |
| TerminateOnNaN, where one worker has the NaN | terminate_on_nan |
| `steps_per_execution`, class weights | steps_per_execution_and_class_weight |
| gradient accumulation, clipping by norms | gradient_accumulation_and_clipping |
| SwapEMAWeights | exponential_moving_average |
| several inputs and outputs, losses by name, sample weights | inputs_outputs_and_sample_weight |
| BatchNormalization(synchronized=True) | batch_normalization |
| LossScaleOptimizer, where one worker's gradient is infinite | loss_scaling |
| XLA; with mixed precision and dropout | xla, xla_in_mixed_precision |
| a custom `train_step` | train_step_of_ones_own |
| sparse gradients, several optimizers | sparse_gradients_and_several_optimizers |
| a stop that all workers see after the same step | stop_signal |
| settings that are refused | refusals |
| dropout: masks differ between workers and not between runs | dropout_masks; of a Perceiver: perceiver_dropout |
| a Perceiver with momentum, AdamW and LAMB | perceiver_sgd, perceiver_adamw, perceiver_lamb |

The cases of the last two rows are slow, except dropout_masks and perceiver_sgd. They also run in four processes.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

Results = list[dict[str, np.ndarray]]
"""For each rank the results of all cases, by `case/name`."""

CASES = Path(__file__).with_name("multiworker_cases.py")
PERCEIVERS = ["perceiver_sgd", "perceiver_adamw", "perceiver_lamb"]
EQUAL_TO_ONE_PROCESS = [
    "arrays",
    "global_dataset",
    "shards_of_unequal_length",
    "early_stopping_and_plateau",
    "terminate_on_nan",
    "steps_per_execution_and_class_weight",
    "gradient_accumulation_and_clipping",
    "exponential_moving_average",
    "inputs_outputs_and_sample_weight",
    "batch_normalization",
    "loss_scaling",
    "xla",
    "train_step_of_ones_own",
    "sparse_gradients_and_several_optimizers",
    "stop_signal",
    "perceiver_sgd",
]
QUICK = [*EQUAL_TO_ONE_PROCESS, "xla_in_mixed_precision", "refusals", "dropout_masks"]
SLOW = ["perceiver_adamw", "perceiver_lamb", "perceiver_dropout"]


def run_processes(out: Path, num_workers: int, cases: list[str]) -> Results:
    """Runs the cases in `num_workers` processes."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_workers)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    processes = []
    for rank in range(num_workers):
        orders = json.dumps({"rank": rank, "addresses": addresses, "out": str(out), "cases": cases})
        with (out / f"{rank}.log").open("w") as log:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            processes.append(
                subprocess.Popen([sys.executable, str(CASES), orders], stdout=log, stderr=log, env=environment)
            )
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(num_workers))
    return [dict(np.load(out / f"{rank}.npz")) for rank in range(num_workers)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_processes(tmp_path_factory.mktemp("one"), 1, QUICK)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_processes(tmp_path_factory.mktemp("two"), 2, QUICK)


def of(results: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    found = {name.removeprefix(f"{case}/"): value for name, value in results.items() if name.startswith(f"{case}/")}
    assert found, f"no results of {case}"
    return found


def assert_equal(results: Results, reference: dict[str, np.ndarray], case: str, tolerance: float) -> None:
    expected = of(reference, case)
    for result in results:
        found = of(result, case)
        assert sorted(found) == sorted(expected)
        for name, value in found.items():
            # A key's bias shifts all logits of a query alike, so its true gradient is zero. These optimizers divide the
            # rounding error by its own size.
            if case in ("perceiver_adamw", "perceiver_lamb") and name.endswith("key/bias"):
                continue
            np.testing.assert_allclose(value, expected[name], atol=tolerance, rtol=0, err_msg=f"{case}: {name}")


@pytest.mark.parametrize("case", EQUAL_TO_ONE_PROCESS)
def test_two_processes_do_as_one(one: Results, two: Results, case: str) -> None:
    assert_equal(two, one[0], case, 1e-5)


def assert_learns(results: dict[str, np.ndarray], case: str) -> None:
    losses = of(results, case)["loss"]
    assert losses[-1] < losses[0] - 0.03


def test_the_perceiver_learns_in_these_cases(one: Results) -> None:
    assert_learns(one[0], "perceiver_sgd")


def test_every_case_runs() -> None:
    sources = "".join(file.read_text() for file in CASES.parent.glob("multiworker_*_cases.py"))
    assert sorted(re.findall(r"^@case\ndef (\w+)", sources, re.MULTILINE)) == sorted([*QUICK, *SLOW])


def test_callbacks_have_acted_in_the_cases_that_are_to_show_it(one: Results) -> None:
    stopped = of(one[0], "early_stopping_and_plateau")
    assert stopped["epochs"] == 3
    np.testing.assert_allclose(stopped["learning_rate"], [0.1, 0.1, 0.05], rtol=1e-6)
    assert of(one[0], "terminate_on_nan")["steps"].tolist() == [0, 1, 2]
    scaled = of(one[0], "loss_scaling")
    # 14 steps, of which one in each epoch is skipped.
    assert scaled["updates"] == 12
    assert of(one[0], "stop_signal")["seen"].tolist() == [False, False, True]


def test_xla_runs_in_mixed_precision_with_loss_scaling_and_dropout(one: Results, two: Results) -> None:
    for results in two:
        found = of(results, "xla_in_mixed_precision")
        assert found["loss"][-1] < found["loss"][0] - 0.1
        assert found["scale"] == 2**15
        assert found["drawn"] == of(one[0], "xla_in_mixed_precision")["drawn"] == 3 * 7


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("batch_normalization", "norm would normalise.*synchronized=True"),
        ("xla_batch_normalization", "communicates within the forward pass.*jit_compile=False"),
        ("xla_train_step", "OwnTrainStep has a train_step of its own.*compute_loss"),
        ("reduction", "reduction='sum'.*sum_over_batch_size"),
        ("seeds", "shuffle the rows differently.*set_random_seed"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(two: Results, what: str, message: str) -> None:
    for results in two:
        assert re.search(message, str(of(results, "refusals")[what]))


def test_dropout_differs_between_workers_and_not_between_runs(two: Results) -> None:
    masks = [of(results, "dropout_masks")["mask"] for results in two]
    assert not np.array_equal(masks[0], masks[1])
    assert all(0.2 < np.mean(mask > 0) < 0.8 for mask in masks)
    assert_repeated(two, "dropout_masks")


def assert_repeated(results: Results, case: str) -> None:
    """Asserts that both runs gave the same bits."""
    for result in results:
        found = of(result, case)
        runs = [{n.removeprefix(run): v for n, v in found.items() if n.startswith(run)} for run in ("first", "second")]
        assert runs[0]
        assert runs[0].keys() == runs[1].keys()
        for name, value in runs[0].items():
            np.testing.assert_array_equal(value, runs[1][name], err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_and_four_processes_do_as_one_with_a_perceiver(tmp_path: Path) -> None:
    cases = ["arrays", "batch_normalization", *PERCEIVERS, "perceiver_dropout", "dropout_masks"]
    results = {}
    for num_workers in (1, 2, 4):
        out = tmp_path / str(num_workers)
        out.mkdir()
        results[num_workers] = run_processes(out, num_workers, cases)
    one = results[1][0]
    for case in PERCEIVERS:
        assert_learns(one, case)
    for num_workers in (2, 4):
        for case in cases[:-2]:
            assert_equal(results[num_workers], one, case, 1e-5)
        assert_repeated(results[num_workers], "perceiver_dropout")
        masks = {of(result, "dropout_masks")["mask"].tobytes() for result in results[num_workers]}
        assert len(masks) == num_workers
