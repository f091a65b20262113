"""Do the inputs that were learnt from look like those that judge?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from onnxopt.feeds import Feed

CONFIDENCE = 1e-3
"""How rarely inputs that are alike are called unlike, all comparisons together."""

MOST_SAMPLES = 256
"""Of each side, no more are looked at."""

_FEATURES = ("size", "mean", "standard deviation", "smallest element", "largest element")


def unlike(learnt: Iterable[Feed], judging: Iterable[Feed]) -> list[str]:
    """Return a sentence for every input whose values differ more than chance explains.

    Size, mean, spread and extremes of each sample are compared between both sides by the Kolmogorov-Smirnov
    statistic; of a single sample on one side nothing can be told.

    Args:
        learnt: Samples that passes learnt from.
        judging: Samples that judged.
    """
    one, two = _features(learnt), _features(judging)
    inputs = [name for name in one if name in two]
    found = []
    for name in inputs:
        first, second = one[name], two[name]
        limit = _limit(len(first), len(second), CONFIDENCE / (len(inputs) * len(_FEATURES)))
        gaps = [_distance(first[:, i], second[:, i]) for i in range(len(_FEATURES))]
        worst = int(np.argmax(gaps))
        if gaps[worst] > limit:
            found.append(
                f'What was learnt from looks unlike what judged: the {_FEATURES[worst]} of the input "{name}" is '
                f"{np.median(first[:, worst]):.4g} in the median against {np.median(second[:, worst]):.4g}."
            )
    return found


def _features(samples: Iterable[Feed]) -> dict[str, np.ndarray]:
    """Return per input one row of features for each sample."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for number, feed in enumerate(samples):
        if number >= MOST_SAMPLES:
            break
        for name, value in feed.items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size:
                numbers = value.astype(np.float64)
                extremes = float(numbers.min()), float(numbers.max())
                rows.setdefault(name, []).append((value.size, float(numbers.mean()), float(numbers.std()), *extremes))
    return {name: np.array(found) for name, found in rows.items()}


def _limit(one: int, two: int, confidence: float) -> float:
    """Return the largest statistic that chance explains."""
    return math.sqrt(-math.log(confidence / 2) / 2 * (one + two) / (one * two))


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    """Return the largest distance between the two distribution functions."""
    places = np.concatenate([one, two])
    first = np.searchsorted(np.sort(one), places, side="right") / len(one)
    second = np.searchsorted(np.sort(two), places, side="right") / len(two)
    return float(np.abs(first - second).max())
