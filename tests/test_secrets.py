"""A password on the command line is in nothing that a run or a command leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from postgresql_server import postgresql
from pyarrow.fs import FileSelector, FileType
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server

from pipeline.storage import Storage

ROOT = Path(__file__).parents[1]
PASSWORD = "hunter2hunter2"


def pipeline(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables, timeout=600, check=False
    )


def files_with(text: str, *folders: Path) -> list[Path]:
    """Files below `folders` whose name or content has `text`."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_socket()]
    return [path for path in files if text in str(path) or text.encode() in path.read_bytes()]


@pytest.mark.slow  # a database and a whole run
def test_the_password_of_a_database_is_in_no_output_of_a_run(tmp_path: Path, ray_folder: Path) -> None:
    def in_checkout() -> list[Path]:
        return sorted((ROOT / "mlruns").rglob("*"))  # where MLflow puts artifacts unless it is told otherwise

    before = in_checkout()
    with postgresql(PASSWORD) as uri:
        storage, summary = tmp_path / "runs", tmp_path / "summary.json"
        command = ["pipeline/run.py", "quickstart", "--storage", str(storage), "--tracking.uri", uri]
        command += ["--search.num-trials", "0", "--train.epochs", "1", "--train.warmup-epochs", "0"]
        command += ["--summary-json", str(summary)]
        # The second command finds the registered version by what the first one has recorded of the login.
        for state in ("done", "cached"):
            result = pipeline(*command, RAY_TMPDIR=str(ray_folder))
            assert result.returncode == 0, result.stderr
            assert {task["state"] for task in json.loads(summary.read_text())["tasks"].values()} == {state}
            assert PASSWORD not in result.stdout + result.stderr
        assert "***@127.0.0.1" in result.stdout
        assert files_with(PASSWORD, tmp_path, ray_folder) == []
        client = MlflowClient(uri, uri)
        experiment = client.get_experiment_by_name("perceiver")
        assert experiment is not None
        # The artifacts lie below the storage and not where the command was given.
        assert experiment.artifact_location == f"{storage}/mlartifacts"
        assert list((storage / "mlartifacts").rglob("report.html"))
        assert in_checkout() == before
        runs = client.search_runs([experiment.experiment_id])
        recorded = [run.to_dictionary() for run in runs]
        recorded += [dict(version) for version in client.search_model_versions()]
        assert len(runs) == 8, "one of the run and one of each task"
        assert PASSWORD not in str(recorded)
        assert "postgresql+psycopg2://***@127.0.0.1" in str(recorded)


@pytest.mark.slow  # a store and a whole run with a search
def test_the_keys_of_a_store_are_in_no_output_of_a_run(tmp_path: Path, ray_folder: Path) -> None:
    with S3Server(tmp_path / "store") as server:
        out, summary = tmp_path / "out", tmp_path / "out" / "summary.json"
        out.mkdir()
        uri = server.uri.replace("s3://", f"s3://{ACCESS_KEY}:{SECRET_KEY}@").replace("?", "/some?")
        command = ["pipeline/run.py", "quickstart", "--storage", uri, "--tracking.uri", f"sqlite:///{out}/mlflow.db"]
        command += ["--search.num-trials", "2", "--search.epochs", "1", "--search.grace-epochs", "1"]
        command += ["--train.epochs", "1", "--train.warmup-epochs", "0", "--summary-json", str(summary)]
        result = pipeline(*command, RAY_TMPDIR=str(ray_folder))
        assert result.returncode == 0, result.stderr
        assert SECRET_KEY not in result.stdout + result.stderr
        assert "s3://***@runs/some" in result.stdout
        assert files_with(SECRET_KEY, out, ray_folder) == []
        storage = Storage(uri)
        objects = storage.filesystem.get_file_info(FileSelector(storage.root, recursive=True))
        paths = [info.path for info in objects if info.type == FileType.File]
        assert len(paths) > 20
        for path in paths:
            with storage.filesystem.open_input_file(path) as file:
                assert SECRET_KEY.encode() not in file.read(), path


@pytest.mark.parametrize(
    "arguments",
    [
        ("pipeline/run.py", "quickstart", "--dry-run", "--tracking.uri", f"https://u:{PASSWORD}@h"),
        ("pipeline/run.py", "quickstart", "--tracking.uri", f"http://u:{PASSWORD}@127.0.0.1:9"),
        ("pipeline/run.py", "quickstart", "--tracking.uri", f"mysql:{PASSWORD}@h"),
        ("pipeline/run.py", "quickstart", "--storage", f"nope://u:{PASSWORD}@bucket", "--tracking.uri", "http://h"),
        ("-m", "pipeline.clean", f"nope://u:{PASSWORD}@bucket"),
        ("-m", "pipeline.predict", "models:/m/1", f"nope://u:{PASSWORD}@bucket/images", "out"),
    ],
    ids=lambda arguments: " ".join(arguments).replace(PASSWORD, ""),
)
def test_no_message_has_the_password(arguments: tuple[str, ...], tmp_path: Path) -> None:
    storage = [] if arguments[0] == "-m" or "--storage" in arguments else ["--storage", str(tmp_path)]
    result = pipeline(*arguments, *storage)
    assert result.returncode == (0 if "--dry-run" in arguments else 2)
    assert "***" in result.stdout + result.stderr
    assert PASSWORD not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
