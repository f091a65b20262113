"""Metrics on real samples: how much worse is a model at its task than the original?

With labels the metric of both models is taken and the drop is their difference, sample by sample. Without labels
the original's outputs take the place of the labels. Built-in metrics look at the first floating-point output:

    top1      Share of positions whose largest class (last axis) is the label, or the original's.
    cosine    Mean cosine between the output of a sample and its label vector, or the original's output.
    mse       Mean squared difference from the label, or from the original's output. Lower is better.
    spearman  Rank correlation over samples. With labels: between the one number a sample has for an output, and
              its label. Without: between the candidate's and the original's numbers; and where outputs are
              vectors, between the cosine similarities of all pairs of samples (of the first 256), which is what
              searches by similarity rank by.

`module:function` names a function of (outputs, labels), where outputs holds a dict of arrays per sample and labels
an array or None. It returns a number; higher is better unless it has an attribute `higher_is_better = False`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import model as models
from onnxopt.analysis import task
from onnxopt.compare.deviation import kind_of, nbytes
from onnxopt.errors import DataError, UsageError
from onnxopt.feeds import Data, Feed
from onnxopt.registry import nearest
from onnxopt.runtime import RunOptions, Session, open_session

RESAMPLES = 2000

RESAMPLED_ELEMENTS = 1 << 20
"""Elements drawn at a time."""

RESAMPLING_SECONDS = 3.0
"""Time for resampling a metric that must be computed again for every resample."""

FEWEST_RESAMPLES = 20
"""With fewer than this there is no interval."""

MOST_PAIRED = 256
"""Samples compared in pairs at most: pairs grow with the square."""

KEPT_BYTES = 2 << 30
"""Outputs that a metric has to hold at once may take up this much."""

IGNORED = -1
"""Labels of this value or below, such as -100, mark positions that do not count for top1."""

RARE = (3.0, 4.74, 6.3, 7.75, 9.15, 10.51, 11.84, 13.15, 14.43, 15.71, 16.96)
"""With 95% confidence, no more events than this were to be expected where 0, 1, 2 ... were seen."""

FEW = {2: 9.2, 3: 2.7, 4: 1.9}
"""By how much the interval from so few samples is widened."""

Outputs = Mapping[str, Any]
Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


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
class _Figures:
    """The original's value, the candidate's, the drop and the ends of its interval."""

    baseline: float
    candidate: float
    drop: float
    low: float
    high: float


class _Score(Protocol):
    """Takes in sample after sample and ends with the result."""

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""

    def result(self, seed: int) -> _Figures:
        """Return the metric of both models over all samples."""


def choose(model: ir.Model, labels: np.ndarray | None) -> tuple[str, str]:
    """Return the metric that fits a model, and why.

    Raises:
        DataError: If no built-in metric does.
    """
    if task.main_output(model) is None:
        names = ", ".join(v.name or "" for v in model.graph.outputs)
        raise DataError(
            f"No built-in metric fits the model, which has no floating-point output ({names}); name a function with "
            "--metric module:function."
        )
    if labels is not None and labels.dtype.kind in "iub":
        return "top1", "the labels are whole numbers"
    scores = task.class_scores(model)
    if scores is not None and labels is None:
        return "top1", f"the main output comes from {scores}, as scores of classes do"
    if labels is not None:
        return "cosine", "the labels are no whole numbers"
    return "cosine", "the main output holds no scores of classes"


def evaluate(
    reference: Source,
    candidate: Source,
    data: Data | Sequence[Feed],
    labels: np.ndarray | None,
    metric: str = "top1",
    options: RunOptions | None = None,
    *,
    seed: int = 0,
) -> MetricResult:
    """Run both models over data and compare them by a metric.

    Samples are streamed: memory does not grow with their number, except for "spearman" and custom functions.

    Args:
        reference: The original: a path, an ONNX proto or an `onnx_ir` model.
        candidate: The model to judge.
        data: The samples.
        labels: One entry per sample along the first axis (per row of a fixed batch). None judges by the original's
            outputs.
        metric: "top1", "cosine", "mse", "spearman" or "module:function".
        options: Provider, threads and custom operators to run with.
        seed: Seeds the bootstrap.

    Returns:
        The metric of both, the drop and its interval.

    Raises:
        UsageError: If there is no such metric.
        DataError: If labels or outputs do not fit the metric, or there are no samples.
        RuntimeFailure: If a model does not run.
    """
    return Evaluator(reference, data, labels, metric, options, seed=seed, kept_bytes=0).evaluate(candidate)


def compare(
    reference: Sequence[Outputs],
    candidate: Sequence[Outputs],
    labels: np.ndarray | None,
    metric: str = "top1",
    *,
    seed: int = 0,
) -> MetricResult:
    """Compare outputs that are at hand; see `evaluate`.

    Args:
        reference: The original's outputs by name, for each sample.
        candidate: The candidate's.
        labels: One entry per sample, or None.
        metric: Name of the metric.
        seed: Seeds the bootstrap.

    Raises:
        UsageError: If there is no such metric.
        DataError: If labels or outputs do not fit the metric, or there are no samples.
    """
    pairs = zip(reference, candidate, strict=True)
    return _scored(pairs, _labels(labels, len(reference)), metric, seed, labelled=labels is not None)


def _scored(
    pairs: Iterable[tuple[Outputs, Outputs]],
    labels: Iterable[np.ndarray | None],
    metric: str,
    seed: int,
    *,
    labelled: bool,
) -> MetricResult:
    score = _score(metric)
    samples = 0
    for outputs, label in zip(pairs, labels, strict=False):
        score.add(*outputs, label)
        samples += 1
    if samples == 0:
        raise DataError(f"There are no samples to compute {metric} on.")
    found = score.result(seed)
    return MetricResult(
        metric,
        found.baseline,
        found.candidate,
        found.drop,
        found.low,
        found.high,
        samples=samples,
        labelled=labelled,
    )


class Evaluator:
    """Compares candidates with one original, whose outputs are computed once and kept as far as memory allows."""

    def __init__(
        self,
        reference: Source,
        data: Data | Sequence[Feed],
        labels: np.ndarray | None,
        metric: str = "top1",
        options: RunOptions | None = None,
        *,
        seed: int = 0,
        kept_bytes: int = KEPT_BYTES // 2,
    ) -> None:
        """Prepare to compare; nothing is run yet.

        Args:
            reference: The original; see `evaluate` for this and the other arguments.
            data: The samples.
            labels: One entry per sample, or None.
            metric: Name of the metric.
            options: How to run the models.
            seed: Seeds the bootstrap.
            kept_bytes: Outputs of the original up to this size are kept; those of further samples are computed anew
                for every candidate.

        Raises:
            UsageError: If there is no such metric.
        """
        _score(metric)
        self._reference = models.load(reference)
        self._data, self._labels, self._metric = data, labels, metric
        self._options, self._seed = options, seed
        self._room = kept_bytes
        self._kept: list[Outputs] = []

    def evaluate(self, candidate: Source) -> MetricResult:
        """Run a candidate over the data and compare it with the original.

        Raises:
            DataError: If labels or outputs do not fit the metric, or there are no samples.
            RuntimeFailure: If a model does not run.
        """
        pairs = self._pairs(models.load(candidate))
        labels = _labels(self._labels, len(self._data))
        return _scored(pairs, labels, self._metric, self._seed, labelled=self._labels is not None)

    def _pairs(self, candidate: ir.Model) -> Iterator[tuple[Outputs, Outputs]]:
        """Yield the outputs of both models, sample by sample."""
        with contextlib.ExitStack() as stack:
            two = stack.enter_context(open_session(candidate, self._options, optimized=True))
            one: Session | None = None
            for number, feed in enumerate(self._data):
                if number < len(self._kept):
                    reference = self._kept[number]
                else:
                    if one is None:
                        one = stack.enter_context(open_session(self._reference, self._options, optimized=True))
                    reference = one.run(feed)
                    self._keep(number, reference)
                yield reference, two.run(feed)

    def _keep(self, number: int, outputs: Outputs) -> None:
        needed = outputs if ":" in self._metric else _without_others(outputs)
        size = sum(nbytes(value) for value in needed.values())
        if number == len(self._kept) and size <= self._room:
            self._kept.append(needed)
            self._room -= size


def _without_others(outputs: Outputs) -> Outputs:
    """Return the main output alone, or all when there is none."""
    for name, value in outputs.items():
        if isinstance(value, np.ndarray) and kind_of(value.dtype) == "float":
            return {name: value}
    return outputs


def _labels(labels: np.ndarray | None, samples: int) -> Iterable[np.ndarray | None]:
    """Return the label of each sample; a model of a fixed batch size takes several labels at a time.

    Raises:
        DataError: If there are too few or too many.
    """
    if labels is None:
        return itertools.repeat(None)
    if len(labels) == samples:
        return (np.asarray(label) for label in labels)
    batch = len(labels) // max(samples, 1)
    if batch < 1 or len(labels) - batch * samples >= batch:
        raise DataError(
            f"There are {len(labels)} labels for {samples} samples; give one label per sample, in their order."
        )
    return (labels[start : start + batch] for start in range(0, batch * samples, batch))


def _score(metric: str) -> _Score:
    """Return what computes the metric.

    Raises:
        UsageError: If there is no such metric.
    """
    builtin: dict[str, Callable[[], _Score]] = {
        "top1": _Top1,
        "cosine": lambda: _Mean(_cosine, higher_is_better=True),
        "mse": lambda: _Mean(_squared_error, higher_is_better=False),
        "spearman": _Spearman,
    }
    if metric in builtin:
        return builtin[metric]()
    if ":" in metric:
        return _Custom(metric, _function(metric))
    raise UsageError(
        f'There is no metric "{metric}".{nearest(metric, list(builtin))} Choose one of {", ".join(builtin)}, '
        "or module:function."
    )


def _function(metric: str) -> Callable[..., float]:
    """Import the function that a metric names; the current folder is searched first.

    Raises:
        UsageError: If it cannot be imported or is no function.
    """
    module, _, name = metric.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"The metric {metric} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UsageError(f"The metric {metric} is no function but a {type(found).__name__}.")
    return found  # type: ignore[no-any-return]


_PerSample = Callable[[np.ndarray, np.ndarray], float]
"""Compares one output with what it should be."""


class _Mean:
    """A metric that is the mean of one number per sample; the target is the label or the original's output."""

    def __init__(self, per_sample: _PerSample, *, higher_is_better: bool) -> None:
        self._per_sample = per_sample
        self._sign = 1.0 if higher_is_better else -1.0
        self._pairs: list[tuple[float, float]] = []

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        one, two = main_output(reference), main_output(candidate)
        target = one if label is None else label
        self._pairs.append((self._per_sample(one, target), self._per_sample(two, target)))

    def result(self, seed: int) -> _Figures:
        """Return the means and the drop, paired by sample."""
        pairs = np.array(self._pairs)
        drops = self._sign * (pairs[:, 0] - pairs[:, 1])
        before, after = pairs.mean(axis=0)
        return _Figures(float(before), float(after), float(drops.mean()), *_bootstrap_mean(drops, seed))


