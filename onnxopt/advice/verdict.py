"""From what each way reached on the same folds to a plain verdict. Plain values in and out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from onnxopt.probe.classifier import Array
from onnxopt.probe.validation import Accuracy

CLOSE = 0.005
"""Accuracies that differ by less, or by less than the standard error of their difference, count as equal.

Then the cheapest way wins. Of few samples the most accurate way is often only the luckiest (the rule of one standard
error: Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3).
"""

_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5% quantiles of Student's t by degrees of freedom."""

Kind = Literal["transfer helps", "no difference shown", "transfer hurts"]


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """What one way reached.

    Attributes:
        name: "head", "fine-tuning", "scratch" or "inputs".
        about: What it is, in words.
        accuracy: Over all samples, each judged by a classifier that did not see it.
        folds: Share of right answers per fold.
        seconds: For one fold.
        transfers: Whether it uses what the model has learnt.
    """

    name: str
    about: str
    accuracy: Accuracy
    folds: tuple[float, ...]
    seconds: float
    transfers: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """How much better one way is than another on the same folds.

    Attributes:
        name: The way.
        against: The other.
        mean: Difference of the accuracies.
        low: Lower end of its 95% interval.
        high: Upper end.
    """

    name: str
    against: str
    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What to do.

    Attributes:
        kind: Whether transfer is shown to help, to hurt, or neither.
        recommended: Name of the way to take.
        sentence: Both in words.
    """

    kind: Kind
    recommended: str
    sentence: str


def difference(way: Way, other: Way) -> Difference:
    """Compare two ways fold by fold.

    The interval is Student's, with the variance raised for folds that share their training samples (Nadeau and
    Bengio, "Inference for the Generalization Error", 2003).
    """
    mean = way.accuracy.share - other.accuracy.share
    half = _QUANTILES.get(len(way.folds) - 1, 2.2) * max(_spread(way, other), _least_spread(way))
    return Difference(way.name, other.name, mean, max(-1.0, mean - half), min(1.0, mean + half))


def _spread(way: Way, other: Way) -> float:
    """Return the standard error of the difference of two ways on the same folds."""
    each = np.asarray(way.folds) - np.asarray(other.folds)
    count = len(each)
    return math.sqrt(float(each.var(ddof=1)) * (1 / count + 1 / (count - 1)))


def _least_spread(way: Way) -> float:
    """Return a spread below which folds that happen to agree are not believed: half a sample per fold."""
    return 0.5 / way.accuracy.samples


def decide(ways: Sequence[Way], differences: Sequence[Difference]) -> Verdict:
    """Return the verdict.

    Args:
        ways: The cheapest first; at least one of them transfers and at least one does not.
        differences: Of each way that transfers against the best that does not.
    """
    best = max(ways, key=lambda w: w.accuracy.share)
    chosen = next(w for w in ways if w.accuracy.share >= best.accuracy.share - max(CLOSE, _spread(w, best)))
    transfers = [w for w in ways if w.transfers]
    leading = max(transfers, key=lambda w: w.accuracy.share)
    found = next(d for d in differences if d.name == leading.name)
    points = f"{abs(found.mean):.1%} ({min(abs(found.low), abs(found.high)):.1%} to "
    points += f"{max(abs(found.low), abs(found.high)):.1%})"
    if found.low > 0:
        taken = chosen if chosen.transfers else leading
        return Verdict("transfer helps", taken.name, f"Transfer helps: {_do(taken)}. {_ahead(leading, found, points)}")
    if found.high < 0:
        taken = next(w for w in ways if w.name == found.against)
        gap = f"{found.against} is {points} more accurate than {leading.name}, the best that transfers"
        return Verdict("transfer hurts", taken.name, f"Transfer hurts here: {_do(taken)}. {gap.capitalize()}.")
    interval = f"{found.mean:+.1%}, 95% interval {found.low:+.1%} to {found.high:+.1%}"
    return Verdict(
        "no difference shown",
        chosen.name,
        f"These samples do not show whether transfer helps ({leading.name} against {found.against}: {interval}); "
        f"{_do(chosen)}, which did best or as well for less.",
    )


def _ahead(leading: Way, found: Difference, points: str) -> str:
    return f"{leading.name.capitalize()} is {points} more accurate than {found.against}."


_DO = {
    "head": "give the model a new head (onnxopt head)",
    "fine-tuning": "give the model a new head, then fine-tune all of it (onnxopt head, onnxopt finetune)",
    "scratch": "train the model from scratch",
    "inputs": "a linear classifier on the inputs needs no model",
}


def _do(way: Way) -> str:
    return _DO[way.name]


def way(
    name: str, about: str, right: Array, splits: Sequence[tuple[Array, Array]], seconds: float, *, transfers: bool
) -> Way:
    """Sum up which samples were classified rightly."""
    folds = tuple(float(right[test].mean()) for _, test in splits)
    return Way(name, about, Accuracy(int(right.sum()), len(right)), folds, seconds / len(splits), transfers)
