"""The model card: what a registered version is, how it was made, what it can and what it must not be used for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import ModelConfig, TrainingConfig

CIFAR_TERMS = "Its authors name no licence; it is meant for research."
DATA = {
    "cifar100": f"CIFAR-100 (Krizhevsky, 2009): 60,000 photographs of 32 x 32, 100 classes. {CIFAR_TERMS}",
    "cifar10": f"CIFAR-10 (Krizhevsky, 2009): 60,000 photographs of 32 x 32, 10 classes. {CIFAR_TERMS}",
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), as scikit-learn has it: 1,797 "
    "images of 8 x 8. CC BY 4.0.",
}


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        name: of the registered model.
        source: name of the data set.
        digest, test_digest: SHA-256 of all its rows, and of the test rows.
        rows: of each split.
        label_names: of the classes.
        scores: of the test rows: `top1`, `top5`, `loss`, and `calibration_error` and `calibrated_loss` after scaling.
        temperature: by which logits are divided; fitted on the validation rows, and part of the model.
        latency_ms: median for one image.
        device: on which that was measured.
        model, train: the settings.
        epochs, num_workers, images_per_second: of the training.
        about: commit, command, run and the like, by name.
    """

    name: str
    source: str
    digest: str
    test_digest: str
    rows: Mapping[str, int]
    label_names: Sequence[str]
    scores: Mapping[str, float]
    temperature: float
    latency_ms: float
    device: str
    model: ModelConfig
    train: TrainingConfig
    epochs: int
    num_workers: int
    images_per_second: float
    about: Mapping[str, str]

    def summary(self) -> str:
        """One paragraph."""
        return (
            f"Perceiver for {len(self.label_names)} classes of {self.source}: top-1 {self.scores['top1']:.2%}, top-5 "
            f"{self.scores['top5']:.2%} on {self.rows['test']} test images (SHA-256 {self.test_digest[:12]}...), "
            f"calibration error {self.scores['calibration_error']:.3f}, {self.latency_ms:.1f} ms for an image on "
            f"{self.device}. README.md among its files is the model card."
        )

    def markdown(self) -> str:
        height, width, channels = self.model.image_shape
        tables = {"model": asdict(self.model), "train": asdict(self.train)}
        return "\n".join(
            [
                f"# {self.name}",
                "",
                self.summary(),
                "",
                "## Use",
                "",
                f"Takes uint8 images ({height}, {width}, {channels}) in batches, gives float32 probabilities of the "
                f"{len(self.label_names)} classes, whose names are in the metadata as `label_names`:",
                "",
                f'    mlflow.pyfunc.load_model("models:/{self.name}@champion").predict(images)',
                "",
                "`retrain/model.keras` is the same model up to the logits, to be trained on; it needs this project's "
                "package `perceiver` to load.",
                "",
                "## Data",
                "",
                DATA[self.source],
                "",
                f"Rows: {', '.join(f'{count} {split}' for split, count in self.rows.items())}. SHA-256 of all of them: "
                f"`{self.digest}`; of the test rows: `{self.test_digest}`.",
                "",
                "## Test",
                "",
                *_table({name: f"{value:.4f}" for name, value in self.scores.items()}),
                "",
                f"Logits are divided by the temperature {self.temperature:.4f}, which was fitted on the validation "
                "rows; the probabilities are those after that. Test rows were used for nothing but these figures and "
                "the choice between registered versions.",
                "",
                "## Limits",
                "",
                f"Knows the {len(self.label_names)} classes of {self.source} and gives an image of anything else to "
                "one of them. Images have to be of the size of the data set and look like it: other cameras, crops or "
                "resolutions were not tested. No claim is made of people, of safety or of medicine.",
                "",
                "## How it was made",
                "",
                f"{self.epochs} epochs on {self.num_workers} workers, {self.images_per_second:.0f} images/s.",
                "",
                *_table(self.about),
                "",
                *_table({f"{part}.{name}": str(v) for part, values in tables.items() for name, v in values.items()}),
                "",
                "## Licence",
                "",
                "Code and weights: Apache-2.0. The data have their own terms, above.",
                "",
            ]
        )


def _table(values: Mapping[str, Any]) -> list[str]:
    cells = [(name, str(value).replace("|", "\\|").replace("\n", " ")) for name, value in values.items()]
    return ["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]
