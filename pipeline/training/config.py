"""Settings of a training. Imports neither TensorFlow nor Ray."""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from pipeline.contact import problem_of_home
from pipeline.fields import ADDED_LATER, EXECUTION, require

WORKERS_REMEDY = "give a number of at least 1, or MIN:MAX for as many of these as the cluster has"


def _workers_from(args: list[str]) -> int | tuple[int, int]:
    """`4` or `1:4`."""
    if not re.fullmatch(r"-?[0-9]+(:[0-9]+)?", args[0]):
        raise ValueError(f"train.num_workers = {args[0]!r}: {WORKERS_REMEDY}")
    least, colon, most = args[0].partition(":")
    return (int(least), int(most)) if colon else int(least)


def workers_text(workers: int | tuple[int, int]) -> str:
    return str(workers) if isinstance(workers, int) else f"{workers[0]}:{workers[1]}"


Workers = Annotated[
    int | tuple[int, int],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|MIN:MAX",
        instance_from_str=_workers_from,
        is_instance=lambda value: isinstance(value, (int, tuple)),
        str_from_instance=lambda workers: [workers_text(workers)],
    ),
]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; sizes are global, so they do not change with the number of workers."""

    num_workers: Workers = field(default=2, metadata=EXECUTION)
    """Data-parallel workers; each trains on its share of every global batch. MIN:MAX takes what the cluster has."""
    cpus_per_worker: float = field(default=1.0, metadata=EXECUTION)
    """CPUs of a worker, may be a fraction; its threads follow from it (docs/survival.md)."""
    use_gpu: bool = field(default=False, metadata=EXECUTION)
    """Give every worker a GPU (NCCL instead of ring all-reduce); tried on one GPU alone (docs/gpu.md)."""
    max_failures: int = field(default=3, metadata=EXECUTION)
    """How often workers that died are started again from the last checkpoint before the run fails."""
    reserve: bool = field(default=True, metadata=EXECUTION)
    """Keep a process for each worker ready that has imported TensorFlow, where memory allows (docs/survival.md)."""
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
    muon_steps: int = field(default=5, metadata=ADDED_LATER)
    """Newton-Schulz iterations of `muon`; fewer cost less and orthogonalise less precisely."""
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
    alternating_flip: bool = field(default=False, metadata=ADDED_LATER)
    """Whether `random_flip` mirrors an image in every second epoch, half of them from the first on, or by chance."""
    random_zoom: float = 0.0
    """Largest relative zoom of training images in height and in width; 0 turns it off."""
    cutmix: float = 0.0
    """Share of the training images that get a rectangle of another one, and its label by area; 0 turns it off."""
    cutmix_until: float = field(default=1.0, metadata=ADDED_LATER)
    """Share of the epochs after which no image is mixed any more, so that a training can end on images as they are."""
    class_weights: Literal["none", "balanced"] = field(default="none", metadata=ADDED_LATER)
    """Factors on the loss of the rows of each class; `balanced` makes every class count alike, however few its rows."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Keras dtype policy."""
    gradient_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=ADDED_LATER)
    """What several workers send of the gradients; bfloat16 is half as much, for slow networks (docs/scaling.md)."""
    shuffle_window_mb: int = field(default=1024, metadata=ADDED_LATER)
    """MiB of pixels that are shuffled at a time; with more training rows than that, workers stream their shards."""
    cache: str | None = field(default=None, metadata=EXECUTION)
    """Folder on each host's disk, from / on, that keeps streamed shards; None: every epoch reads the storage."""
    cache_gb: float = field(default=10.0, metadata=EXECUTION)
    """Most that `cache` holds, in GB; further shards are read from the storage."""
    jit_compile: bool = False
    """XLA for the forward and backward pass and the update; the collectives between them stay outside."""
    seed: int = 0
    """Seed of the initial weights, the order of rows, the augmentation and dropout."""
    initial_model: str | None = None
    """Registered model, as models:/NAME/VERSION, whose weights the training begins with; None: random ones."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"train.num_workers = {workers_text(self.num_workers)}: {WORKERS_REMEDY}")
        for name in (
            "epochs",
            "global_batch_size",
            "muon_steps",
            "checkpoints_kept",
            "plateau_patience",
            "early_stopping_patience",
            "shuffle_window_mb",
        ):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "give at least 1")
        for name in ("max_failures", "random_crop_padding", "checkpoint_every_steps"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "give 0 or more")
        require(0 <= self.seed < 2**31, "train.seed", self.seed, "give a number in [0, 2**31)")
        require(0 < self.cache_gb < math.inf, "train.cache_gb", self.cache_gb, "give a positive number")
        # Workers have working directories of their own.
        rooted = self.cache is None or self.cache.startswith(("/", "~"))
        require(rooted, "train.cache", self.cache, "give a folder from / or ~ on, or leave it out")
        if problem := problem_of_home(self.cache or ""):
            raise ValueError(f"train.cache = {self.cache!r} {problem}")
        require(0 < self.learning_rate < math.inf, "train.learning_rate", self.learning_rate, "give a positive number")
        cpus = self.cpus_per_worker
        require(0.001 <= cpus < math.inf, "train.cpus_per_worker", cpus, "give at least 0.001")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.{name}", value, "give 0 or more")
        for name in ("label_smoothing", "random_zoom"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "give 0 or more, below 1")
        for name in ("cutmix", "cutmix_until"):
            require(0 <= getattr(self, name) <= 1, f"train.{name}", getattr(self, name), "give a share from 0 to 1")
        # An alias may come to mean another version, but a task's key says for ever what came out of it.
        pinned = self.initial_model is None or re.fullmatch(r"models:/[^/@:]+/[0-9]+", self.initial_model)
        require(bool(pinned), "train.initial_model", self.initial_model, "give models:/NAME/VERSION, no alias")
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
                f"{workers_text(self.num_workers)}: take {nearest}, or a number of workers that divides it"
            )

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def has_reserve(self) -> bool:
        """Whether processes in reserve are of use: workers may be started again, and compute on CPUs."""
        return self.reserve and self.max_failures > 0 and not self.use_gpu

    def usable_workers(self, available: int) -> int:
        """The most of `available` workers that divide the global batch equally."""
        return max(count for count in range(1, available + 1) if self.global_batch_size % count == 0)