class _Top1(_Mean):
    """The share of positions with the right class."""

    def __init__(self) -> None:
        super().__init__(_share_right, higher_is_better=True)
        self._positions = 0

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        found = classes(main_output(reference))
        label = found if label is None else label
        self._positions += max(1, int(np.count_nonzero(label > IGNORED)) if label.dtype.kind in "iuf" else found.size)
        super().add(reference, candidate, label)

    def result(self, seed: int) -> _Figures:
        """Return the shares. The interval also holds what the number of samples that differ allows.

        Resampling knows of no loss that was not seen, and takes a rare one for rarer than it may be.
        """
        found = super().result(seed)
        pairs = np.array(self._pairs)
        drops = pairs[:, 0] - pairs[:, 1]
        losses, gains = drops[drops > 0], -drops[drops < 0]
        smallest = len(drops) / self._positions
        return dataclasses.replace(
            found,
            low=min(found.low, -_most(gains, losses, len(drops), smallest)),
            high=max(found.high, _most(losses, gains, len(drops), smallest)),
        )


def _most(losses: np.ndarray, gains: np.ndarray, samples: int, smallest: float) -> float:
    """Return the largest mean loss that goes with the number of losses seen, at 95% confidence.

    Losses are counted as rare events (Poisson); of losses never seen, one position each is assumed.
    """
    count = len(losses)
    if count >= len(RARE):
        return -math.inf
    size = float(losses.mean()) if count else smallest
    return min(1.0, (RARE[count] * size - float(gains.sum())) / samples)


