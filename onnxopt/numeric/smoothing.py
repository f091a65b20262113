"""Moving the spread of an activation's channels into the weight that they are multiplied by.

x @ W = (x / s) @ (s * W) for any positive factors s, one per channel of x. Where x is quantized with one scale for all
channels, and W with one per column, factors that shrink the largest channels of x shrink the error. They are those of
SmoothQuant (Xiao et al., 2022): s = max|x|^alpha / max|W|^(1 - alpha).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LEVELS = 127
"""The largest integer of a weight."""
STEPS = 255
"""Distance between the ends of an activation's range in steps."""
LARGEST_FACTOR = 1e4
"""Factors stay between its inverse and it, so that no weight leaves its type."""


class ChannelSamples:
    """Observes an activation: the range of each channel in some samples, and some rows of each.

    A channel is an index of the last axis, a row everything else. Memory is bounded by `samples` times `rows` rows and
    does not grow with what is observed; which samples and rows are kept is drawn at random.
    """

    def __init__(self, samples: int, rows: int, seed: int) -> None:
        """Keep this many samples, and rows of each.

        Args:
            samples: At most so many samples, at least 1.
            rows: At most so many rows of a sample, at least 1.
            seed: Of the draw.
        """
        self._samples, self._rows = samples, rows
        self._random = np.random.default_rng(seed)
        self._kept: list[tuple[Array, Array, Array]] = []
        self._seen = 0
        self._finite = True

    def add(self, array: Array) -> None:
        """Take in the activation of one sample."""
        if array.ndim == 0 or not array.size:
            return
        flat = array.reshape(-1, array.shape[-1])
        low, high = flat.min(axis=0), flat.max(axis=0)
        self._finite &= bool(np.isfinite(low).all() and np.isfinite(high).all())
        # Algorithm R: every sample is kept with the same probability.
        place = self._seen if self._seen < self._samples else int(self._random.integers(self._seen + 1))
        self._seen += 1
        if place >= self._samples:
            return
        chosen = self._random.choice(len(flat), min(self._rows, len(flat)), replace=False)
        kept = (low, high, flat[np.sort(chosen)])
        if place == len(self._kept):
            self._kept.append(kept)
        else:
            self._kept[place] = kept

    def activation(self) -> Activation | None:
        """Return what was seen; None when nothing was, or when it held NaN or infinity."""
        if not self._kept or not self._finite:
            return None
        lows, highs, rows = zip(*self._kept, strict=True)
        owners = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
        return Activation(np.stack(lows), np.stack(highs), np.concatenate(rows), owners)


@dataclasses.dataclass(frozen=True, slots=True)
class Activation:
    """What is known about an activation of K channels.

    Attributes:
        low: Smallest value of each channel in each sample, samples x K.
        high: Largest value.
        rows: Rows of the samples, n x K.
        owners: Which sample each row is of.
    """

    low: Array
    high: Array
    rows: Array
    owners: Array

    @property
    def magnitude(self) -> Array:
        """The largest magnitude of each channel in a sample, as a mean over the samples."""
        return np.asarray(np.maximum(-self.low, self.high).mean(axis=0, dtype=np.float64))

    def part(self, samples: Array) -> Activation:
        """Return what is known from some of the samples, given by their numbers."""
        chosen = np.isin(self.owners, samples)
        number = np.zeros(len(self.low), np.intp)
        number[samples] = np.arange(len(samples))
        return Activation(self.low[samples], self.high[samples], self.rows[chosen], number[self.owners[chosen]])

    def folds(self) -> tuple[tuple[Activation, Activation], ...]:
        """Return pairs of what to learn from and what to judge by: each half of the samples once as either."""
        if len(self.low) < 2:
            return ((self, self),)
        even, odd = (self.part(np.arange(start, len(self.low), 2)) for start in (0, 1))
        return (even, odd), (odd, even)


def factors(magnitude: Array, weight: Array, alpha: float) -> Array:
    """Return SmoothQuant's factors s, with a geometric mean of 1; x is to be divided by them.

    Args:
        magnitude: Of each channel of the activation, K of them.
        weight: Largest magnitude of each row of the weight, K of them.
        alpha: 0 evens out the rows of the weight, 1 the channels of the activation.

    Returns:
        Float64. A channel that is always zero, or whose weights are, keeps the factor 1.
    """
    used = (magnitude > 0) & (weight > 0)
    s = np.ones(len(magnitude))
    if not used.any():
        return s
    logs = alpha * np.log(magnitude[used].astype(np.float64)) - (1 - alpha) * np.log(weight[used].astype(np.float64))
    s[used] = np.clip(np.exp(logs - logs.mean()), 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return s


def product_error(activation: Activation, weight: Array, s: Array | None = None) -> float:
    """Return the error of a product of 8-bit integers relative to the product, as a ratio of root mean squares.

    The activation is quantized as ONNX DynamicQuantizeLinear does, with a range per sample; the weight symmetrically,
    with a scale per column.

    Args:
        activation: What is known about it.
        weight: K x N.
        s: Factors that move from the activation into the weight; None for none.

    Returns:
        0 for no error. 0 also where the product is zero.
    """
    rows, low, high = activation.rows, activation.low, activation.high
    exact = rows @ weight
    if s is not None:
        inverse = (1 / s).astype(np.float32)
        rows, low, high, weight = rows * inverse, low * inverse, high * inverse, weight * s.astype(np.float32)[:, None]
    bottom, top = np.minimum(low.min(axis=1), 0), np.maximum(high.max(axis=1), 0)
    scale = np.maximum((top - bottom) / STEPS, np.finfo(np.float32).tiny)
    zero = np.rint(np.clip(-bottom / scale, 0, STEPS))
    scale, zero = scale[activation.owners, None], zero[activation.owners, None]
    quantized = (np.clip(np.rint(rows / scale) + zero, 0, STEPS) - zero) * scale
    steps = np.maximum(np.abs(weight).max(axis=0) / LEVELS, np.finfo(np.float32).tiny)
    error = quantized @ (np.rint(weight / steps) * steps) - exact
    power = float(np.square(exact, dtype=np.float64).mean())
    return float(np.sqrt(np.square(error, dtype=np.float64).mean() / power)) if power else 0.0


def expected_error(activation: Activation, weights: Sequence[Array], alpha: float | None) -> float:
    """Return the error that factors learnt from some samples leave on others, as a mean over weights.

    Args:
        activation: What is known about it.
        weights: One or more of K x N that it is multiplied by.
        alpha: See `factors`; None for no factors.
    """
    largest = largest_of_rows(weights)
    errors = []
    for learnt, judged in activation.folds():
        s = None if alpha is None else factors(learnt.magnitude, largest, alpha)
        errors += [product_error(judged, weight, s) for weight in weights]
    return float(np.mean(errors))


def largest_of_rows(weights: Sequence[Array]) -> Array:
    """Return the largest magnitude in each row of several weights."""
    return np.asarray(np.max([np.abs(w).max(axis=1, initial=0.0) for w in weights], axis=0))
