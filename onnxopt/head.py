"""A new head for a classifier: other classes, learnt from labelled samples without training the layers before.

result = onnxopt.head("digits.onnx", data="letters.npz", classes=5)
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.contract import Progress, Silent
from onnxopt.errors import DataError, UsageError, VerificationError
from onnxopt.feeds import Data
from onnxopt.heads.features import run_up_to
from onnxopt.heads.labelled import Classes, Labelled, Source, classes_of, load_labelled, require_enough
from onnxopt.heads.moved import moved
from onnxopt.heads.plan import Plan, earlier, inlined, plan, written
from onnxopt.model import load
from onnxopt.probe.classifier import Array, Linear, log_softmax
from onnxopt.probe.validation import (
    METHODS,
    Accuracy,
    Step,
    Validation,
    compare,
    confusions,
    fit_rows,
    learning_curve,
    order,
)
from onnxopt.report.head import Confusion, HeadReport, MethodScore
from onnxopt.runtime import RunOptions, open_session, run_options

Method = Literal["auto", "ridge", "logistic"]

AUTO = "auto"
"""As features, those of the last three linear layers that classify best."""

CHECKED = 256
"""Samples on which the written model is compared with the classifier computed in numpy."""

MOST_CONFUSIONS = 5

_TOLERANCE = {ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 1e-1}
"""Of the range of the scores; others 1e-3."""

_ROUNDING = 16 * float(np.finfo(np.float32).eps)
"""Of the terms that a score is the sum of."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeadResult:
    """A model with a new head.

    Attributes:
        model: The model.
        report: How it was made and what it reaches.
        classifier: The fitted classifier on the features.
    """

    model: ir.Model
    report: HeadReport
    classifier: Linear


