"""Batch inference with a real MLflow model over Ray Data: every row once, errors reported, jobs resumed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_models import IMAGE_SHAPE, LABEL_NAMES, expected_probabilities, register_model, save_model
from PIL import Image
from rich.console import Console

from pipeline import predict as command
from pipeline.inference import job
from pipeline.inference.claim import claim
from pipeline.inference.config import PredictOptions
from pipeline.inference.job import predict
from pipeline.registry.fetch import fetch, registered_uris, resolve
from pipeline.storage import Storage

ROOT = Path(__file__).parents[2]
BROKEN = (2, 30, 31)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("model") / "model"
    return folder, save_model(folder)


@pytest.fixture(scope="module")
def registry(model_folder: tuple[Path, list[np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of a registry with that model as version 1 of `tiny`, the champion."""
    tracking_uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    register_model(model_folder[0], tracking_uri, "tiny")
    return tracking_uri


def write_images(folder: Path, count: int, broken: tuple[int, ...]) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, *IMAGE_SHAPE), dtype=np.uint8)
    folder.mkdir()
    for number, image in enumerate(images):
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        content = data.getvalue()
        (folder / f"{number:05d}.png").write_bytes(content[:50] if number in broken else content)
    return images


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_of_images_by_the_registered_model(
    model_folder: tuple[Path, list[np.ndarray]], registry: str, tmp_path: Path
) -> None:
    """Runs a job; a second command on its output does nothing or is refused."""
    _, weights = model_folder
    images, output = write_images(tmp_path / "images", 50, BROKEN), tmp_path / "output"
    options = PredictOptions(
        "models:/tiny@champion",
        str(tmp_path / "images"),
        str(output),
        registry,
        part_rows=16,
        batch_size=7,
        num_actors=1,
    )
    console = silent()
    summary = predict(options, console)
    assert (summary["parts"], summary["rows"], summary["errors"], summary["new_rows"]) == (4, 50, 3, 50)
    assert isinstance(console.file, io.StringIO)
    assert "50 of 50 images" in console.file.getvalue()
    assert "3 cannot be read" in console.file.getvalue()
    table = pq.read_table(output)
    assert table["row_id"].to_pylist() == list(range(50))
    assert table["name"].to_pylist() == [f"{number:05d}.png" for number in range(50)]
    errors = table["error"].to_pylist()
    assert tuple(i for i, error in enumerate(errors) if error) == BROKEN
    for column in ("class_name", "class_index", "probabilities"):
        assert tuple(i for i, value in enumerate(table[column].to_pylist()) if value is None) == BROKEN
    right = [i for i in range(50) if i not in BROKEN]
    expected = expected_probabilities(images, weights)[right]
    np.testing.assert_allclose(np.array([table["probabilities"][i].as_py() for i in right]), expected, atol=1e-5)
    assert [table["class_name"][i].as_py() for i in right] == [LABEL_NAMES[k] for k in expected.argmax(axis=1)]

    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert predict(options, silent())["new_rows"] == 0
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")} == before

    greedy = PredictOptions(**vars(options) | {"output": str(tmp_path / "greedy"), "cpus_per_actor": 99.0})
    with pytest.raises(ValueError, match=r"no node has 99 CPU, the largest has 2 CPUs.*ask for less"):
        predict(greedy, silent())
    other = PredictOptions(**vars(options) | {"batch_size": 8})
    with pytest.raises(ValueError, match=r"results of another settings.*give another folder"):
        predict(other, silent())
    Image.new("RGB", (6, 8)).save(tmp_path / "images" / "00007.png")
    with pytest.raises(ValueError, match="results of another input"):
        predict(options, silent())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        predict(PredictOptions(**vars(options) | {"output": str(tmp_path / "full")}), silent())


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_gives_no_probabilities_of_its_classes_ends_the_job(
    model_folder: tuple[Path, list[np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(model_folder[0], tmp_path / "model")
    described = (tmp_path / "model" / "MLmodel").read_text()
    assert "  - middle\n" in described
    (tmp_path / "model" / "MLmodel").write_text(described.replace("  - middle\n", ""))
    write_images(tmp_path / "images", 3, ())
    paths = [str(tmp_path / name) for name in ("model", "images", "out")]
    monkeypatch.setattr(sys, "argv", ["predict", *paths, "--num-actors", "1"])
    assert command.main() == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "error" in line.lower())
    assert line.startswith(f"error: model = '{paths[0]}': gives float32 (1, 3) for 1 image and 2 label_names: let it")
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_job_whose_output_another_job_takes_is_not_done(
    model_folder: tuple[Path, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", 3, ())
    options = PredictOptions(str(model_folder[0]), str(tmp_path / "images"), str(tmp_path / "output"), num_actors=1)
    classify = job._predictions

    def overtaken(*arguments: Any) -> Iterator[dict[str, Any]]:
        mine = json.loads((tmp_path / "output" / "_job.json").read_text())
        claim(Storage(str(tmp_path / "output")), {**mine, "model": {"uri": "another"}})
        return classify(*arguments)

    monkeypatch.setattr(job, "_predictions", overtaken)
    with pytest.raises(ValueError, match=r"output': another job has begun to write there: give the command again with"):
        predict(options, silent())
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["_job.json"]


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_job_all_of_whose_images_fail_has_failed(
    model_folder: tuple[Path, list[np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_images(tmp_path / "images", 3, (0, 1, 2))
    paths = [str(path) for path in (model_folder[0], tmp_path / "images", tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["predict", *paths, "--num-actors", "1"])
    assert command.run() == 1
    output = capfd.readouterr()
    assert "3 images done, 3 of them could not be read" in output.out
    assert output.err == "error: none of the images could be classified; the column `error` of the results says why\n"


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_images_with_more_pixels_than_are_wanted_have_an_error(
    model_folder: tuple[Path, list[np.ndarray]], tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 3, ())
    pixels = IMAGE_SHAPE[0] * IMAGE_SHAPE[1]
    images, output = str(tmp_path / "images"), str(tmp_path / "few")
    few = PredictOptions(str(model_folder[0]), images, output, num_actors=1, max_pixels=pixels - 1)
    assert predict(few, silent())["errors"] == 3
    errors = pq.read_table(tmp_path / "few" / "part-000000.parquet")["error"].to_pylist()
    assert all(f"has more than the {pixels - 1} pixels" in error for error in errors)
    with pytest.raises(ValueError, match=r"holds results of another settings: .*\"max_pixels\": 47"):
        predict(replace(few, max_pixels=pixels), silent())
    job = json.loads((tmp_path / "few" / "_job.json").read_text())
    assert job["settings"]["max_pixels"] == pixels - 1


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_job_whose_input_changes_while_it_is_read_is_not_done(
    model_folder: tuple[Path, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", 3, ())
    options = PredictOptions(str(model_folder[0]), str(tmp_path / "images"), str(tmp_path / "output"), num_actors=1)
    classify = job._predictions

    def overtaken(*arguments: Any) -> Iterator[dict[str, Any]]:
        (tmp_path / "images" / "later.png").write_bytes(b"another file beside them does not matter")
        os.utime(tmp_path / "images" / "00001.png", (1, 1))
        return classify(*arguments)

    monkeypatch.setattr(job, "_predictions", overtaken)
    with pytest.raises(ValueError, match=r"00001\.png has changed while the files were read: rows may be lost or of"):
        predict(options, silent())
    assert not (tmp_path / "output" / "_done.json").exists()


def test_a_job_that_is_refused_leaves_its_output_as_it_was(
    model_folder: tuple[Path, list[np.ndarray]], tmp_path: Path
) -> None:
    images, output = tmp_path / "a.parquet", tmp_path / "out"
    pq.write_table(pa.table({"image": [[[1, 2], [3, 4]]]}), images)
    with pytest.raises(ValueError, match=rf"{images}: images are list<.*, not uint8 tensors or binary"):
        predict(PredictOptions(str(model_folder[0]), str(images), str(output)), silent())
    assert not output.exists()
    output.touch()
    np.savez(tmp_path / "a.npz", images=np.zeros((1, *IMAGE_SHAPE), np.uint8))
    with pytest.raises(ValueError, match=rf"output = '{output}' cannot be read and written"):
        predict(PredictOptions(str(model_folder[0]), str(tmp_path / "a.npz"), str(output)), silent())


@pytest.mark.parametrize(
    ("uri", "problem"),
    [("file://{}/a%20b", "has %, which"), ("file://localhost{}/a", "give the path, or file:///PATH")],
)
def test_an_output_that_would_go_to_a_place_that_nobody_named_is_refused(
    uri: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 1, ())
    output = uri.format(tmp_path)
    with pytest.raises(ValueError, match=rf"^output = '{output}' .*{problem}"):
        predict(PredictOptions(str(tmp_path / "no-model"), str(tmp_path / "images"), output), silent())
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_uri_of_a_model(model_folder: tuple[Path, list[np.ndarray]], registry: str, tmp_path: Path) -> None:
    folder, tracking_uri = model_folder[0], registry
    for uri in ("models:/tiny@champion", "models:/tiny", "models:/tiny/1"):
        assert resolve(uri, tracking_uri) == "models:/tiny/1"
    assert resolve(str(folder), None) == str(folder)
    assert registered_uris(tracking_uri) == {"models:/tiny/1"}
    model = fetch("models:/tiny", tracking_uri, tmp_path)
    assert (model.uri, model.image_shape, model.label_names) == ("models:/tiny/1", IMAGE_SHAPE, tuple(LABEL_NAMES))
    assert model.uuid == fetch(str(folder), None, tmp_path).uuid
    for uri in ("models:/tiny/2", "models:/tiny@other", "models:/none/1"):
        with pytest.raises(ValueError, match=f"model = '{uri}': it is not in sqlite"):
            resolve(uri, tracking_uri)
    with pytest.raises(ValueError, match="give models:/NAME/VERSION"):
        resolve("tiny", tracking_uri)
    with pytest.raises(ValueError, match="give --tracking-uri"):
        resolve("models:/tiny/1", None)


def test_a_command_with_a_bad_argument_fails_at_once(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipeline.predict",
        str(tmp_path),
        str(tmp_path / "nothing"),
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: input = '{tmp_path / 'nothing'}': no such file or folder"


@pytest.mark.slow
def test_a_killed_job_is_resumed(model_folder: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    """Killed half-way, with ten broken images, a job gives the same bytes as without interruption."""
    folder, _ = model_folder
    broken = tuple(range(5, 3000, 300))
    assert len(broken) == 10
    write_images(tmp_path / "images", 3000, broken)

    def start(output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.predict", str(folder), str(tmp_path / "images"), str(output)]
        return subprocess.Popen([*command, "--part-rows", "20"], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    job = start(killed)
    while len(list(killed.glob("*.parquet"))) < 10:
        assert job.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.parquet")}
    assert 10 <= len(done) < 150
    (killed / "part-000149.parquet.0.tmp").write_text("half of a file, as a killed process leaves it")
    (killed / "notes.tmp").write_text("somebody's")
    again = start(killed)
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0
    assert "3,000 images done, 10 of them could not be read" in said
    assert all((killed / name).stat().st_mtime_ns == time for name, time in done.items()), "done once"
    other = start(whole)
    other.communicate(timeout=600)
    files = sorted(path.name for path in whole.iterdir())
    (killed / "notes.tmp").unlink()  # fails if it was deleted
    assert sorted(path.name for path in killed.iterdir()) == files
    assert all((killed / name).read_bytes() == (whole / name).read_bytes() for name in files)
    table = pq.read_table(killed)
    assert sorted(table["row_id"].to_pylist()) == list(range(3000))
    errors = dict(zip(table["row_id"].to_pylist(), table["error"].to_pylist(), strict=True))
    assert tuple(sorted(row for row, error in errors.items() if error)) == broken
    assert Storage(str(killed)).read_json("_done.json") == {"parts": 150, "rows": 3000, "errors": 10}
