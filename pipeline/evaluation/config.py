"""Settings of the evaluation."""

from dataclasses import dataclass

from pipeline.fields import require


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of a trained model besides its accuracy."""

    calibration_bins: int = 15
    """Number of bins of the calibration error, of equal width over the confidences from 0 to 1."""
    corruption_rows: int = 1000
    """Number of test rows on which robustness is measured; 0 turns it off."""
    corruption_severities: tuple[int, ...] = (1, 3, 5)
    """Severities of every corruption, 1 to 5."""
    confident_mistakes: int = 24
    """How many of the most confident mistakes are kept with their images."""
    latency_calls: int = 100
    """Number of timed calls with one image."""
    seed: int = 0
    """Seed of the choice of rows for the corruptions and of their noise."""

    def __post_init__(self) -> None:
        for name, least in (("calibration_bins", 1), ("latency_calls", 1), ("corruption_rows", 0)):
            value = getattr(self, name)
            require(value >= least, f"evaluation.{name}", value, f"give at least {least}")
        require(
            self.confident_mistakes >= 0, "evaluation.confident_mistakes", self.confident_mistakes, "give 0 or more"
        )
        severities = self.corruption_severities
        right = severities and all(1 <= severity <= 5 for severity in severities)
        require(bool(right), "evaluation.corruption_severities", severities, "give some of 1 2 3 4 5")
        require(0 <= self.seed < 2**31, "evaluation.seed", self.seed, "give a number in [0, 2**31)")