class _Spearman:
    """A rank correlation over samples, or over pairs of samples."""

    def __init__(self) -> None:
        self._sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self._labels: list[float] = []
        self._bytes = 0

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        one, two = main_output(reference), main_output(candidate)
        if label is not None:
            if one.size != 1 or label.size != 1:
                raise DataError(
                    f"spearman with labels needs one number per sample and label; an output has {one.size} "
                    f"elements and a label {label.size}."
                )
            self._labels.append(float(label.reshape(())))
        elif one.size > 1 and len(self._sides[0]) >= MOST_PAIRED:
            return
        self._bytes = _checked(self._bytes + one.nbytes + two.nbytes, "spearman")
        self._sides[0].append(one)
        self._sides[1].append(two)

    def result(self, seed: int) -> _Figures:
        """Return the correlations; samples are drawn again for the interval."""
        if len(self._sides[0]) < 3:
            raise DataError(f"spearman needs three samples at least, and there are {len(self._sides[0])}.")
        one, two = (_columns(side) for side in self._sides)
        if self._labels:
            labels = np.array(self._labels)
            before, after = one.reshape(-1), two.reshape(-1)

            def correlate(chosen: np.ndarray) -> tuple[float, float]:
                return spearman(before[chosen], labels[chosen]), spearman(after[chosen], labels[chosen])

        elif one.shape[1] == 1:
            before, after = one.reshape(-1), two.reshape(-1)

            def correlate(chosen: np.ndarray) -> tuple[float, float]:
                return 1.0, spearman(after[chosen], before[chosen])

        else:
            near, nearby = _similarities(one), _similarities(two)

            def correlate(chosen: np.ndarray) -> tuple[float, float]:
                first, second = np.triu_indices(len(chosen), 1)
                pairs = chosen[first], chosen[second]
                different = pairs[0] != pairs[1]
                rows, columns = pairs[0][different], pairs[1][different]
                return 1.0, spearman(nearby[rows, columns], near[rows, columns])

        return _resampled(correlate, len(one), seed, sign=1.0)


