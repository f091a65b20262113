"""Ridge regression from sums of products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numeric.least_squares import PORTION, Moments, ridge


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def seen(x: np.ndarray, r: np.ndarray, portions: int = 1) -> Moments:
    moments = Moments(x.shape[1], x.shape[2], r.shape[2])
    for left, right in zip(np.array_split(x, portions), np.array_split(r, portions), strict=True):
        moments.add(left, right)
    return moments


def objective(x: np.ndarray, r: np.ndarray, weight: np.ndarray, bias: np.ndarray, damping: float) -> np.ndarray:
    """Return what a group's change is to minimize, in float64, from the rows themselves."""
    x, r = x.astype(np.float64), r.astype(np.float64)
    error = np.square(r - (np.einsum("rgi,goi->rgo", x, weight) + bias)).sum(axis=(0, 2))
    strength = damping * (x - x.mean(axis=0)).var(axis=0).mean(axis=-1)
    return error + len(x) * strength * np.square(weight).sum(axis=(1, 2))


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 4),
    rows=st.integers(1, 40),
    damping=st.sampled_from([1e-3, 1e-1, 1.0]),
    shift=st.sampled_from([0.0, 5.0]),
    portions=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_no_other_change_is_better(
    groups: int, inputs: int, outputs: int, rows: int, damping: float, shift: float, portions: int, seed: int
) -> None:
    x, r = random(rows, groups, inputs, seed=seed) + np.float32(shift), random(rows, groups, outputs, seed=seed + 1)
    change = ridge(seen(x, r, portions), damping)
    best = objective(x, r, change.weight, change.bias, damping)
    rng = np.random.default_rng(seed)
    for size in (1e-2, 1.0):
        weight = change.weight + size * rng.standard_normal(change.weight.shape)
        bias = change.bias + size * rng.standard_normal(change.bias.shape)
        for other in ((weight, change.bias), (change.weight, bias), (weight, bias)):
            assert (best <= objective(x, r, *other, damping) + 1e-4 * rows).all()


def test_a_linear_layer_is_found() -> None:
    x, weight, bias = random(500, 2, 8), random(2, 3, 8, seed=1), random(2, 3, seed=2)
    change = ridge(seen(x, np.einsum("rgi,goi->rgo", x, weight) + bias, portions=5), 1e-9)
    np.testing.assert_allclose(change.weight, weight, atol=1e-4)
    np.testing.assert_allclose(change.bias, bias, atol=1e-4)
    expected = np.einsum("rgi,goi->rgo", x, change.weight) + change.bias
    np.testing.assert_allclose(change.of(x), expected, atol=1e-5)


def test_without_a_bias_nothing_is_centred() -> None:
    x, weight = random(500, 1, 4) + np.float32(3), random(1, 2, 4, seed=1)
    change = ridge(seen(x, np.einsum("rgi,goi->rgo", x, weight)), 1e-9, bias=False)
    np.testing.assert_allclose(change.weight, weight, atol=1e-3)
    assert not change.bias.any()


def test_inputs_that_never_vary_change_nothing_but_the_bias() -> None:
    change = ridge(seen(np.full((20, 1, 3), 7, np.float32), np.full((20, 1, 2), 4, np.float32)), 1e-3)
    np.testing.assert_allclose(change.weight, 0, atol=1e-12)
    np.testing.assert_allclose(change.bias, 4)


def test_fewer_rows_than_inputs_are_solved() -> None:
    change = ridge(seen(random(5, 1, 50), random(5, 1, 2, seed=1)), 1e-3)
    assert np.isfinite(change.weight).all()


def test_rows_are_multiplied_in_portions() -> None:
    x, r = random(2 * PORTION + 3, 1, 4), random(2 * PORTION + 3, 1, 2, seed=1)
    once, often = seen(x, r).sums(), seen(x, r, portions=50).sums()
    np.testing.assert_allclose(once.gram, often.gram, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(once.gram[0], x[:, 0].T @ x[:, 0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(once.cross, often.cross, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e30])
def test_what_cannot_be_squared_is_not_usable(odd: float) -> None:
    moments = seen(random(4, 1, 2), random(4, 1, 2))
    assert moments.usable
    moments.add(np.array([[[1, odd]]], np.float32), random(1, 1, 2))
    assert not moments.usable
    assert not Moments(1, 2, 2).usable


def test_rows_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="4 rows of inputs do not pair with 3 rows of residuals"):
        Moments(1, 2, 2).add(random(4, 1, 2), random(3, 1, 2))
