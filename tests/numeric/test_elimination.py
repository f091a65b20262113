"""Units that go from linear layers while the others make up for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numeric import elimination
from onnxopt.numeric.elimination import Consumer, eliminate


def consumer(seed: int, units: int, span: int = 1, groups: int = 1, outputs: int = 3) -> Consumer:
    rng = np.random.default_rng(seed)
    inputs = units * span
    x = rng.normal(size=(groups, 200, inputs)) @ rng.normal(size=(groups, inputs, inputs))
    covariance = np.swapaxes(x, 1, 2) @ x / 200
    weight = rng.normal(size=(groups, outputs, inputs))
    return Consumer(covariance, covariance, weight, rng.permutation(np.repeat(np.arange(units), span)))


def refitted(found: Consumer, gone: np.ndarray) -> float:
    """Return the relative square error when the rest is fitted anew."""
    lost = 0.0
    stays = ~np.isin(found.units, gone)
    for covariance, weight in zip(found.covariance, found.weight, strict=True):
        inside, cross = covariance[np.ix_(stays, stays)], covariance[np.ix_(stays, ~stays)]
        rest = covariance[np.ix_(~stays, ~stays)] - cross.T @ np.linalg.solve(inside, cross)
        lost += float(np.trace(weight[:, ~stays] @ rest @ weight[:, ~stays].T))
    return lost / found.spread


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(2, 7), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_what_is_lost_is_what_a_new_fit_loses(seed: int, units: int, span: int, groups: int, layers: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "DAMPING", 1e-12)
        consumers = [consumer(seed + i, units, span, groups) for i in range(layers)]
        order = eliminate(consumers, units, least=1, halfway=units // 2)
    assert len(set(order.units.tolist())) == len(order.units) == units - 1
    for count, lost in enumerate(order.lost):
        expected = sum(refitted(c, order.units[:count]) for c in consumers)
        np.testing.assert_allclose(lost, expected, rtol=1e-4, atol=1e-6)
    gone = order.units[: order.halfway]
    for found, weight in zip(consumers, order.weights, strict=True):
        assert not weight[:, :, np.isin(found.units, gone)].any()
        moved = weight - found.weight
        lost = float(np.einsum("goi,gij,goj->", moved, found.covariance, moved)) / found.spread
        np.testing.assert_allclose(lost, refitted(found, gone), rtol=1e-4, atol=1e-6)


def test_the_first_to_go_loses_least() -> None:
    found = consumer(0, 6, span=2)
    order = eliminate([found], 6, least=5, halfway=0)
    alone = [refitted(found, np.array([unit])) for unit in range(6)]
    assert order.units.tolist() == [int(np.argmin(alone))]


def test_of_two_that_do_the_same_one_goes_and_the_other_stays() -> None:
    base = np.random.default_rng(0).normal(size=(100, 4))
    x = np.concatenate([base, base[:, :1]], axis=1)
    products = (x.T @ x / 100)[None]
    weight = np.array([[[5.0, 1.0, 1.0, 1.0, 5.0]]])
    order = eliminate([Consumer(products, products, weight, np.arange(5))], 5, least=1, halfway=0)
    assert order.units[0] in (0, 4)
    assert {0, 4} != set(order.units[:2].tolist())


def test_many_units_go_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "STEPS", 3)
    order = eliminate([consumer(0, 10)], 10, least=1, halfway=5)
    assert (order.halfway, len(order.units), len(order.lost)) == (5, 9, 10)
    assert (np.diff(order.lost) >= 0).all()


def test_what_is_lost_is_seen_on_samples_held_back() -> None:
    """With fewer samples than inputs nothing is lost on those that weights were fitted to."""
    units, rng = 20, np.random.default_rng(0)
    few, others = rng.normal(size=(8, units)), rng.normal(size=(1000, units))
    weight = rng.normal(size=(1, 3, units))
    seen, held = ((x.T @ x / len(x))[None] for x in (few, others))
    order = eliminate([Consumer(seen, held, weight, np.arange(units))], units, least=1, halfway=10)
    flattered = eliminate([Consumer(seen, seen, weight, np.arange(units))], units, least=1, halfway=10)
    assert flattered.lost[10] < 1e-4
    moved = others @ (order.weights[0][0] - weight[0]).T
    lost = np.square(moved).sum() / np.square(others @ weight[0].T).sum()
    np.testing.assert_allclose(order.lost[10], lost)
    assert lost > 0.3
    assert (np.diff(order.lost) >= 0).all()


def test_of_many_units_the_loss_is_worked_out_at_some_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "JUDGED", 4)
    found = consumer(0, 16)
    some = eliminate([found], 16, least=1, halfway=7)
    monkeypatch.undo()
    every = eliminate([found], 16, least=1, halfway=7)
    assert some.units.tolist() == every.units.tolist()
    known = [0, 4, 7, 11, 15]  # a quarter each, halfway, and the last
    np.testing.assert_allclose(some.lost[known], every.lost[known])
    np.testing.assert_allclose(some.lost[2], (every.lost[0] + every.lost[4]) / 2)
