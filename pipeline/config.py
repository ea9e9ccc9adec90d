"""All settings of a run as frozen dataclasses. Imports neither TensorFlow nor Ray: a bad value is answered at once."""

import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import tyro

from perceiver.config import PerceiverConfig
from pipeline.datasets import SOURCES
from pipeline.promotion import PromotionConfig
from tune.config import RANGES, SearchConfig
from tune.space import Space

# How a run is carried out, not what comes out of it: such fields are no part of a task's key.
EXECUTION = {"keyed": False}
WORKERS_REMEDY = "give a number of at least 1, or MIN:MAX for as many of these as the cluster has"
TRACKING_STORES = ("http://", "https://", "databricks", "sqlite:///", "postgresql", "mysql", "mssql")


def _workers_from(args: list[str]) -> int | tuple[int, int]:
    """`4` or `1:4`."""
    if not re.fullmatch(r"-?[0-9]+(:[0-9]+)?", args[0]):
        raise ValueError(f"train.num_workers = {args[0]!r}: {WORKERS_REMEDY}")
    least, colon, most = args[0].partition(":")
    return (int(least), int(most)) if colon else int(least)


def _workers_text(workers: int | tuple[int, int]) -> str:
    return str(workers) if isinstance(workers, int) else f"{workers[0]}:{workers[1]}"


Workers = Annotated[
    int | tuple[int, int],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|MIN:MAX",
        instance_from_str=_workers_from,
        is_instance=lambda value: isinstance(value, (int, tuple)),
        str_from_instance=lambda workers: [_workers_text(workers)],
    ),
]


@dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from and how their rows are divided."""

    source: Literal["cifar100", "cifar10", "digits"] = "cifar100"
    """Data set; `digits` is embedded in scikit-learn and needs no download."""
    archive: str | None = field(default=None, metadata=EXECUTION)
    """Local copy of the official .tar.gz; None downloads it. Needs `sha256`."""
    sha256: str | None = None
    """SHA-256 of `archive` in hex; a download is checked against that of the official archive."""
    validation_fraction: float = 0.1
    """Share of the training rows of each class that is kept for validation."""
    test_fraction: float = 0.2
    """Share of the rows of each class that is kept for the test, where the source has no test split (`digits`)."""
    num_shards: int = 16
    """Parquet shards of the training rows."""
    seed: int = 0
    """Seed of the splits and of the order of rows in the shards."""

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            _require(0 < getattr(self, name) < 1, f"data.{name}", getattr(self, name), "give a share between 0 and 1")
        _require(1 <= self.num_shards <= 1000, "data.num_shards", self.num_shards, "give 1 to 1000")
        _require(0 <= self.seed < 2**31, "data.seed", self.seed, "give a number in [0, 2**31)")


@dataclass(frozen=True)
class ModelConfig(PerceiverConfig):
    """`PerceiverConfig` with the fields that the data decides taken off the command line."""

    image_shape: tyro.conf.Fixed[tuple[int, int, int]] = (32, 32, 3)
    num_classes: tyro.conf.Fixed[int] = 100
    pixel_mean: tyro.conf.Fixed[tuple[float, ...] | None] = None
    pixel_std: tyro.conf.Fixed[tuple[float, ...] | None] = None


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; sizes are global, so they do not change with the number of workers."""

    num_workers: Workers = field(default=2, metadata=EXECUTION)
    """Data-parallel workers; each trains on its share of every global batch. MIN:MAX takes what the cluster has."""
    cpus_per_worker: float = field(default=1.0, metadata=EXECUTION)
    """CPUs of a worker, may be a fraction; its threads follow from it."""
    use_gpu: bool = field(default=False, metadata=EXECUTION)
    """Give every worker a GPU (NCCL instead of ring all-reduce); not measured on the authors' machines."""
    max_failures: int = field(default=3, metadata=EXECUTION)
    """How often workers that died are started again from the last checkpoint before the run fails."""
    checkpoint_every_steps: int = field(default=0, metadata=EXECUTION)
    """Steps between checkpoints within an epoch; 0: only at its end."""
    checkpoints_kept: int = field(default=2, metadata=EXECUTION)
    """How many of the last checkpoints are kept, beside the one with the lowest validation loss."""
    deterministic: bool = field(default=False, metadata=EXECUTION)
    """Only operations that give the same bits again; on CPUs the others did too where it was looked at."""
    epochs: int = 10
    """Passes over the training rows."""
    global_batch_size: int = 128
    """Rows of a step over all workers; `num_workers` must divide it."""
    optimizer: Literal["adam", "adamw", "lamb", "muon", "sgd"] = "adamw"
    """Optimizer; `sgd` has a momentum of 0.9, `muon` is AdamW for all but the kernels within the model."""
    learning_rate: float = 2e-3
    """Highest learning rate."""
    learning_rate_schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """Cosine decay to zero over `epochs`; or division by 5 when the validation loss stalls; or constant."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up before the cosine decay."""
    plateau_patience: int = 3
    """Epochs without improvement before the `plateau` schedule lowers the learning rate."""
    early_stopping_patience: int = 15
    """Epochs without improvement of the validation loss before training stops; the best weights are kept."""
    weight_decay: float = 0.05
    """Decoupled weight decay of kernels (adamw, lamb, muon, sgd; no biases, scales, latents or positions)."""
    label_smoothing: float = 0.0
    """Share of the target given to all classes alike."""
    random_crop_padding: int = 4
    """Pixels by which a training image is shifted at most in each direction; 0 turns it off."""
    random_flip: bool = True
    """Mirror training images left to right at random."""
    random_zoom: float = 0.0
    """Largest relative zoom of training images in height and in width; 0 turns it off."""
    cutmix: float = 0.0
    """Share of the training images that get a rectangle of another one, and its label by area; 0 turns it off."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Keras dtype policy."""
    jit_compile: bool = False
    """XLA for the forward and backward pass; the collectives stay outside."""
    seed: int = 0
    """Seed of the initial weights, the order of rows, the augmentation and dropout."""
    initial_model: str | None = None
    """Registered model, as models:/NAME/VERSION, whose weights the training begins with; None: random ones."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"train.num_workers = {_workers_text(self.num_workers)}: {WORKERS_REMEDY}")
        for name in (
            "epochs",
            "global_batch_size",
            "checkpoints_kept",
            "plateau_patience",
            "early_stopping_patience",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "give at least 1")
        for name in ("max_failures", "random_crop_padding", "checkpoint_every_steps"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "give 0 or more")
        _require(0 <= self.seed < 2**31, "train.seed", self.seed, "give a number in [0, 2**31)")
        _require(0 < self.learning_rate < math.inf, "train.learning_rate", self.learning_rate, "give a positive number")
        cpus = self.cpus_per_worker
        _require(0.001 <= cpus < math.inf, "train.cpus_per_worker", cpus, "give at least 0.001")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"train.{name}", value, "give 0 or more")
        for name in ("label_smoothing", "random_zoom"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "give 0 or more, below 1")
        _require(0 <= self.cutmix <= 1, "train.cutmix", self.cutmix, "give a share from 0 to 1")
        # An alias may come to mean another version, but a task's key says for ever what came out of it.
        pinned = self.initial_model is None or re.fullmatch(r"models:/[^/@:]+/[0-9]+", self.initial_model)
        _require(bool(pinned), "train.initial_model", self.initial_model, "give models:/NAME/VERSION, no alias")
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(
                f"train.weight_decay = {self.weight_decay} does nothing with train.optimizer = adam: take adamw, or "
                "give --train.weight-decay 0"
            )
        common = math.lcm(self.min_workers, self.max_workers)
        if self.global_batch_size % common:
            nearest = max(common, round(self.global_batch_size / common) * common)
            raise ValueError(
                f"train.global_batch_size = {self.global_batch_size} cannot be divided among train.num_workers = "
                f"{_workers_text(self.num_workers)}: take {nearest}, or a number of workers that divides it"
            )

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def usable_workers(self, available: int) -> int:
        """The most of `available` workers that divide the global batch equally."""
        return max(count for count in range(1, available + 1) if self.global_batch_size % count == 0)


@dataclass(frozen=True)
class EvaluationConfig:
    """What is looked at in a trained model beside its accuracy."""

    calibration_bins: int = 15
    """Bins of equal width, over the confidences from 0 to 1, of the calibration error."""
    corruption_rows: int = 1000
    """Test rows on which robustness is measured; 0 turns it off."""
    corruption_severities: tuple[int, ...] = (1, 3, 5)
    """Severities of every corruption, 1 to 5."""
    confident_mistakes: int = 24
    """How many of the most confident mistakes are kept with their pictures."""
    latency_calls: int = 100
    """Timed calls with one image."""
    seed: int = 0
    """Seed of the choice of rows and of the noise."""

    def __post_init__(self) -> None:
        for name, least in (("calibration_bins", 1), ("latency_calls", 1), ("corruption_rows", 0)):
            value = getattr(self, name)
            _require(value >= least, f"evaluation.{name}", value, f"give at least {least}")
        _require(
            self.confident_mistakes >= 0, "evaluation.confident_mistakes", self.confident_mistakes, "give 0 or more"
        )
        severities = self.corruption_severities
        right = severities and all(1 <= severity <= 5 for severity in severities)
        _require(bool(right), "evaluation.corruption_severities", severities, "give some of 1 2 3 4 5")
        _require(0 <= self.seed < 2**31, "evaluation.seed", self.seed, "give a number in [0, 2**31)")


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow records runs and models."""

    uri: str | None = None
    """MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else an SQLite file inside the storage folder."""
    experiment: str = "perceiver"
    """MLflow experiment of the runs."""
    model_name: str = "perceiver"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias of the best version; the newest of the others has the alias `challenger`."""

    def __post_init__(self) -> None:
        remedy = "give http://HOST:PORT, sqlite:///FILE or the URI of another database"
        _require(self.uri is None or self.uri.startswith(TRACKING_STORES), "tracking.uri", self.uri, remedy)
        # MLflow would refuse them too, but not before there is a model to register.
        _require(bool(self.experiment.strip()), "tracking.experiment", self.experiment, "give a name")
        remedy = "give a name that starts with a letter or digit, without / and :"
        _require(bool(re.fullmatch(r"\w[^/:]*", self.model_name)), "tracking.model_name", self.model_name, remedy)
        remedy = "give a name of letters, digits, _ and -, but not `latest` nor that of a version like v1"
        named = re.fullmatch(r"(?!latest$|v[0-9]+$)[\w-]+", self.alias, re.IGNORECASE)
        _require(bool(named), "tracking.alias", self.alias, remedy)
        _require(self.alias != "challenger", "tracking.alias", self.alias, "that is the alias of the others")


@dataclass(frozen=True)
class PipelineConfig:
    """Everything that a run depends on."""

    data: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
    storage: str = "./runs"
    """Folder, or URI that pyarrow.fs takes, for all that a run makes; default: $PERCEIVER_STORAGE, else ./runs."""

    def __post_init__(self) -> None:
        source = SOURCES[self.data.source]
        if source.image_shape != self.model.image_shape or source.num_classes != self.model.num_classes:
            raise ValueError(
                f"model.image_shape = {self.model.image_shape} and model.num_classes = {self.model.num_classes} do not "
                f"belong to data.source = {source.name}: build the configuration with presets.with_source"
            )
        if self.train.random_flip and not source.flips:
            raise ValueError(
                f"train.random_flip = True, but mirrored images of data.source = {source.name} are of no class: "
                "give --train.no-random-flip"
            )
        if self.train.global_batch_size > (rows := self.training_rows):
            raise ValueError(
                f"train.global_batch_size = {self.train.global_batch_size} is more than the about {rows} training rows "
                f"of data.source = {source.name}: lower it"
            )
        if self.train.initial_model and self.search.num_trials:
            raise ValueError(
                f"train.initial_model = {self.train.initial_model} has a shape of its own: give --search.num-trials 0"
            )
        if "://" in self.storage and not self.storage.startswith("file://") and self.tracking.uri is None:
            raise ValueError(
                f"storage = {self.storage!r} is no local folder, so the runs need a server: give --tracking.uri"
            )

    @property
    def training_rows(self) -> int:
        """About how many rows an epoch has; the split by class rounds."""
        source = SOURCES[self.data.source]
        rows = source.train_rows if source.test_rows else round(source.train_rows * (1 - self.data.test_fraction))
        return round(rows * (1 - self.data.validation_fraction))

    def search_space(self) -> Space | None:
        """What the search may try; None if it is off.

        Raises:
            ValueError: if there is nothing that can be trained.
        """
        if not self.search.num_trials:
            return None
        if 0 < self.search.train_rows < self.train.global_batch_size:
            raise ValueError(
                f"search.train_rows = {self.search.train_rows} is less than train.global_batch_size = "
                f"{self.train.global_batch_size}: raise it"
            )
        replace(self.trial_training(), **{n: max(values) for n in RANGES if (values := getattr(self.search, n))})
        return Space.of(self.search, self.model)

    def trial_training(self) -> TrainingConfig:
        """How a trial is trained, before a sample changes it."""
        return replace(
            self.train,
            epochs=self.search.epochs,
            num_workers=self.search.workers_per_trial,
            cpus_per_worker=self.search.cpus_per_trial,
            checkpoint_every_steps=0,  # one at the end of each epoch, where Tune decides, and none within
            checkpoints_kept=1,
        )

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI with the default filled in."""
        return self.tracking.uri or f"sqlite:///{os.path.abspath(self.storage.removeprefix('file://'))}/mlflow.db"

    @property
    def artifact_location(self) -> str | None:
        """Folder of MLflow's artifacts, beside an SQLite store; else None: the server decides."""
        scheme, _, file = self.tracking_uri.partition(":///")
        return f"{os.path.dirname(os.path.abspath(file))}/mlartifacts" if scheme == "sqlite" else None


def keyed(section: Any) -> dict[str, Any]:
    """The fields of a section that decide what comes out of a task."""
    return {f.name: getattr(section, f.name) for f in fields(section) if f.metadata.get("keyed", True)}


def flatten(config: PipelineConfig) -> dict[str, Any]:
    """`{"train.learning_rate": 0.002, ...}`."""
    flat: dict[str, Any] = {}
    for name, section in asdict(config).items():
        flat |= (
            {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        )
    return flat


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: {remedy}")
