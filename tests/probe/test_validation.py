from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.probe.folds import stratified, wilson
from onnxopt.probe.validation import METHODS, Accuracy, compare, confusions, learning_curve


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(3, 20), min_size=2, max_size=5), folds=st.integers(2, 3), seed=st.integers(0, 9))
def test_folds_test_every_row_once_and_are_balanced(counts: list[int], folds: int, seed: int) -> None:
    classes = np.repeat(np.arange(len(counts)), counts)
    splits = stratified(classes, folds, seed=seed)
    assert sorted(np.concatenate([test for _, test in splits])) == list(range(len(classes)))
    assert max(len(t) for _, t in splits) - min(len(t) for _, t in splits) <= 1
    for train, test in splits:
        assert not set(train) & set(test)
        for label, count in enumerate(counts):
            assert count // folds <= (classes[test] == label).sum() <= -(-count // folds)


def test_wilson_interval_is_the_published_one() -> None:
    low, high = wilson(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == 1.0


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    classes = np.arange(90) % 3
    return random.normal(size=(3, 10))[classes] * 0.8 + random.normal(size=(90, 10)), classes


def test_labels_without_meaning_are_classified_by_chance(problem: tuple[np.ndarray, np.ndarray]) -> None:
    """Nothing of a left-out sample gets into its fit: else noise would be predicted."""
    features, classes = problem
    random = np.random.default_rng(1)
    right = dict.fromkeys(METHODS, 0)
    for _ in range(5):
        for found in compare(tuple(METHODS), features, random.permutation(classes), 3, folds=5, seed=0):
            right[found.method] += found.accuracy.right
    for hits in right.values():
        low, _ = Accuracy(hits, 5 * len(classes)).interval
        # Stratified folds are a little worse than chance: what is left out is rarer among the rest.
        assert low < 1 / 3
        assert hits / (5 * len(classes)) > 0.25


def test_the_method_with_more_right_answers_comes_first(problem: tuple[np.ndarray, np.ndarray]) -> None:
    found = compare(tuple(METHODS), *problem, 3, folds=5, seed=0)
    assert {f.method for f in found} == set(METHODS)
    assert found[0].accuracy.right >= found[1].accuracy.right > 55
    assert found[0].log_loss < np.log(3)


@pytest.mark.parametrize("method", METHODS)
def test_variants_are_learnt_from_and_never_judged_by(method: str, problem: tuple[np.ndarray, np.ndarray]) -> None:
    """Variants that hold the answer of their own sample do not help with it: it is left out with them."""
    features, classes = problem
    shuffled = np.random.default_rng(4).permutation(classes)
    wide = np.hstack([features, np.zeros((90, 90))])
    telling = np.hstack([features, np.eye(90)])
    (found,) = compare((method,), wide, shuffled, 3, folds=5, seed=0, copies=(telling, telling))
    assert found.accuracy.share < 0.5


def test_the_curve_rises_and_uses_no_more_than_there_is(problem: tuple[np.ndarray, np.ndarray]) -> None:
    curve = learning_curve("ridge", *problem, 3, folds=5, seed=0)
    assert [s.per_class for s in curve] == [1, 2, 5, 10, 20]
    assert curve[-1].mean > curve[0].mean + 0.1
    assert all(s.low <= s.mean <= s.high and s.draws >= 5 for s in curve)
    assert learning_curve("ridge", *problem, 3, folds=5, seed=0) == curve


def test_confusions_count_true_rows_and_predicted_columns() -> None:
    counts = confusions(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]
    assert Accuracy(2, 3).share == pytest.approx(2 / 3)
