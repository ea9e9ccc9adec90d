"""A bad value ends a run at once with one message that names the value and the remedy."""

import hashlib
from pathlib import Path

import pytest
from command_lines import BORDER, ROOT, refusal, run


@pytest.mark.parametrize(
    ("argv", "value", "remedy"),
    [
        ("--train.nope 3", "Unrecognized options: --train.nope", "--help"),
        ("--train.epoch 3", "Unrecognized options: --train.epoch", "--train.epochs"),
        ("nope", "preset = 'nope'", "cifar100, cifar100_pixels, cifar100_gpu, cifar100_8gpu, keras_example"),
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
        ("--train.cutmix-until -1", "train.cutmix_until = -1.0", "0 to 1"),
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
        ("--train.shuffle-window-mb 0", "train.shuffle_window_mb = 0", "give at least 1"),
        ("--train.cache-gb 0", "train.cache_gb = 0.0", "give a positive number"),
        ("--train.cache ~nobody-here/x", "train.cache = '~nobody-here/x'", "a user whom this host does not know"),
        ("--train.cache shards", "train.cache = 'shards'", "give a folder from / or ~ on"),
        ("--train.seed 4294967296", "train.seed = 4294967296", "2**31"),
        ("--train.cpus-per-worker 0", "train.cpus_per_worker = 0.0", "give at least 0.001"),
        ("--train.cpus-per-worker nan", "train.cpus_per_worker = nan", "give at least 0.001"),
        ("--train.optimizer adam", "train.weight_decay = 0.2", "--train.weight-decay 0"),
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
        ("--model.stem patches --model.patch-size 5", "model.patch_size = 5", "32 x 32 pixels: choose one of 1, 2, 4"),
        (f"--data.archive /nope --data.sha256 {'0' * 64}", "data.archive = '/nope'", "no such file"),
        ("--model.num-conv-layers 6", "model.num_conv_layers = 6: an image of 32 x 32", "give at most 5"),
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
        ("--storage=", "storage = ''", "is no folder: give one"),
        ("--storage file:/tmp/runs", "storage = 'file:/tmp/runs'", "give the path, or file:///PATH"),
        ("--storage file://tmp/runs", "storage = 'file://tmp/runs'", "give the path, or file:///PATH"),
        ("--storage ~nobody-here/runs", "storage = '~nobody-here/runs'", "a user whom this host does not know"),
        ("--data.archive ~nobody-here/a", "data.archive = '~nobody-here/a'", "a user whom this host does not know"),
        (
            "--data.source files --data.path ~nobody-here/a",
            "data.path = '~nobody-here/a'",
            "a user whom this host does not know",
        ),
        (
            "--tracking.uri sqlite:///~nobody-here/a",
            "tracking.uri = '~nobody-here/a'",
            "a user whom this host does not know",
        ),
        ("--summary-json ~nobody-here/a", "summary-json = '~nobody-here/a'", "a user whom this host does not know"),
        ("--storage /tmp/a\x1b[2J", r"storage = '/tmp/a\x1b[2J'", "has control characters"),
        ("--storage /tmp/100%/runs", "storage = '/tmp/100%/runs' has %", "give a path without"),
        ("--storage /tmp/a?b#c", "storage = '/tmp/a?b#c' has # and ?", "give a path without"),
        ("--tracking.uri nope://host", "tracking.uri = 'nope://host'", "http://HOST:PORT"),
        ("--tracking.experiment=", "tracking.experiment = ''", "give a name"),
        ("--tracking.uri postgresql", "tracking.uri = 'postgresql'", "http://HOST:PORT"),
        ("--tracking.uri mysql:pw@host", "tracking.uri = 'mysql:***@host'", "http://HOST:PORT"),
        (
            "--storage s3://b/runs --tracking.uri postgresql://host/db",
            "tracking.uri = postgresql://host/db: a database keeps no artifacts",
            "start `mlflow server`",
        ),
        ("--tracking.model-name a/b", "tracking.model_name = 'a/b'", "without /, : and @"),
        ("--tracking.model-name a@b", "tracking.model_name = 'a@b'", "without /, : and @"),
        ("--tracking.model-name o'neill", 'tracking.model_name = "o\'neill"', "without quotes"),
        (f"--tracking.model-name {'m' * 251}", "tracking.model_name = 'mmm", "at most 250"),
        (f"--tracking.experiment {'m' * 251}", "tracking.experiment = 'mmm", "give a shorter name"),
        ("--tracking.alias V1", "tracking.alias = 'V1'", "letters, digits"),
        ("--tracking.alias challenger", "tracking.alias = 'challenger'", "alias of the others"),
        ("--promotion.min-gain 1", "promotion.min_gain = 1.0", "below 1"),
        ("--train.initial-model models:/m@champion", "train.initial_model = 'models:/m@champion'", "no alias"),
        ("quickstart --train.initial-model models:/m/1", "models:/m/1 has a shape of its own", "--search.num-trials 0"),
        ("--summary-json /nope/summary.json", "summary-json = '/nope/summary.json'", "make it"),
        ("--summary-json /tmp", "summary-json = '/tmp' is a folder", "give the path of a file"),
    ],
)
def test_a_bad_value_is_named_with_its_remedy(
    argv: str, value: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, *argv.split(" "))
    assert value in message
    assert remedy in message


# What is seen when the arguments are parsed, and what only the driver sees.
BAD_RUNS: list[tuple[list[str], list[str]]] = [
    (["--train.nope", "3"], ["--train.nope", "--help"]),
    (["--train.global-batch-size", "129"], ["train.global_batch_size = 129", "train.num_workers = 2", "take 128"]),
    (
        ["--train.num-workers=1024", "--train.global-batch-size=1024", "--train.cpus-per-worker=0.75"],
        ["train.num_workers = 1024", "train.cpus_per_worker = 0.75", "768 CPUs", "take fewer workers"],
    ),
    (
        ["--data.archive", str(ROOT / "LICENSE"), "--data.sha256", "0" * 64],
        [f"data.sha256 = '{'0' * 64}'", hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest(), "fetch the file"],
    ),
    (["--storage", "nope://runs", "--tracking.uri", "http://127.0.0.1:9"], ["storage = 'nope://runs'", "pyarrow.fs"]),
    (["--storage", "/dev/null"], ["storage = '/dev/null'", "cannot be read and written"]),
    (["--tracking.uri", "http://127.0.0.1:9"], ["tracking.uri = http://127.0.0.1:9", "mlflow server"]),
    (["--tracking.uri", "mysql://host/db"], ["tracking.uri = mysql://host/db", "driver", "install it with pip"]),
]


@pytest.mark.parametrize(("argv", "fragments"), BAD_RUNS, ids=lambda value: value[0] if value[0][0] == "-" else "")
def test_a_bad_value_ends_the_run_at_once(argv: list[str], fragments: list[str], tmp_path: Path) -> None:
    storage = [] if "--storage" in argv else ["--storage", str(tmp_path / "runs")]
    result, seconds = run(*argv, *storage, RAY_TMPDIR=str(tmp_path))
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr
    message = BORDER.sub(" ", result.stderr)
    for fragment in fragments:
        assert fragment in message
    assert len(message) < 600
    assert not (tmp_path / "ray").exists(), "Ray was started"
    assert seconds < 3
