"""`--data.source files` on the command line: what is found decides the model, and mistakes end with one message."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_lines import config_of, refusal, run
from PIL import Image

from pipeline.data import file_tree
from pipeline.data.sources import source_of
from pipeline.fields import keyed
from pipeline.settings.config import PipelineConfig, trained_configs
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import Run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 60 images of 8 x 8 in colour."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(60):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def files(path: Path, *options: str) -> list[str]:
    return ["quickstart", "--data.source", "files", "--data.path", str(path), "--storage", str(path.parent), *options]


def keys(config: PipelineConfig) -> dict[str, str]:
    return Run(TASKS, config, Storage(config.storage)).keys


def test_what_is_found_decides_the_model(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(*files(images))
    assert (config.model.image_shape, config.model.num_classes) == ((8, 8, 3), 2)
    assert config.training_rows == round(120 * 0.8 * 0.9)
    assert config_of(*files(images, "--data.image_size=16", "--data.channels", "1")).model.image_shape == (16, 16, 1)
    relative = files(images)
    monkeypatch.chdir(images.parent)
    relative[4] = "images"
    assert config_of(*relative) == config
    monkeypatch.setenv("HOME", str(images.parent))
    relative[4] = "~/images"
    assert config_of(*relative) == config


def test_mirroring_is_for_the_user_to_choose(images: Path) -> None:
    recipe = ["cifar100", *files(images)[1:], "--train.global-batch-size", "32"]
    # The preset's global batch of 128 does not fit the images; the option is looked at before that is refused.
    assert not config_of(*recipe).train.random_flip, "the preset's own choice is of other images"
    assert config_of(*recipe, "--train.random-flip").train.random_flip


def test_other_processes_do_not_look_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pickle.dumps(config_of(*files(images)))

    def fail(*_: Any) -> None:
        raise AssertionError("it was listed again")

    monkeypatch.setattr(file_tree, "list_files", fail)
    shutil.rmtree(images)
    config = pickle.loads(sent)
    assert source_of(config.data).num_classes == 2
    assert trained_configs(config)[0].num_classes == 2
    assert keys(config) == keys(pickle.loads(sent))


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--data.image-size=10", True),
        ("--data.resize=pad", True),
        ("--data.seed=1", True),
        ("--data.test-fraction=0.3", True),
        ("--data.max-corrupt=5", False),
        ("--data.num-shards=4", False),
    ],
)
def test_what_ingest_depends_on(images: Path, option: str, changes: bool) -> None:
    size = ("--data.image-size=8",) if "resize" in option else ()  # without it nothing is resized
    before, after = (keys(config_of(*files(images, *size, *more))) for more in ((), (option,)))
    assert (before["ingest"] != after["ingest"]) == changes


def test_a_changed_file_is_another_input_and_another_place_is_not(images: Path) -> None:
    before = keys(config_of(*files(images)))
    shutil.copytree(images, images.parent / "copy")  # with the times of the files
    assert keys(config_of(*files(images.parent / "copy"))) == before
    os.utime(images / "cat" / "0.png", (1, 1))
    assert keys(config_of(*files(images))) != before
    assert "path" not in keyed(config_of(*files(images)).data)


def break_all(images: Path) -> None:
    for path in images.glob("*/*.png"):
        path.write_bytes(b"")


def leave_a_few(images: Path) -> None:
    for path in (*images.glob("*/2?.png"), *images.glob("*/3?.png"), *images.glob("*/4?.png")):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ["--data.source", "digits"], "data.path = "),
        (None, ["--data.path", "x", "--data.source", "digits"], "it is of --data.source files; leave it out"),
        (None, ["--data.image-size", "0"], "data.image_size = 0: give 1 to 4096"),
        (None, ["--data.resize", "zoom"], "invalid choice 'zoom'"),
        (None, ["--data.sha256", "abc"], "data.sha256 = 'abc': must be 64 hexadecimal digits"),
        (None, ["--data.path", "nothing"], "nothing': no such file or folder"),
        (None, ["--data.path", "s4://x"], "give a folder or a URI that pyarrow.fs takes"),
        (lambda root: (root / "cat" / "0.png").write_bytes(b""), [], "data.max_corrupt = 0: 1 of 120 images"),
        (break_all, ["--data.max-corrupt", "120"], "none of the images can be used: mend them"),
        (
            leave_a_few,
            ["--data.test-fraction", "0.5"],
            "train.global_batch_size = 64 is more than the about 27 training",
        ),
    ],
)
def test_messages(
    images: Path,
    change: Callable[[Path], Any] | None,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change is not None:
        change(images)
    assert message in refusal(capsys, *files(images, *options))


def test_a_source_without_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.path = None: give the folder or URI" in refusal(capsys, "quickstart", "--data.source", "files")


def test_a_dry_run_lists_what_was_found(images: Path) -> None:
    (images / "notes.txt").touch()
    shutil.copytree(images, images.parent / "split" / "train")
    (images.parent / "split" / "test").mkdir()
    for name in ("cat", "dog"):
        (images.parent / "split" / "test" / name).mkdir()
        shutil.copy(images / name / "7.png", images.parent / "split" / "test" / name / "x.png")
    (images.parent / "split" / "train" / "cat" / "3.png").write_bytes(b"")
    result, _ = run(*files(images.parent / "split", "--data.max-corrupt", "1", "--data.image-size", "12", "--dry-run"))
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("│")][1:-1] for line in result.stdout.splitlines() if "│" in line]
    assert ["cat", "60", "1"] in rows
    assert ["all", "120", "2"] in rows
    for line in (
        "(folders)",
        "splits: train, test in the source; taken by the settings: 10% of train for validation",
        "sizes: smallest 8 x 8, median 8 x 8, largest 8 x 8 pixels; 0 grey, 121 in colour",
        "made: 122 images of 12 x 12 x 3, by crop, 52,704 bytes of pixels in 2 files",
        "cannot be decoded, by their headers: 1, train/cat/3.png (is of no known image format)",
        "left out, file of another kind (.txt): 1, train/notes.txt",
        "warning: the same images are in two splits: 2 in train and test",
    ):
        assert line in result.stdout
    assert sorted(path.name for path in images.parent.iterdir()) == ["images", "split"], "nothing is written"
