"""Runs the original and candidates over data, and compares them by a metric."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import model as models
from onnxopt.compare.deviation import kind_of, nbytes
from onnxopt.errors import DataError, UsageError
from onnxopt.feeds import Data, Feed
from onnxopt.metrics.custom import Custom, imported
from onnxopt.metrics.means import Mean, Top1, cosine, squared_error
from onnxopt.metrics.outputs import KEPT_BYTES
from onnxopt.metrics.ranks import Spearman
from onnxopt.metrics.result import MetricResult, Outputs, Score
from onnxopt.metrics.sequences import Sequences
from onnxopt.registry import nearest
from onnxopt.runtime import RunOptions, open_session
from onnxopt.session.loaded import Session

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


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
        metric: "top1", "ctc", "cosine", "mse", "spearman" or "module:function".
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
    batch = labels_per_sample(labels, samples)
    return (labels[start : start + batch] for start in range(0, batch * samples, batch))


def labels_per_sample(labels: np.ndarray, samples: int) -> int:
    """Return how many labels each sample has: several where a model has a fixed batch size.

    Args:
        labels: All labels, in the order of the samples.
        samples: How many samples there are.

    Raises:
        DataError: If there are too few labels or too many.
    """
    batch = len(labels) // max(samples, 1)
    if batch < 1 or len(labels) - batch * samples >= batch:
        raise DataError(
            f"There are {len(labels)} labels for {samples} samples; give one label per sample, in their order."
        )
    return batch


def _score(metric: str) -> Score:
    """Return what computes the metric.

    Raises:
        UsageError: If there is no such metric.
    """
    builtin: dict[str, Callable[[], Score]] = {
        "top1": Top1,
        "ctc": Sequences,
        "cosine": lambda: Mean(cosine, higher_is_better=True),
        "mse": lambda: Mean(squared_error, higher_is_better=False),
        "spearman": Spearman,
    }
    if metric in builtin:
        return builtin[metric]()
    if ":" in metric:
        return Custom(metric, imported(metric))
    raise UsageError(
        f'There is no metric "{metric}".{nearest(metric, list(builtin))} Choose one of {", ".join(builtin)}, '
        "or module:function."
    )
