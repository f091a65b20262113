"""95% intervals of drops, by resampling and by counting rare events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from onnxopt.metrics.result import Figures

RESAMPLES = 2000

RESAMPLED_ELEMENTS = 1 << 20
"""Elements drawn at a time."""

RESAMPLING_SECONDS = 3.0
"""Time for resampling a metric that must be computed again for every resample."""

FEWEST_RESAMPLES = 20
"""With fewer than this there is no interval."""

RARE = (3.0, 4.74, 6.3, 7.75, 9.15, 10.51, 11.84, 13.15, 14.43, 15.71, 16.96)
"""With 95% confidence, no more events than this were to be expected where 0, 1, 2 ... were seen."""

FEW = {2: 9.2, 3: 2.7, 4: 1.9}
"""By how much the interval from so few samples is widened."""


def bootstrap_mean(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the ends of the interval of a mean; samples are drawn again."""
    rng = np.random.default_rng(seed)
    at_once = max(1, RESAMPLED_ELEMENTS // len(values))
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = [values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    return widened(np.concatenate(means), float(values.mean()), len(values))


def bootstrap_ratio(errors: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the ends of the interval of the sum of errors by the sum of sizes; samples are drawn again."""
    rng = np.random.default_rng(seed)
    at_once = max(1, RESAMPLED_ELEMENTS // len(errors))
    ratios = []
    for start in range(0, RESAMPLES, at_once):
        chosen = rng.integers(len(errors), size=(min(at_once, RESAMPLES - start), len(errors)))
        ratios.append(errors[chosen].sum(axis=1) / np.maximum(sizes[chosen].sum(axis=1), 1))
    return widened(np.concatenate(ratios), float(errors.sum() / max(sizes.sum(), 1)), len(errors))


def widened(resampled: list[float] | np.ndarray, found: float, samples: int) -> tuple[float, float]:
    """Return the middle 95% of resampled values, widened as Student's t is for few samples."""
    if samples < 2:
        return -math.inf, math.inf
    # of few samples the same one can be drawn again and again, which leaves nothing to correlate
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    factor = FEW.get(samples, 1 + 2.2 / (samples - 1))
    return found - max(0.0, found - float(low)) * factor, found + max(0.0, float(high) - found) * factor


def resampled_drop(
    both: Callable[[np.ndarray], tuple[float, float]], samples: int, seed: int, *, sign: float
) -> Figures:
    """Compute a metric of both models on all samples, and again on samples drawn anew while the time lasts."""
    start = time.perf_counter()
    before, after = both(np.arange(samples))
    took = time.perf_counter() - start
    times = min(RESAMPLES, int(RESAMPLING_SECONDS / max(took, 1e-9)))
    drop = sign * (before - after)
    if times < FEWEST_RESAMPLES:
        return Figures(before, after, drop, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    drops = []
    for _ in range(times):
        one, two = both(rng.integers(samples, size=samples))
        drops.append(sign * (one - two))
    return Figures(before, after, drop, *widened(drops, drop, samples))


def most(losses: np.ndarray, gains: np.ndarray, samples: int, smallest: float) -> float:
    """Return the largest mean loss that goes with the number of losses seen, at 95% confidence.

    Losses are counted as rare events (Poisson); of losses never seen, one position each is assumed.
    """
    count = len(losses)
    if count >= len(RARE):
        return -math.inf
    size = float(losses.mean()) if count else smallest
    return min(1.0, (RARE[count] * size - float(gains.sum())) / samples)
