"""What a metric says about a candidate, and what computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Outputs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class MetricResult:
    """What a metric says about a candidate.

    Attributes:
        name: Name of the metric.
        baseline: The original's value. Without labels what a perfect copy of the original has.
        candidate: The candidate's value.
        drop: How much worse the candidate is, in the metric's own unit; negative when it is better.
        low: Lower end of the 95% bootstrap interval of the drop; -inf when it could not be had.
        high: Upper end; inf when it could not be had.
        samples: Number of samples.
        labelled: Whether labels were used.
    """

    name: str
    baseline: float
    candidate: float
    drop: float
    low: float
    high: float
    samples: int
    labelled: bool

    def within(self, max_drop: float) -> bool:
        """Whether the drop is within a budget. A drop that is no number is not."""
        return self.drop <= max_drop

    def is_certain(self, max_drop: float) -> bool:
        """Whether the whole interval lies on the same side of the budget as the drop."""
        return self.high <= max_drop if self.within(max_drop) else self.low > max_drop

    def sentence(self) -> str:
        """Return the result in words."""
        against = "against labels" if self.labelled else "against the original"
        return (
            f"{self.name} {self.baseline:.4g} to {self.candidate:.4g}, a drop of {self.drop:.4g} "
            f"(95% interval {self.low:.4g} to {self.high:.4g}) on {self.samples} samples {against}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """The original's value, the candidate's, the drop and the ends of its interval."""

    baseline: float
    candidate: float
    drop: float
    low: float
    high: float


class Score(Protocol):
    """Takes in sample after sample and ends with the result."""

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""

    def result(self, seed: int) -> Figures:
        """Return the metric of both models over all samples."""