class _Custom:
    """A function of all outputs and labels."""

    def __init__(self, name: str, function: Callable[..., float]) -> None:
        self._name, self._function = name, function
        self._sign = 1.0 if getattr(function, "higher_is_better", True) else -1.0
        self._sides: tuple[list[Outputs], list[Outputs]] = ([], [])
        self._labels: list[np.ndarray] | None = []
        self._bytes = 0

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        size = sum(nbytes(value) for outputs in (reference, candidate) for value in outputs.values())
        self._bytes = _checked(self._bytes + size, self._name)
        self._sides[0].append(reference)
        self._sides[1].append(candidate)
        if label is None:
            self._labels = None
        elif self._labels is not None:
            self._labels.append(label)

    def result(self, seed: int) -> _Figures:
        """Return the function's values; it is called again on samples drawn anew for the interval."""

        def both(chosen: np.ndarray) -> tuple[float, float]:
            labels = None if self._labels is None else np.array([self._labels[i] for i in chosen])
            one, two = ([side[i] for i in chosen] for side in self._sides)
            return self._call(one, labels), self._call(two, labels)

        return _resampled(both, len(self._sides[0]), seed, sign=self._sign)

    def _call(self, outputs: list[Outputs], labels: np.ndarray | None) -> float:
        value = self._function(outputs, labels)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The metric {self._name} returned {type(value).__name__} where a number is expected."
            ) from error


def main_output(outputs: Outputs) -> np.ndarray:
    """Return the first floating-point output as float64.

    Raises:
        DataError: If there is none.
    """
    for value in outputs.values():
        if isinstance(value, np.ndarray) and kind_of(value.dtype) == "float":
            return value.astype(np.float64)
    raise DataError(
        f"The metric needs a floating-point output, and the model has none; its outputs are {', '.join(outputs)}."
    )


