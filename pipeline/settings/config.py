"""All settings of a run: a section of each package. Imports neither TensorFlow nor Ray, so that errors come at once."""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import tyro

from perceiver.config import PerceiverConfig
from pipeline.contact import problem_of_file_uri, problem_of_home
from pipeline.data.config import DatasetConfig
from pipeline.data.sources import source_of
from pipeline.evaluation.config import EvaluationConfig
from pipeline.fields import ADDED_LATER
from pipeline.masking import CONTROL, mask, masked
from pipeline.registry.config import PromotionConfig
from pipeline.tracking.config import TrackingConfig
from pipeline.training.config import TrainingConfig
from tune.config import RANGES, SearchConfig
from tune.space import Space, to_model, training_values


@dataclass(frozen=True)
class ModelConfig(PerceiverConfig):
    """`PerceiverConfig` without command-line options for the fields that follow from the data."""

    image_shape: tyro.conf.Fixed[tuple[int, int, int]] = (32, 32, 3)
    num_classes: tyro.conf.Fixed[int] = 100
    pixel_mean: tyro.conf.Fixed[tuple[float, ...] | None] = None
    pixel_std: tyro.conf.Fixed[tuple[float, ...] | None] = None
    conv_channel_growth: int = field(default=1, metadata=ADDED_LATER)
    """Factor by which channels grow from one convolution of the `conv` stem to the next, up to `conv_channels`."""
    num_conv_residuals: int = field(default=0, metadata=ADDED_LATER)
    """3 x 3 convolutions of the `conv` stem after its last pooling, each with a skip connection around it."""
    input_mlp_widening_factor: int = field(default=0, metadata=ADDED_LATER)
    """Hidden width of an MLP on each row of the data array by itself, in multiples of C; 0: no such MLP."""
    patch_whitening: bool = field(default=False, metadata=ADDED_LATER)
    """Whether the `pixels` and `patches` stems decorrelate each row by the covariance of natural images."""
    cross_attention_prior: bool = field(default=False, metadata=ADDED_LATER)
    """Whether each head of each latent starts to look at a place of its own in the grid, by a learned Gaussian."""


@dataclass(frozen=True)
class PipelineConfig:
    """All settings of a run. They are checked against each other when it is made."""

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
        source = source_of(self.data)
        if source.image_shape != self.model.image_shape or source.num_classes != self.model.num_classes:
            raise ValueError(
                f"model.image_shape = {self.model.image_shape} and model.num_classes = {self.model.num_classes} do not "
                f"belong to data.source = {source.name}: build the configuration with presets.with_source"
            )
        if self.train.random_flip and source.flips is False:
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
        uri, storage = self.tracking.uri, mask(repr(self.storage))
        if problem := _problem_of_path(self.storage):
            raise ValueError(f"storage = {storage} {problem}")
        if "://" in self.storage and not self.storage.startswith("file://"):
            if uri is None:
                raise ValueError(
                    f"storage = {storage} is no local folder, so the runs need a server: give --tracking.uri"
                )
            if not uri.startswith(("http://", "https://", "databricks", "sqlite:///")):
                raise ValueError(
                    f"tracking.uri = {mask(uri)}: a database keeps no artifacts, and storage = {storage} is no local "
                    "folder: start `mlflow server` with this database, and give its address"
                )
        elif found := sorted(set("%?#") & set(self.storage)):
            raise ValueError(
                f"storage = {storage} has {' and '.join(found)}, which MLflow reads as parts of a URI: give a "
                "path without"
            )

    @property
    def training_rows(self) -> int:
        """Approximate number of rows of an epoch; the split rounds in every class."""
        source = source_of(self.data)
        rows = source.train_rows if source.test_rows else round(source.train_rows * (1 - self.data.test_fraction))
        return rows if source.validation_rows else round(rows * (1 - self.data.validation_fraction))

    def search_space(self) -> Space | None:
        """The search space; None if the search is off.

        Raises:
            ValueError: if the space has no point that can be trained, or none within the cost limit.
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
        """Training settings of a trial, before those of its sample replace some."""
        return replace(
            self.train,
            epochs=self.search.epochs,
            num_workers=self.search.workers_per_trial,
            cpus_per_worker=self.search.cpus_per_trial,
            checkpoint_every_steps=0,  # one at the end of each epoch, where Tune decides, and none within
            checkpoints_kept=1,
            reserve=False,  # of processes for a training of seconds
        )

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI with the default filled in."""
        return self.tracking.uri or f"sqlite:///{os.path.abspath(self.storage.removeprefix('file://'))}/mlflow.db"

    @property
    def artifact_location(self) -> str | None:
        """Folder of MLflow's artifacts: beside an SQLite store, below the storage of runs that are recorded in another
        database; None where a server decides.
        """
        scheme, _, file = self.tracking_uri.partition(":///")
        if scheme == "sqlite":
            return f"{os.path.dirname(os.path.abspath(file))}/mlartifacts"
        if self.tracking_uri.startswith(("http://", "https://", "databricks")):
            return None
        # Without a folder MLflow takes ./mlruns of whoever calls it, on each host another one.
        return f"{os.path.abspath(self.storage.removeprefix('file://'))}/mlartifacts"


def _problem_of_path(storage: str) -> str | None:
    """Why a storage is no folder that a person can have meant, and the remedy; None if it may be one."""
    if not storage.strip():
        return "is no folder: give one"
    if CONTROL.search(storage) or "\n" in storage or "\t" in storage:
        return "has control characters: give a path without"
    return problem_of_file_uri(storage) or problem_of_home(storage)


def flatten(config: PipelineConfig) -> dict[str, Any]:
    """`{"train.learning_rate": 0.002, ...}`, for people and records: passwords and keys in URIs are masked."""
    flat: dict[str, Any] = {}
    for name, section in asdict(config).items():
        flat |= (
            {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        )
    return masked(flat)


def trained_configs(
    config: PipelineConfig, data: dict[str, Any] | None = None, searched: dict[str, Any] | None = None
) -> tuple[ModelConfig, TrainingConfig]:
    """The settings with which the final model is trained.

    Args:
        config: Configuration of the run.
        data: Output of `preprocess`, whose pixel statistics go into the model.
        searched: Output of `search`, whose best values replace those of `config`.
    """
    model, train = config.model, config.train
    if data:
        model = replace(model, pixel_mean=tuple(data["pixel_mean"]), pixel_std=tuple(data["pixel_std"]))
    if best := (searched or {}).get("best"):
        model, train = to_model(best, model), replace(train, **training_values(best))
    return model, train
