from __future__ import annotations

import numpy as np
import pytest

from onnxopt.advice.shift import two_samples
from onnxopt.advice.verdict import Way, decide, difference
from onnxopt.probe.validation import Accuracy


def reached(name: str, *folds: float, each: int = 40) -> Way:
    right = round(sum(f * each for f in folds))
    return Way(name, name, Accuracy(right, each * len(folds)), folds, 1.0, name in ("head", "fine-tuning"))


def verdict(*ways: Way):
    rival = max((w for w in ways if not w.transfers), key=lambda w: w.accuracy.share)
    return decide(ways, [difference(w, rival) for w in ways if w.transfers])


def test_the_interval_is_that_of_students_t_with_shared_training_samples() -> None:
    one, two = reached("head", 0.9, 0.8, 0.85), reached("scratch", 0.6, 0.6, 0.65)
    found = difference(one, two)
    each = np.array([0.3, 0.2, 0.2])
    half = 4.303 * np.sqrt(each.var(ddof=1) * (1 / 3 + 1 / 2))
    assert found.mean == pytest.approx(each.mean(), abs=1e-2)
    assert found.high - found.low == pytest.approx(2 * half)


def test_folds_that_agree_by_chance_still_leave_doubt() -> None:
    found = difference(reached("head", 0.9, 0.9, 0.9), reached("scratch", 0.9, 0.9, 0.9))
    assert found.low < 0 < found.high


def test_transfer_that_helps() -> None:
    found = verdict(
        reached("inputs", 0.5, 0.55, 0.5), reached("head", 0.9, 0.92, 0.9), reached("scratch", 0.6, 0.62, 0.6)
    )
    assert (found.kind, found.recommended) == ("transfer helps", "head")
    assert found.sentence.startswith("Transfer helps: give the model a new head (onnxopt head). Head is ")
    assert "more accurate than scratch" in found.sentence


def test_the_cheaper_of_equals_is_taken() -> None:
    ways = [reached("head", 0.9, 0.92, 0.9), reached("fine-tuning", 0.9, 0.925, 0.9), reached("scratch", 0.6, 0.6, 0.6)]
    assert verdict(*ways).recommended == "head"
    ways[1] = reached("fine-tuning", 0.97, 0.97, 0.96)
    assert verdict(*ways).recommended == "fine-tuning"


def test_the_luckiest_of_few_samples_is_not_taken_for_the_best() -> None:
    """One sample more of five in some folds is within a standard error; the cheaper way is taken."""
    found = verdict(
        reached("inputs", 0.6, 0.8, 0.4, 0.6, 0.6, each=5),
        reached("head", 0.8, 1.0, 0.8, 1.0, 1.0, each=5),
        reached("fine-tuning", 1.0, 0.8, 0.8, 1.0, 1.0, each=5),
        reached("scratch", 1.0, 1.0, 0.8, 1.0, 1.0, each=5),
    )
    assert (found.kind, found.recommended) == ("no difference shown", "head")


def test_transfer_that_hurts() -> None:
    found = verdict(
        reached("head", 0.4, 0.42, 0.4), reached("fine-tuning", 0.7, 0.7, 0.72), reached("scratch", 0.9, 0.9, 0.92)
    )
    assert (found.kind, found.recommended) == ("transfer hurts", "scratch")
    assert found.sentence.startswith("Transfer hurts here: train the model from scratch. Scratch is 20.0%")


def test_the_inputs_alone_may_be_best() -> None:
    found = verdict(
        reached("inputs", 0.9, 0.92, 0.9), reached("head", 0.4, 0.42, 0.4), reached("scratch", 0.6, 0.6, 0.6)
    )
    assert (found.kind, found.recommended) == ("transfer hurts", "inputs")


def test_too_few_samples_show_nothing() -> None:
    found = verdict(reached("head", 0.8, 0.4, 0.6, each=5), reached("scratch", 0.4, 0.6, 0.6, each=5))
    assert (found.kind, found.recommended) == ("no difference shown", "head")
    assert "do not show whether transfer helps" in found.sentence


def test_samples_of_one_distribution_are_not_told_apart() -> None:
    random = np.random.default_rng(0)
    found = two_samples(random.normal(size=(200, 8)), random.normal(size=(150, 8)), seed=0)
    assert found is not None
    assert not found.shown
    assert "no difference is shown" in found.sentence()


def test_samples_of_two_distributions_are() -> None:
    random = np.random.default_rng(0)
    found = two_samples(random.normal(size=(200, 8)), 2 + random.normal(size=(150, 8)), seed=0)
    assert found is not None
    assert found.shown
    assert found.accuracy.samples == 300
    assert "very different" in found.sentence()


def test_too_few_samples_are_not_compared() -> None:
    assert two_samples(np.zeros((9, 2)), np.zeros((50, 2)), seed=0) is None
