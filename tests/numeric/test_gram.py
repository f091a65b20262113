"""Sums of products of what goes through a model."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.numeric.gram import Gram


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("axis", "shape"), [(-1, (2, 5, 8)), (1, (2, 8, 3, 3)), (0, (8,)), (-1, (8,))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_are_summed_along_any_axis(axis: int, shape: tuple[int, ...], dtype: type) -> None:
    gram = Gram(8, axis, dtype)
    arrays = [random(*shape, seed=i) for i in range(3)]
    for array in arrays:
        gram.add(array)
    rows = np.concatenate([np.moveaxis(a, axis, -1).reshape(-1, 8) for a in arrays]).astype(np.float64)
    assert gram.total.dtype == dtype
    assert gram.count == len(rows)
    np.testing.assert_allclose(gram.total, rows.T @ rows, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gram.sum, rows.sum(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gram.mean, rows.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_half_precision_is_summed_up_in_single() -> None:
    gram = Gram(2)
    gram.add(np.full((4, 2), 300, np.float16))
    np.testing.assert_array_equal(gram.total, np.full((2, 2), 360_000))


def test_before_the_first_vector_all_is_zero() -> None:
    gram = Gram(3)
    gram.add(np.zeros((0, 3), np.float32))
    assert gram.count == 0
    assert not gram.mean.any()


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e30])
def test_what_cannot_be_squared_is_not_usable(odd: float) -> None:
    gram = Gram(4)
    assert not gram.usable
    gram.add(random(3, 4))
    assert gram.usable
    gram.add(np.array([[1, odd, 0, 0]], np.float32))
    assert not gram.usable


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"axis -1 of an array of shape \(2, 4\) should have 3 elements"):
        Gram(3).add(random(2, 4))
