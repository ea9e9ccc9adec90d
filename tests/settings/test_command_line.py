"""What the command line makes of good arguments: presets, overrides, paths, defaults from the environment, help."""

import hashlib
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from command_lines import ROOT, config_of, refusal, run

from pipeline.data.sources import SOURCES
from pipeline.settings.command_line import parse
from pipeline.settings.config import PipelineConfig
from pipeline.settings.presets import PRESETS, cifar100, quickstart
from tune.space import DIMENSIONS


def test_presets() -> None:
    assert parse([])[0] == "cifar100"
    assert config_of("--storage", "/runs") == config_of("cifar100", "--storage", "/runs")
    for name, preset in PRESETS.items():
        assert parse([name, "--storage", "/runs"])[0] == name
        parsed = asdict(config_of(name, "--storage", "/runs"))
        assert parsed == asdict(preset()) | {"storage": "/runs"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_preset_takes_every_source(preset: str, source: str) -> None:
    config = config_of(preset, "--data.source", source)
    assert config.model.image_shape == SOURCES[source].image_shape
    assert config.model.num_classes == SOURCES[source].num_classes
    assert config.train.random_flip <= bool(SOURCES[source].flips)


@pytest.mark.parametrize(
    "spelling",
    [
        ["--train.learning-rate", "0.5"],
        ["--train.learning_rate", "0.5"],
        ["--train.learning-rate=0.5"],
        ["--train.learning_rate=5e-1"],
    ],
)
def test_spellings_of_an_override(spelling: list[str]) -> None:
    config = config_of("quickstart", *spelling)
    assert config.train.learning_rate == 0.5
    assert config.search.learning_rate == (0.5,)


def test_overrides_of_all_kinds() -> None:
    argv = "quickstart --dry-run --until train --force search train --summary-json s.json --search.num-latents 4 8"
    argv += (
        " --search.learning-rate 1e-3 1e-2 --model.resize-to 16 --model.no-share-weights --tracking.uri http://h:5000"
    )
    preset, options = parse(argv.split())
    assert (preset, options.dry_run, options.until, options.force) == ("quickstart", True, "train", ("search", "train"))
    assert options.summary_json == "s.json"
    assert options.config.search.num_latents == (4, 8)
    assert options.config.search.learning_rate == (1e-3, 1e-2)
    assert (options.config.model.resize_to, options.config.model.share_weights) == (16, False)
    assert options.config.tracking.uri == "http://h:5000"


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(b"some bytes")
    digest = hashlib.sha256(b"some bytes").hexdigest()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of("--data.archive", "archive.tar.gz", "--data.sha256", digest, "--storage=~/runs")
    assert (config.data.archive, config.storage) == (str(archive), f"{tmp_path}/runs")
    assert config.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert config.artifact_location == f"{tmp_path}/runs/mlartifacts"
    config = config_of("--tracking.uri", "sqlite:///runs.db")
    assert config.tracking_uri == f"sqlite:///{tmp_path}/runs.db"
    assert config.artifact_location == f"{tmp_path}/mlartifacts"
    assert config_of("--tracking.uri", "http://localhost:5000").artifact_location is None
    assert parse(["--summary-json=~/s.json"])[1].summary_json == f"{tmp_path}/s.json"


def test_a_cluster_sets_where_runs_and_records_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERCEIVER_STORAGE", "s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    config = config_of("quickstart")
    assert (config.storage, config.tracking_uri) == ("s3://bucket/runs", "http://server:5000")
    config = config_of("--storage", str(tmp_path), "--tracking.uri=sqlite:////tmp/m.db")
    assert (config.storage, config.tracking_uri) == (str(tmp_path), "sqlite:////tmp/m.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert config_of("--storage", str(tmp_path)).tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert config_of("--tracking.uri", "http://other:5000").tracking_uri == "http://other:5000"
    with pytest.raises(ValueError, match="no local folder, so the runs need a server"):
        config_of()


def test_the_source_is_settled_before_anything_is_validated(capsys: pytest.CaptureFixture[str]) -> None:
    patches = ["--model.stem", "patches", "--model.patch-size"]
    assert config_of("quickstart", "--data.source=cifar100", *patches, "16").model.grid == (2, 2)
    assert config_of("cifar100", "--data.source", "digits", *patches, "8").model.grid == (1, 1)
    message = refusal(capsys, "cifar100", "--data.source", "digits", *patches, "16")
    assert "model.patch_size = 16 does not divide the image of 8 x 8 pixels: choose one of 1, 2, 4, 8" in message


def test_a_given_field_is_not_searched(capsys: pytest.CaptureFixture[str]) -> None:
    config, default = config_of("quickstart", "--model.num-latents", "4", "--model.num_iterations=3"), quickstart()
    assert (config.search.num_latents, config.search.num_iterations) == ((4,), (3,))
    assert config.search.num_self_attention_heads == default.search.num_self_attention_heads
    assert config.search.learning_rate == default.search.learning_rate
    space = config.search_space()
    assert space is not None
    assert {shape["num_latents"] for shape in space.shapes()} == {4}
    assert config_of("quickstart", "--search.num-self-attention-blocks").search.num_self_attention_blocks == ()
    message = refusal(capsys, "quickstart", "--model.num-latents", "4", "--search.num_latents", "4", "8")
    assert "--model.num-latents" in message
    assert "--search.num_latents" in message
    assert "give one of the two" in message
    everything = [f"--{d.section}.{d.name}={4 if d.section == 'model' else 0.1}" for d in DIMENSIONS]
    message = refusal(capsys, "quickstart", *everything)
    assert "search.num_trials = 4" in message
    assert "--search.num-trials 0" in message


@pytest.mark.parametrize("option", ["--model.image-shape", "--model.num_classes", "--model.pixel-mean"])
def test_what_the_data_decide_is_no_option(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Unrecognized options: {option}" in refusal(capsys, option, "8")


def options_of_help(text: str) -> dict[str, str]:
    """Help text of each option, without its default."""
    options: dict[str, str] = {}
    name, before = "", ""
    for line in (line.strip("│ ") for line in text.splitlines() if line.startswith("│")):
        if line.startswith("-") and not before.endswith(","):
            name = re.split("[, ]", line.removeprefix("-h, "))[0]
            options[name] = ""
        elif name:
            options[name] += f" {line}"
        before = line
    return {name: re.sub(r"\(default: .*", "", text).strip() for name, text in options.items()}


def test_help_documents_every_field_at_once() -> None:
    result, seconds = run("--help")
    assert seconds < 2.5  # 1.7 s on a slow machine under load
    assert result.returncode == 0
    options = options_of_help(result.stdout)
    hidden = {"image_shape", "num_classes", "pixel_mean", "pixel_std", "fingerprint", "found"}
    expected = {"--dry-run", "--until", "--force", "--summary-json", "--storage", "--help"}
    for name, section in {f.name: getattr(cifar100(), f.name) for f in fields(PipelineConfig)}.items():
        if name != "storage":
            expected |= {f"--{name}.{f.name.replace('_', '-')}" for f in fields(section) if f.name not in hidden}
    assert set(options) == expected
    for name, text in options.items():
        assert len(text) > 10, f"{name} is not documented"


def test_help_loads_no_heavy_library() -> None:
    code = """if True:
        import sys
        from pipeline.run import main
        sys.argv = ["run.py", "--help"]
        try:
            main()
        except SystemExit:
            print("loaded:", *sorted({"keras", "mlflow", "ray", "tensorflow", "sklearn"} & set(sys.modules)))
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded:"
