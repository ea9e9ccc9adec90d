"""Text of the model card: what a version is, how it was made, how good it is and what it must not be used for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from perceiver.config import PerceiverConfig


@dataclass(frozen=True)
class ModelCard:
    """Contents of a model card.

    Attributes:
        name: Name of the registered model.
        alias: Alias of its best version.
        source: Name of the data set.
        description: What the data set is, by whom, and its terms.
        digest, test_digest: SHA-256 of all rows, and of the test rows.
        rows: Number of rows of each split.
        label_names: Names of the classes, in order.
        scores: Results on the test rows: `top1`, `top5`, `balanced_accuracy` (if it is known), `loss`; after
            temperature scaling `calibration_error` and `calibrated_loss`.
        temperature: Divisor of the logits, fitted on the validation rows; part of the model.
        latency_ms: Median time for one image, in milliseconds.
        device: Device on which the latency was measured.
        model: Settings of the model.
        train: Settings of the training, by name.
        epochs, num_workers, images_per_second: Length and speed of the training.
        provenance: Commit, versions, MLflow run and similar facts, by name.
    """

    name: str
    alias: str
    source: str
    description: str
    digest: str
    test_digest: str
    rows: Mapping[str, int]
    label_names: Sequence[str]
    scores: Mapping[str, float]
    temperature: float
    latency_ms: float
    device: str
    model: PerceiverConfig
    train: Mapping[str, Any]
    epochs: int
    num_workers: int
    images_per_second: float
    provenance: Mapping[str, str]

    def summary(self) -> str:
        """One paragraph, the description of the version."""
        return (
            f"Perceiver for {len(self.label_names)} classes of {self.source}: top-1 {self.scores['top1']:.2%}, top-5 "
            f"{self.scores['top5']:.2%} on {self.rows['test']} test images (SHA-256 {self.test_digest[:12]}...), "
            f"calibration error {self.scores['calibration_error']:.3f}, {self.latency_ms:.1f} ms for an image on "
            f"{self.device}. README.md among its files is the model card."
        )

    def markdown(self) -> str:
        """The whole card."""
        height, width, channels = self.model.image_shape
        settings = {f"model.{name}": value for name, value in asdict(self.model).items()}
        settings |= {f"train.{name}": value for name, value in self.train.items()}
        return "\n".join(
            [
                f"# {self.name}",
                "",
                self.summary(),
                "",
                "## Use",
                "",
                f"The model takes batches of uint8 images ({height}, {width}, {channels}) and returns the "
                f"probabilities of the {len(self.label_names)} classes as float32. The metadata contain the names of "
                "the classes as `label_names`.",
                "",
                f'    mlflow.pyfunc.load_model("models:/{self.name}@{self.alias}").predict(images)',
                "",
                "Pixels are whole numbers from 0 to 255. `mlflow models serve` rounds the numbers of a request down to "
                "such ones without a word, so that images scaled to 0..1 become black. All images of a call are "
                "computed at once, with all that is between them and the probabilities in memory: give many in parts.",
                "",
                "`retrain/model.keras` is the same model up to the logits, for further training. To load it, this "
                "project's package `perceiver` is needed.",
                "",
                "## Data",
                "",
                self.description,
                "",
                f"Rows: {', '.join(f'{count} {split}' for split, count in self.rows.items())}. SHA-256 of all rows: "
                f"`{self.digest}`; of the test rows: `{self.test_digest}`.",
                "",
                "## Test",
                "",
                *_table({name: f"{value:.4f}" for name, value in self.scores.items()}),
                "",
                f"Logits are divided by the temperature {self.temperature:.4f}, which was fitted on the validation "
                "rows. The test rows were used only for these results and for the choice between registered versions.",
                "",
                "## Limits",
                "",
                f"The model assigns every image to one of the {len(self.label_names)} classes of {self.source}, "
                "whatever it shows. Images must have the size of the images in the data set and look like them: other "
                "cameras, crops and resolutions were not tested. The model was not evaluated for uses that concern "
                "people, safety or medicine.",
                "",
                "## Training",
                "",
                f"{self.epochs} epochs on {self.num_workers} workers, {self.images_per_second:.0f} images/s.",
                "",
                *_table(self.provenance),
                "",
                *_table(settings),
                "",
                "## Licence",
                "",
                "Code and weights: Apache-2.0. The data have their own terms, see above.",
                "",
            ]
        )


def _table(values: Mapping[str, Any]) -> list[str]:
    cells = [(name, str(value).replace("|", "\\|").replace("\n", " ")) for name, value in values.items()]
    return ["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]
