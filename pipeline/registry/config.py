"""Settings of the promotion of a registered version to champion."""

from dataclasses import dataclass

from pipeline.fields import require


@dataclass(frozen=True)
class PromotionConfig:
    """When a new version of the registered model becomes the champion."""

    min_gain: float = 0.0
    """Gain in top-1 accuracy over the champion that a new version has to exceed."""
    confidence: float = 0.95
    """Share of the bootstrap samples of the test rows in which the new version has to exceed that gain."""
    max_calibration_error: float = 0.1
    """Largest expected calibration error on the test rows, after temperature scaling."""
    max_latency_ms: float = 250.0
    """Longest median time to classify one image, in milliseconds."""

    def __post_init__(self) -> None:
        for name, valid, remedy in (
            ("min_gain", 0 <= self.min_gain < 1, "give 0 or more, below 1"),
            ("confidence", 0.5 <= self.confidence < 1, "give 0.5 or more, below 1"),
            ("max_calibration_error", 0 < self.max_calibration_error <= 1, "give a share above 0, at most 1"),
            ("max_latency_ms", self.max_latency_ms > 0, "give a positive number"),
        ):
            require(valid, f"promotion.{name}", getattr(self, name), remedy)
