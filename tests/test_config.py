"""The command line: what it makes of good values, and that a bad one is one clear message, at once."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from perceiver.config import PerceiverConfig
from pipeline.command_line import parse
from pipeline.config import ModelConfig, PipelineConfig, flatten, keyed
from pipeline.datasets import SOURCES
from pipeline.presets import PRESETS, cifar100, quickstart, with_source
from tune.config import SearchConfig
from tune.space import DIMENSIONS

ROOT = Path(__file__).parents[1]
BORDER = re.compile(r"(?:[│╭╮╰╯─|+\s]|-{3,})+")  # of Unicode or of ASCII


def config_of(*argv: str) -> PipelineConfig:
    return parse(argv)[1].config


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message to which `argv` leads, on one line."""
    try:
        parse(argv)
    except ValueError as error:
        return str(error)
    except SystemExit:  # with code 2, as the tests below see from outside
        return BORDER.sub(" ", capsys.readouterr().err)
    pytest.fail(f"{argv} is not refused")


def run(*argv: object, **variables: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """`python pipeline/run.py` with `argv`, and the seconds that it took."""
    start = time.monotonic()
    command = [sys.executable, "pipeline/run.py", *map(str, argv)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables, timeout=60)
    return result, time.monotonic() - start


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
    assert config.train.random_flip <= SOURCES[source].flips


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


@pytest.mark.parametrize(
    ("argv", "value", "remedy"),
    [
        ("--train.nope 3", "Unrecognized options: --train.nope", "--help"),
        ("--train.epoch 3", "Unrecognized options: --train.epoch", "--train.epochs"),
        ("nope", "preset = 'nope'", "cifar100, cifar100_gpu, cifar100_8gpu, keras_example, quickstart"),
        ("--train.epochs 1.5", "--train.epochs", "INT"),
        ("--until nope", "'nope'", "preprocess"),
        ("--data.source nope", "'nope'", "digits"),
        ("--train.learning-rate nan", "train.learning_rate = nan", "give a positive number"),
        ("--train.learning-rate inf", "train.learning_rate = inf", "give a positive number"),
        ("--train.learning-rate=-0.1", "train.learning_rate = -0.1", "give a positive number"),
        ("--train.learning-rate -0.1", "train.learning_rate = -0.1", "give a positive number"),
        ("--train.weight-decay nan", "train.weight_decay = nan", "give 0 or more"),
        ("--train.warmup-epochs -1", "train.warmup_epochs = -1.0", "give 0 or more"),
        ("--train.label-smoothing 1", "train.label_smoothing = 1.0", "below 1"),
        ("--train.cutmix 1.5", "train.cutmix = 1.5", "0 to 1"),
        ("--train.random-zoom nan", "train.random_zoom = nan", "below 1"),
        ("--train.epochs 0", "train.epochs = 0", "give at least 1"),
        ("--train.max-failures -1", "train.max_failures = -1", "give 0 or more"),
        ("--train.num-workers 0", "train.num_workers = 0", "give a number of at least 1"),
        ("--train.num-workers 0:2", "train.num_workers = 0:2", "at least 1, or MIN:MAX"),
        ("--train.num-workers 4:2", "train.num_workers = 4:2", "at least 1, or MIN:MAX"),
        ("--train.num-workers 1:", "train.num_workers = '1:'", "at least 1, or MIN:MAX"),
        ("--train.num-workers two", "train.num_workers = 'two'", "at least 1, or MIN:MAX"),
        ("--train.num-workers 2:3", "train.global_batch_size = 128 cannot be divided", "2:3: take 126"),
        ("--train.checkpoint-every-steps -1", "train.checkpoint_every_steps = -1", "give 0 or more"),
        ("--train.checkpoints-kept 0", "train.checkpoints_kept = 0", "give at least 1"),
        ("--train.seed 4294967296", "train.seed = 4294967296", "2**31"),
        ("--train.cpus-per-worker 0", "train.cpus_per_worker = 0.0", "give at least 0.001"),
        ("--train.cpus-per-worker nan", "train.cpus_per_worker = nan", "give at least 0.001"),
        ("--train.optimizer adam", "train.weight_decay = 0.05", "--train.weight-decay 0"),
        ("--train.global-batch-size 129", "train.global_batch_size = 129", "take 128"),
        ("--train.global-batch-size 45002", "train.global_batch_size = 45002", "about 45000 training rows"),
        ("quickstart --train.random-flip", "train.random_flip = True", "--train.no-random-flip"),
        ("--data.validation-fraction 1", "data.validation_fraction = 1.0", "between 0 and 1"),
        ("--data.num-shards 0", "data.num_shards = 0", "give 1 to 1000"),
        ("--data.seed -1", "data.seed = -1", "2**31"),
        ("--data.archive /nope", "data.archive = '/nope'", "or leave it out"),
        ("--data.sha256 00", "data.sha256 = '00'", "leave it out, or give --data.archive"),
        ("quickstart --data.archive /nope", "data.archive = '/nope'", "leave it out"),
        ("--model.dropout nan", "model.dropout = nan", "[0, 1)"),
        ("--model.num-latents 0", "model.num_latents = 0", "give at least 1"),
        ("--model.num-self-attention-heads 5", "model.num_self_attention_heads = 5", "choose one of 1, 2, 3, 4"),
        ("--model.num-conv-layers 6", "2 ** model.num_conv_layers = 64", "choose fewer layers"),
        (
            "quickstart --search.num-self-attention-heads 3 5",
            "the search space is empty: model.num_self_attention_heads = 3",
            "choose one of 1, 2",
        ),
        ("quickstart --search.max-gflops 1e-9", "search.max_gflops = 1e-09 is less than", "search smaller ones"),
        (
            "quickstart --search.weight-decay 0 1",
            "search.weight_decay = 0.0 1.0",
            "both positive, or one value, or none",
        ),
        ("--search.num-trials -1", "search.num_trials = -1", "give at least 0"),
        ("--search.num-latents 0 4", "search.num_latents = (0, 4)", "give positive numbers"),
        ("--search.learning-rate 0.1 0.01", "search.learning_rate = 0.1 0.01", "the lowest and the highest"),
        ("--search.learning-rate 0.1 nan", "search.learning_rate = 0.1 nan", "both positive"),
        ("--search.grace-epochs 9", "search.grace_epochs = 9", "lower it"),
        ("--search.cpus-per-trial inf", "search.cpus_per_trial = inf", "give at least 0.001"),
        ("--storage s3://bucket/runs", "storage = 's3://bucket/runs'", "--tracking.uri"),
        ("--tracking.uri nope://host", "tracking.uri = 'nope://host'", "http://HOST:PORT"),
        ("--tracking.experiment=", "tracking.experiment = ''", "give a name"),
        ("--tracking.model-name a/b", "tracking.model_name = 'a/b'", "without / and :"),
        ("--tracking.alias V1", "tracking.alias = 'V1'", "letters, digits"),
        ("--tracking.alias challenger", "tracking.alias = 'challenger'", "alias of the others"),
        ("--promotion.min-gain 1", "promotion.min_gain = 1.0", "below 1"),
        ("--train.initial-model models:/m@champion", "train.initial_model = 'models:/m@champion'", "no alias"),
        ("quickstart --train.initial-model models:/m/1", "models:/m/1 has a shape of its own", "--search.num-trials 0"),
        ("--summary-json /nope/summary.json", "summary-json = '/nope/summary.json'", "make it"),
    ],
)
def test_a_bad_value_is_named_with_its_remedy(
    argv: str, value: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, *argv.split(" "))
    assert value in message
    assert remedy in message


def test_what_says_how_a_run_is_carried_out_is_not_keyed() -> None:
    config = cifar100()
    execution_of_training = {"num_workers", "cpus_per_worker", "use_gpu", "max_failures", "deterministic"}
    execution_of_training |= {"checkpoint_every_steps", "checkpoints_kept"}
    sections: list[tuple[Any, set[str]]] = [
        (config.data, {"archive"}),
        (config.search, {"workers_per_trial", "cpus_per_trial", "max_concurrent_trials", "memory_limit_gib"}),
        (config.train, execution_of_training),
        (config.model, set()),
    ]
    for section, execution in sections:
        assert {f.name for f in fields(section)} - set(keyed(section)) == execution
        assert all(value == getattr(section, name) for name, value in keyed(section).items())


def test_xla_is_keyed_for_it_rounds_otherwise() -> None:
    without, with_xla = config_of().train, config_of("--train.jit-compile").train
    assert (without.jit_compile, with_xla.jit_compile) == (False, True)
    assert keyed(without) != keyed(with_xla)


def test_a_range_of_workers() -> None:
    train = config_of("--train.num-workers", "1:4").train
    assert (train.num_workers, train.min_workers, train.max_workers) == ((1, 4), 1, 4)
    # 128 rows cannot be divided among 3: one of three workers stands by
    assert [train.usable_workers(available) for available in (1, 2, 3, 4)] == [1, 2, 2, 4]
    train = config_of("--train.num-workers", "3", "--train.global-batch-size", "96").train
    assert (train.num_workers, train.min_workers, train.max_workers, train.usable_workers(3)) == (3, 3, 3, 3)
    assert flatten(config_of("--train.num-workers", "1:4"))["train.num_workers"] == (1, 4)


SECTIONS = [f.name for f in fields(PipelineConfig) if f.name != "storage"]


def test_flatten_has_every_field_once() -> None:
    flat = flatten(quickstart())
    assert flat["train.learning_rate"] == 3e-3
    assert flat["model.image_shape"] == (8, 8, 1)
    assert flat["storage"] == "./runs"
    assert len(flat) == sum(len(asdict(quickstart())[name]) for name in SECTIONS) + 1
    json.dumps(flat)


def test_a_model_section_makes_a_perceiver_config() -> None:
    assert asdict(PerceiverConfig(**asdict(ModelConfig()))) == asdict(ModelConfig())
    with pytest.raises(ValueError, match=r"presets\.with_source"):
        PipelineConfig(model=ModelConfig(image_shape=(8, 8, 1)))
    assert with_source(cifar100(), "cifar10").model.num_classes == 10
    with pytest.raises(ValueError, match="every searched field has one value"):
        SearchConfig(**{d.name: (8, 8) for d in DIMENSIONS})  # type: ignore[arg-type]


BAD_RUNS: list[tuple[list[str], list[str]]] = [
    (["--train.nope", "3"], ["--train.nope", "--help"]),
    (["--train.global-batch-size", "129"], ["train.global_batch_size = 129", "train.num_workers = 2", "take 128"]),
    (["--model.num-self-attention-heads", "5"], ["model.num_self_attention_heads = 5", "choose one of 1, 2, 3, 4"]),
    (["--model.stem=patches", "--model.patch-size=5"], ["model.patch_size = 5", "32 x 32", "choose one of 1, 2, 4"]),
    (
        ["--train.num-workers=1024", "--train.global-batch-size=1024", "--train.cpus-per-worker=0.75"],
        ["train.num_workers = 1024", "train.cpus_per_worker = 0.75", "768 CPUs", "take fewer workers"],
    ),
    (["--data.archive", "/nope.tar.gz", "--data.sha256", "0" * 64], ["data.archive = '/nope.tar.gz'", "no such file"]),
    (
        ["--data.archive", str(ROOT / "LICENSE"), "--data.sha256", "0" * 64],
        [f"data.sha256 = '{'0' * 64}'", hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest(), "fetch the file"],
    ),
    (["--train.learning-rate", "nan"], ["train.learning_rate = nan", "give a positive number"]),
    (["--storage", "s3://bucket/runs"], ["storage = 's3://bucket/runs'", "give --tracking.uri"]),
    (["--storage", "nope://runs", "--tracking.uri", "http://127.0.0.1:9"], ["storage = 'nope://runs'", "pyarrow.fs"]),
    (["--storage", "/dev/null"], ["storage = '/dev/null'", "cannot be read and written"]),
    (["--tracking.uri", "http://127.0.0.1:9"], ["tracking.uri = http://127.0.0.1:9", "mlflow server"]),
    (["--until", "nope"], ["'nope'", "--until", "preprocess"]),
]


@pytest.mark.parametrize(("argv", "fragments"), BAD_RUNS, ids=lambda value: value[0] if value[0][0] == "-" else "")
def test_a_bad_value_ends_the_run_at_once(argv: list[str], fragments: list[str], tmp_path: Path) -> None:
    storage = [] if "--storage" in argv else ["--storage", str(tmp_path / "runs")]
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        result, took = run(*argv, *storage, RAY_TMPDIR=str(tmp_path))
        seconds.append(took)
        if took < 3:
            break
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr
    message = BORDER.sub(" ", result.stderr)
    for fragment in fragments:
        assert fragment in message
    assert len(message) < 600
    assert not (tmp_path / "ray").exists(), "Ray was started"
    assert min(seconds) < 3


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
    runs = [run("--help") for _ in range(3)]
    assert min(seconds for _, seconds in runs) < 1.5
    result = runs[0][0]
    assert result.returncode == 0
    options = options_of_help(result.stdout)
    hidden = {"image_shape", "num_classes", "pixel_mean", "pixel_std"}
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