def classes(scores: np.ndarray) -> np.ndarray:
    """Return the positions of the largest scores along the last axis.

    Raises:
        DataError: If the last axis does not hold classes.
    """
    if scores.ndim == 0 or scores.shape[-1] < 2:
        raise DataError(
            f"top1 needs an output with the classes along its last axis, and the model's has the shape "
            f"{list(scores.shape)}."
        )
    found: np.ndarray = np.argmax(scores, axis=-1)
    return found


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Return the rank correlation of two flat arrays, ties ranked by their mean.

    It is 0 where one of them is constant, and NaN where there are fewer than two elements.
    """
    if one.size < 2:
        return math.nan
    first, second = _ranks(one), _ranks(two)
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return ranks


def _share_right(scores: np.ndarray, label: np.ndarray) -> float:
    found = classes(scores)
    if label.size != found.size:
        raise DataError(
            f"A label has {label.size} elements where the output, of shape {list(scores.shape)}, has {found.size} "
            "positions to classify."
        )
    if label.dtype.kind not in "iub" and not np.array_equal(label, np.floor(label)):
        raise DataError("top1 needs whole numbers as labels, the positions of the right classes.")
    label = label.reshape(-1)
    counts = label > IGNORED
    return float(np.mean(found.reshape(-1)[counts] == label[counts])) if counts.any() else 1.0


def _cosine(output: np.ndarray, target: np.ndarray) -> float:
    one, two = _alike("cosine", output, target)
    norm = math.sqrt(float(one @ one)) * math.sqrt(float(two @ two))
    return float(one @ two) / norm if norm else float(not one.any() and not two.any())


def _squared_error(output: np.ndarray, target: np.ndarray) -> float:
    one, two = _alike("mse", output, target)
    return float(np.mean(np.square(one - two)))


def _alike(metric: str, output: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as flat float64 arrays.

    Raises:
        DataError: If they have not the same number of elements.
    """
    if output.size != target.size or target.dtype.kind not in "fiub":
        raise DataError(
            f"{metric} compares the output with a label of as many numbers; the output has the shape "
            f"{list(output.shape)} and the label {list(target.shape)} ({target.dtype})."
        )
    return output.reshape(-1), target.reshape(-1).astype(np.float64)


def _columns(vectors: list[np.ndarray]) -> np.ndarray:
    """Return one row per sample; outputs that differ in length only are averaged over it.

    Raises:
        DataError: If the outputs differ in another way.
    """
    if len({v.size for v in vectors}) > 1:
        if any(v.ndim < 3 for v in vectors) or len({(v.shape[0], v.shape[-1]) for v in vectors}) > 1:
            raise DataError("spearman needs outputs of one size; give samples of one shape.")
        vectors = [v.mean(axis=tuple(range(1, v.ndim - 1))) for v in vectors]
    return np.stack([v.reshape(-1) for v in vectors])


def _similarities(vectors: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of all pairs of rows."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1.0)
    return unit @ unit.T


def _checked(size: int, metric: str) -> int:
    if size > KEPT_BYTES:
        raise DataError(
            f"{metric} has to hold all outputs at once, and they take up more than {KEPT_BYTES >> 30} GB; give "
            "fewer samples."
        )
    return size


def _bootstrap_mean(values: np.ndarray, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    at_once = max(1, RESAMPLED_ELEMENTS // len(values))
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = [values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    return _widened(np.concatenate(means), float(values.mean()), len(values))


def _widened(resampled: list[float] | np.ndarray, found: float, samples: int) -> tuple[float, float]:
    """Return the middle 95% of resampled values, widened as Student's t is for few samples."""
    if samples < 2:
        return -math.inf, math.inf
    # of few samples the same one can be drawn again and again, which leaves nothing to correlate
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    factor = FEW.get(samples, 1 + 2.2 / (samples - 1))
    return found - max(0.0, found - float(low)) * factor, found + max(0.0, float(high) - found) * factor


def _resampled(both: Callable[[np.ndarray], tuple[float, float]], samples: int, seed: int, *, sign: float) -> _Figures:
    """Compute a metric of both models on all samples, and again on samples drawn anew while the time lasts."""
    start = time.perf_counter()
    before, after = both(np.arange(samples))
    took = time.perf_counter() - start
    times = min(RESAMPLES, int(RESAMPLING_SECONDS / max(took, 1e-9)))
    drop = sign * (before - after)
    if times < FEWEST_RESAMPLES:
        return _Figures(before, after, drop, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    drops = []
    for _ in range(times):
        one, two = both(rng.integers(samples, size=samples))
        drops.append(sign * (one - two))
    return _Figures(before, after, drop, *_widened(drops, drop, samples))