def head(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    data: Source,
    labels: str | os.PathLike[str] | Array | None = None,
    classes: int | None = None,
    at: str | None = None,
    method: Method = "auto",
    shift: int = 0,
    folds: int = 5,
    curve: bool = True,
    test: Source | None = None,
    test_labels: str | os.PathLike[str] | Array | None = None,
    provider: str | None = None,
    threads: int = 1,
    custom_ops: Sequence[str] = (),
    allow_fallback: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadResult:
    """Give a model a head for other classes.

    The model runs once over the samples, up to what its last linear layer takes: the features. A linear classifier is
    fitted to them, ridge regression in closed form or multinomial logistic regression, whichever classifies more
    samples rightly that it was not fitted to. It takes the place of the old head; a model without one gets it
    appended. The outputs of the result are compared with the classifier computed outside of it.

    Args:
        model: It is not changed.
        data: Labelled samples: an .npz, an array per input (and "labels"), or what else `load_data` takes.
        labels: A class per sample, whole numbers or strings; None when they lie with the inputs as "labels".
        classes: How many classes there are; None to take what the labels hold.
        at: Name of the value to use as features; None for what goes into the old head; "auto" for that or what goes
            into one of the two linear layers before, whichever classifies best by cross-validation.
        method: "ridge", "logistic", or "auto" for the better one by cross-validation.
        shift: Also learn from each image moved by so many pixels in eight directions, if that classifies more of the
            samples rightly that were left out; for images whose class does not depend on where they are. It takes
            about nine times as long.
        folds: Folds of the cross-validation.
        curve: Whether to find out how the accuracy grows with the number of labelled samples.
        test: More labelled samples, only to judge the result.
        test_labels: Their labels.
        provider: Execution provider.
        threads: Intra-op threads per session.
        custom_ops: Libraries with custom operators to register with ONNX Runtime.
        allow_fallback: Accept that the runtime runs nodes on another provider.
        seed: Seeds the folds.
        progress: Told what is being done.

    Raises:
        DataError: If samples and labels do not fit each other, the model, or the number of classes and folds.
        ModelError: If nothing can serve as features.
        UsageError: If an option cannot be used.
        VerificationError: If the result does not compute what the classifier does.
    """
    if folds < 2:
        raise UsageError(f"folds must be at least 2, not {folds}.", "folds")
    if method != "auto" and method not in METHODS:
        raise UsageError(f'There is no method "{method}"; there are auto, {", ".join(METHODS)}.')
    if shift < 0:
        raise UsageError(f"shift cannot be {shift}.", "shift")
    progress, started = progress or Silent(), time.perf_counter()
    options = run_options(provider, threads, custom_ops, allow_fallback)
    source = inlined(load(model))
    labelled = load_labelled(data, labels, source)
    kinds = classes_of(labelled, classes)
    tested = None if test is None else load_labelled(test, test_labels, source)
    variants = moved(labelled.data, shift) if shift else []
    planned, features, numbers, tried = _features(source, labelled, kinds, at, folds, seed, options, progress)

    copies = tuple(run_up_to(planned.trunk, planned.features, v, options, progress) for v in variants)
    best, copies, scores = _chosen(method, features, numbers, len(kinds), copies, folds, seed, progress)
    progress.stage(f"fitting {best.method}")
    fitted = fit_rows(best.method, features, numbers, len(kinds), np.arange(len(features)), copies)
    result, notes, changed = written(source, planned, fitted, kinds.names)
    _require_others(source, result, labelled.data, options, changed)
    worst = _verified(result, planned, fitted, features, labelled.data, options, progress)
    steps: tuple[Step, ...] = ()
    if curve:
        steps = learning_curve(
            best.method, features, numbers, len(kinds), folds=folds, seed=seed, copies=copies, progress=progress
        )
    accuracy = None if tested is None else _accuracy(result, planned.output, tested, kinds, options, progress)
    counts = np.bincount(numbers, minlength=len(kinds))
    report = HeadReport(
        model=_name(model),
        output="",
        features=planned.source,
        dimensions=features.shape[1],
        replaces=planned.replaces,
        scores=planned.output,
        activation=planned.activation,
        classes=kinds.names,
        per_class=tuple(int(c) for c in counts),
        data=labelled.data.name,
        samples=len(features),
        folds=folds,
        methods=scores,
        penalty=fitted.penalty,
        majority=float(counts.max() / counts.sum()),
        confusions=_worst(confusions(numbers, best.predicted, len(kinds)), kinds),
        curve=steps,
        test="" if tested is None else tested.data.name,
        test_accuracy=accuracy,
        checked=min(CHECKED, len(features)),
        deviation=worst,
        notes=(*tried, *planned.notes, *notes, *labelled.data.notes),
        seconds=time.perf_counter() - started,
    )
    return HeadResult(result, report, fitted)


def _features(
    model: ir.Model,
    labelled: Labelled,
    kinds: Classes,
    at: str | None,
    folds: int,
    seed: int,
    options: RunOptions,
    progress: Progress,
) -> tuple[Plan, Array, Array, list[str]]:
    """Return where the head goes, the features and classes of the samples, and how the features were chosen."""
    planned = plan(model, labelled.data, options, None if at == AUTO else at)
    features = run_up_to(planned.trunk, planned.features, labelled.data, options, progress)
    numbers = _numbers(kinds, labelled, len(features))
    require_enough(numbers, kinds, folds)
    names = earlier(model) if at == AUTO else []
    if not names:
        return planned, features, numbers, []
    found = [(planned, features)]
    for name in names:
        other = plan(model, labelled.data, options, name)
        found.append((other, run_up_to(other.trunk, other.features, labelled.data, options, progress)))
    right = [
        compare(("ridge",), each, numbers, len(kinds), folds=folds, seed=seed, progress=progress)[0].accuracy
        for _, each in found
    ]
    # Of equals the nearest to the head: argmax returns the first.
    planned, features = found[int(np.argmax([a.right for a in right]))]
    listed = ", ".join(f"{p.source} {a.share:.1%}" for (p, _), a in zip(found, right, strict=True))
    return planned, features, numbers, [f"Features were chosen by what ridge regression makes of them: {listed}."]


def _chosen(
    method: Method,
    features: Array,
    numbers: Array,
    count: int,
    copies: tuple[Array, ...],
    folds: int,
    seed: int,
    progress: Progress,
) -> tuple[Validation, tuple[Array, ...], tuple[MethodScore, ...]]:
    """Return the best in cross-validation, the variants it learns from, and what all reach, the best first."""
    methods = tuple(METHODS) if method == "auto" else (method,)
    tried = [
        (found, variants, f"{found.method} with moved images" if variants else found.method)
        for variants in ([(), copies] if copies else [()])
        for found in compare(
            methods, features, numbers, count, folds=folds, seed=seed, copies=variants, progress=progress
        )
    ]
    # Of equals the one without variants: sorting keeps their order.
    tried.sort(key=lambda t: order(t[0]))
    best, variants, _ = tried[0]
    return best, variants, tuple(MethodScore(name, found.accuracy, found.log_loss) for found, _, name in tried)


def _name(model: object) -> str:
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else "the model"


def _numbers(kinds: Classes, labelled: Labelled, rows: int) -> Array:
    """Return the class of each row of the features.

    Raises:
        DataError: If there are more or fewer labels.
    """
    if len(labelled.labels) != rows:
        raise DataError(
            f"{labelled.name} holds {len(labelled.labels)} labels, but the samples of {labelled.data.name} give "
            f"{rows} rows."
        )
    return kinds.numbers(labelled)


def _verified(
    result: ir.Model,
    planned: Plan,
    fitted: Linear,
    features: Array,
    data: Data,
    options: RunOptions,
    progress: Progress,
) -> float:
    """Compare the written model with the classifier computed here; return the worst deviation, of the scores' range.

    Raises:
        VerificationError: If it is too large.
    """
    rows = features[:CHECKED]
    outputs = run_up_to(result, planned.output, data.take(CHECKED), options, progress)[: len(rows)]
    classes = fitted.weight.shape[1]
    if outputs.size != len(rows) * classes:
        raise VerificationError(
            f'The output "{planned.output}" of the new model has the shape {list(outputs.shape)}, not {len(rows)} '
            f"times {classes} classes."
        )
    expected = fitted.scores(rows.astype(np.float64))
    if planned.activation:
        expected = log_softmax(expected)
    if planned.activation == "Softmax":
        expected = np.exp(expected)
    spread = max(float(np.ptp(expected)), 1e-6)
    difference = float(np.abs(outputs.reshape(expected.shape) - expected).max())
    worst = difference / spread
    terms = float((np.abs(rows) @ np.abs(fitted.weight) + np.abs(fitted.bias)).max())
    # Scores that are small differences of large terms cannot be more precise than the terms.
    if not difference <= max(_TOLERANCE.get(planned.dtype, 1e-3) * spread, _ROUNDING * terms):
        raise VerificationError(
            f'The output "{planned.output}" of the new model deviates by {worst:.2g} of its range from the classifier '
            f"that was fitted."
        )
    return worst


def _accuracy(
    model: ir.Model, output: str, tested: Labelled, kinds: Classes, options: RunOptions, progress: Progress
) -> Accuracy:
    """Return how many samples the written model classifies rightly."""
    outputs = run_up_to(model, output, tested.data, options, progress)
    numbers = _numbers(kinds, tested, len(outputs))
    right = outputs.reshape(len(outputs), -1).argmax(axis=1) == numbers
    return Accuracy(int(right.sum()), len(right))


def _worst(counts: Array, kinds: Classes) -> tuple[Confusion, ...]:
    """Return the most frequent confusions, as parts of the true class."""
    totals = counts.sum(axis=1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-(wrong / np.maximum(totals, 1)[:, None]), axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(i), len(kinds)) for i in order]
    return tuple(
        Confusion(kinds.names[true], kinds.names[taken], int(wrong[true, taken]), int(totals[true]))
        for true, taken in pairs
        if wrong[true, taken]
    )


def _require_others(before: ir.Model, after: ir.Model, data: Data, options: RunOptions, changed: set[str]) -> None:
    """Check that outputs the new head has no part in are as they were, on the first sample.

    Raises:
        VerificationError: If one is not.
    """
    kept = {v.name or "" for v in before.graph.outputs} & {v.name or "" for v in after.graph.outputs} - changed
    if not kept:
        return
    feed = next(iter(data))
    with open_session(before, options, optimized=False) as one, open_session(after, options, optimized=False) as two:
        old, new = one.run(feed, kept), two.run(feed, kept)
    for name in sorted(kept):
        if not _same(old[name], new[name]):
            raise VerificationError(f'The output "{name}" is not what it was, though the head has no part in it.')


def _same(one: object, two: object) -> bool:
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    first, second = np.asarray(one), np.asarray(two)
    return first.shape == second.shape and first.tobytes() == second.tobytes()
