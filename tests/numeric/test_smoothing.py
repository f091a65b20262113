import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numeric.smoothing import (
    LARGEST_FACTOR,
    Activation,
    ChannelSamples,
    expected_error,
    factors,
    product_error,
)


def observed(arrays, samples=4, rows=3, seed=0):
    observer = ChannelSamples(samples, rows, seed)
    for array in arrays:
        observer.add(array)
    return observer.activation()


def activation(count=8, rows=16, channels=24, sizes=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return observed([rng.normal(size=(rows, channels)).astype(np.float32) * sizes for _ in range(count)], count, rows)


def test_keeps_ranges_and_rows_within_bounds():
    arrays = [np.random.default_rng(i).normal(size=(2, 5, 7)).astype(np.float32) for i in range(10)]
    seen = observed(arrays)
    assert seen.low.shape == seen.high.shape == (4, 7)
    assert seen.rows.shape == (12, 7)
    assert seen.owners.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for low, high in zip(seen.low, seen.high, strict=True):
        assert any((low == a.min((0, 1))).all() and (high == a.max((0, 1))).all() for a in arrays)
    for row, owner in zip(seen.rows, seen.owners, strict=True):
        assert (seen.low[owner] <= row).all()
        assert (row <= seen.high[owner]).all()


def test_draws_every_sample_equally_often_and_the_same_each_time():
    arrays = [np.full((1, 1), i, np.float32) for i in range(10)]
    drawn = np.concatenate([observed(arrays, seed=seed).low.ravel() for seed in range(300)])
    counts = np.bincount(drawn.astype(int), minlength=10)
    assert counts.min() > 80
    assert counts.max() < 160
    np.testing.assert_array_equal(observed(arrays, seed=5).low, observed(arrays, seed=5).low)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_gives_nothing(bad):
    assert observed([np.ones((2, 3), np.float32), np.full((2, 3), bad, np.float32)], samples=1) is None
    assert observed([]) is None
    assert observed([np.zeros((0, 3), np.float32)]) is None


@given(alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_factors_are_positive_and_even(alpha, seed):
    rng = np.random.default_rng(seed)
    x, w = np.exp(rng.normal(0, 2, 20)), np.exp(rng.normal(0, 2, 20))
    s = factors(x, w, alpha)
    assert (s > 0).all()
    np.testing.assert_allclose(np.log(s).mean(), 0, atol=1e-9)


def test_extremes_of_alpha():
    x, w = np.array([1.0, 4.0, 16.0]), np.array([1.0, 1.0, 2.0])
    assert np.ptp(x / factors(x, w, 1.0)) < 1e-12
    assert np.ptp(w * factors(x, w, 0.0)) < 1e-12


def test_dead_channels_keep_their_size_and_factors_are_bounded():
    s = factors(np.array([0.0, 1, 1, 1e30]), np.array([1.0, 0, 1, 1]), 0.9)
    assert s[0] == s[1] == 1
    assert s.max() <= LARGEST_FACTOR
    assert s.min() >= 1 / LARGEST_FACTOR


def test_error_is_small_and_grows_with_uneven_channels():
    weight = np.random.default_rng(1).normal(size=(24, 8)).astype(np.float32)
    even = product_error(activation(), weight)
    uneven = activation(sizes=np.geomspace(0.01, 10, 24).astype(np.float32))
    # Small channels matter where the weights make up for their size.
    opposite = weight / np.geomspace(0.01, 10, 24).astype(np.float32)[:, None]
    assert 0.001 < even < 0.02
    assert product_error(uneven, opposite) > 5 * even
    assert expected_error(uneven, [opposite], 0.65) < 1.5 * even
    assert expected_error(uneven, [opposite], None) > 5 * even


def test_error_is_that_of_the_arithmetic():
    """Against the operators written out for one sample."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 6)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    seen = Activation(x.min(0)[None], x.max(0)[None], x, np.zeros(5, int))
    scale = (max(x.max(), 0) - min(x.min(), 0)) / 255
    zero = np.rint(-min(x.min(), 0) / scale)
    xq = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    steps = np.abs(w).max(0) / 127
    got = (xq @ np.rint(w / steps)) * scale * steps
    expected = np.sqrt(np.mean((got - x @ w) ** 2) / np.mean((x @ w) ** 2))
    assert product_error(seen, w) == pytest.approx(expected, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 5), zero=st.booleans())
def test_no_data_is_too_little(count, zero):
    seen = activation(count, rows=2, sizes=0.0 if zero else 1.0)
    weight = np.ones((24, 3), np.float32)
    error = expected_error(seen, [weight], 0.5)
    assert error == 0 if zero else 0 <= error < 0.5
