"""The plan that a dry run prints, and the summary of a run that is done."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from processor_time import run_timed
from rich.console import Console

from perceiver import cost
from pipeline.driver.summary import mlflow_command, show_summary, summarize
from pipeline.settings.command_line import parse
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import Run
from pipeline.workflow.task import Manifest

ROOT = Path(__file__).parents[2]


def plan(folder: Path, *options: str) -> tuple[str, float]:
    """The output of a dry run, and the seconds of processor time that it took."""
    command = ("pipeline/run.py", "quickstart", "--storage", folder / "runs", "--dry-run", *options)
    result, seconds = run_timed(*command, RAY_TMPDIR=str(folder / "ray"))
    result.check_returncode()
    return result.stdout, seconds


def states(text: str) -> dict[str, str]:
    """State of each task in a plan."""
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if line.startswith("│")]
    return {row[1]: row[3] for row in rows if len(row) > 4}


def test_a_dry_run_says_all_and_starts_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "[red]"  # rich would take this for markup
    folder.mkdir()
    text, seconds = plan(folder, "--train.num-workers=1", "--train.cpus-per-worker=1.5")
    config = parse(["quickstart", "--storage", str(folder / "runs"), "--train.num-workers", "1"])[1].config
    for task, key in Run(TASKS, config, Storage(config.storage)).keys.items():
        assert any(task in line and key in line for line in text.splitlines())
    assert states(text) == {task.name: "to do" for task in TASKS}
    assert "1 workers, 1.5 CPU each" in text
    assert "4 trials, 1 CPU each" in text
    assert f"{cost.parameter_count(config.model):,} parameters" in text
    assert f"about {2 * cost.macs_per_image(config.model) / 1e9:.3f} GFLOPs an image" in text
    assert "30 epochs, 38,820 images" in text  # 1,294 rows an epoch: 1,797 less a fifth, less a tenth
    kept = cost.activation_bytes_per_image(config.model) * 64 / 2**20
    assert f"activations of a step about {kept:,.0f} MiB, shared by the worker" in text
    assert str(folder / "runs") in text
    assert "train.early_stopping_patience" in text
    assert list(folder.iterdir()) == [], "a dry run writes nothing, and Ray has left no session"
    assert seconds < 3


def test_a_dry_run_knows_what_would_be_run(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "runs"))
    config = parse(["quickstart"])[1].config
    keys = Run(TASKS, config, Storage(config.storage)).keys
    for task in ("ingest", "preprocess", "search"):
        storage.write_json(
            f"tasks/{task}/{keys[task]}/manifest.json",
            {"task": task, "attempt": "attempt-1", "inputs": {}, "output": {}},
        )
    names = [task.name for task in TASKS]
    expected = dict.fromkeys(names[: names.index("train") + 1], "to do")
    expected |= dict.fromkeys(("ingest", "preprocess", "search"), "done")
    text, _ = plan(tmp_path, "--until", "train")
    assert states(text) == expected | dict.fromkeys(names[names.index("train") + 1 :], "left out")
    text, _ = plan(tmp_path, "--until", "train", "--force", "preprocess")
    assert states(text)["ingest"] == "done"
    assert states(text)["preprocess"] == states(text)["search"] == "to do"
    text, _ = plan(tmp_path, "--train.learning-rate", "0.1")
    assert states(text) == {"ingest": "done"} | {"preprocess": "done"} | {t.name: "to do" for t in TASKS[2:]}


@pytest.fixture
def manifests() -> dict[str, Manifest]:
    """Manifests with the fields that a summary uses."""
    trial = {"num_latents": 8, "learning_rate": 0.001}
    outputs: dict[str, dict[str, Any]] = {
        "ingest": {},
        "preprocess": {"digest": "d" * 64},
        "search": {"best": trial, "trials": [{}, {}]},
        "train": {"images_per_second": 100.0, "epochs": 3, "best_epoch": 2, "num_workers": 2, "history": []},
        "evaluate": {"top1": 0.5, "top5": 0.75, "balanced_accuracy": 0.4, "loss": 1.5, "num_examples": 360},
        "register": {"name": "m", "version": 3, "alias": "champion", "uri": "models:/m/3", "run_id": "r"},
        "report": {"report": {"path": "tasks/report/k/attempt/report.html", "sha256": "s" * 64}},
    }
    names = [task.name for task in TASKS]
    return {name: {"seconds": 1.5, "key": name * 3, "output": outputs.get(name, {})} for name in names}


def test_the_keys_of_the_summary(manifests: dict[str, Manifest]) -> None:
    config = parse(["quickstart", "--storage", "/runs"])[1].config
    summary = json.loads(json.dumps(summarize("quickstart", config, manifests, {"ingest"}, "r")))
    assert summary["preset"] == "quickstart"
    assert list(summary["tasks"]) == [task.name for task in TASKS]
    assert summary["tasks"]["ingest"] == {"state": "cached", "seconds": 1.5, "key": "ingest" * 3}
    assert summary["tasks"]["train"]["state"] == "done"
    test = {"top1": 0.5, "top5": 0.75, "balanced_accuracy": 0.4, "loss": 1.5, "num_examples": 360}
    assert summary["test"] == test
    assert summary["model"] == {"name": "m", "version": 3, "alias": "champion", "uri": "models:/m/3"}
    runs = {"tracking_uri": "sqlite:////runs/mlflow.db", "experiment": "perceiver", "run_id": "r", "unsent": None}
    assert summary["mlflow"] == runs
    assert summary["search"] == {"num_trials": 2, "best": {"num_latents": 8, "learning_rate": 0.001}}
    assert summary["dataset"] == {"digest": "d" * 64}
    assert summary["report"] == "/runs/report.html"
    assert summary["train"].keys() >= {"images_per_second", "epochs", "num_workers", "parameters"}
    # The parameters of the model that the search chose, not of the preset.
    other = parse(["quickstart", "--model.num-latents", "8"])[1].config.model
    assert summary["train"]["parameters"] == cost.parameter_count(other)


def test_what_an_earlier_command_decided_is_not_shown_as_decided_now(manifests: dict[str, Manifest]) -> None:
    given = ["quickstart", "--tracking.experiment", "another", "--promotion.max-latency-ms", "1"]
    config = parse(given)[1].config
    before = asdict(parse(["quickstart"])[1].config.promotion)
    manifests["register"]["output"] |= {"experiment": "first", "promotion": before}
    summary = summarize("quickstart", config, manifests, {"register"}, "r")
    assert summary["mlflow"]["experiment"] == "first"
    assert summary["model"]["decided_with"] == {"max_latency_ms": 250.0}
    console = Console(file=io.StringIO(), width=200)
    show_summary(summary, console)
    assert isinstance(console.file, io.StringIO)
    assert "promotion.max_latency_ms = 250; what is given now counts for the next version" in console.file.getvalue()


def test_the_summary_of_an_evaluation_of_an_earlier_version(manifests: dict[str, Manifest]) -> None:
    del manifests["evaluate"]["output"]["balanced_accuracy"]
    summary = summarize("quickstart", parse(["quickstart"])[1].config, manifests, set())
    assert summary["test"] == {"top1": 0.5, "top5": 0.75, "loss": 1.5, "num_examples": 360}
    show_summary(summary, Console(file=io.StringIO()))


def test_the_summary_of_a_part(manifests: dict[str, Manifest]) -> None:
    config = parse(["quickstart"])[1].config
    part = {name: manifests[name] for name in ("ingest", "preprocess")}
    summary = summarize("quickstart", config, part, set())
    assert summary.keys() == {"preset", "tasks", "mlflow", "dataset"}
    show_summary(summary, Console(file=io.StringIO()))


def test_a_model_name_that_looks_like_markup_is_shown_as_it_is(manifests: dict[str, Manifest]) -> None:
    manifests["register"]["output"] |= {"name": "m[v2]", "uri": "models:/m[v2]/3"}
    console = Console(file=io.StringIO(), width=200)
    show_summary(summarize("quickstart", parse(["quickstart"])[1].config, manifests, set()), console)
    assert isinstance(console.file, io.StringIO)
    assert "models:/m[v2]/3 (m[v2]@champion)" in console.file.getvalue()


def test_the_table_says_what_a_person_wants_to_know(manifests: dict[str, Manifest]) -> None:
    config = parse(["quickstart", "--storage", "/my [red] runs"])[1].config
    console = Console(file=io.StringIO(), width=200)
    show_summary(summarize("quickstart", config, manifests, {"ingest"}, "r"), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for fragment in ("done before", "done in 1.5 s", "50.00% of 360 images", "75.00%", "40.00%", "rate = 0.001"):
        assert fragment in text
    for fragment in ("100 images/s on 2 workers, 3 epochs", "models:/m/3 (m@champion)", "experiment perceiver, run r"):
        assert fragment in text
    assert "mlflow ui --backend-store-uri 'sqlite:////my [red] runs/mlflow.db'" in text
    assert mlflow_command("http://host:5000") == "open http://host:5000"
