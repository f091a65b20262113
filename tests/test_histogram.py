"""Histograms that grow, and the ranges found from them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numeric import grids
from onnxopt.numeric.histogram import Histogram, value_range

LARGEST = float(np.float32(1e30))
NUMBERS = st.floats(-LARGEST, LARGEST, width=32)


def seen(*arrays, bins=2048):
    histogram = Histogram(bins)
    for array in arrays:
        histogram.add(np.asarray(array, np.float32))
    return histogram


def rounding_error(values, bounds):
    grid = grids.asymmetric(*(np.asarray(b, np.float32) for b in bounds))
    back = grids.dequantize(grids.quantize(values, grid), grid)
    return float(np.mean((back.astype(np.float64) - values) ** 2))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=8), min_size=1, max_size=6))
def test_everything_is_counted_wherever_it_lies(arrays):
    histogram = seen(*arrays, bins=64)
    values = np.concatenate([np.array(a, np.float32) for a in arrays]).astype(np.float64)
    middles, counts = histogram.bins
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert histogram.count == len(values)
    assert counts.sum() == np.count_nonzero(values)
    assert len(counts) <= 64
    assert np.all((middles >= values.min()) & (middles <= values.max()))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 1e6]))
def test_bins_lie_where_the_values_do(seed, scale):
    values = (np.random.default_rng(seed).normal(size=4000) * scale).astype(np.float32)
    histogram = seen(*np.split(values, 40))
    middles, counts = histogram.bins
    restored = np.repeat(middles, counts.astype(int))
    # Widened by doubling, so the bins that hold anything may be half of all.
    assert np.max(np.abs(restored - np.sort(values))) <= 2 * np.ptp(values) / 1024


@settings(max_examples=50, deadline=None)
@given(
    st.lists(NUMBERS, min_size=1, max_size=50),
    st.sampled_from(["minmax", "percentile", "entropy", "mse"]),
)
def test_ranges_hold_zero_and_nothing_that_was_not_seen(values, method):
    histogram = seen(values)
    low, high = value_range(histogram, method)
    assert min(histogram.low, 0.0) <= low <= 0.0 <= high <= max(histogram.high, 0.0)
    assert low < high or histogram.low == histogram.high == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["normal", "laplace", "standard_t"]), st.booleans())
def test_mse_is_better_than_all_of_it(seed, law, positive):
    rng = np.random.default_rng(seed)
    count = 400_000  # of fewer, the measured error of two equally good grids differs by more than is asked here
    draw = rng.standard_t(3, count) if law == "standard_t" else getattr(rng, law)(size=count)
    values = (np.maximum(draw, 0) if positive else draw).astype(np.float32)
    histogram = seen(*np.split(values, 10))
    best = rounding_error(values, value_range(histogram, "mse"))
    assert best <= rounding_error(values, value_range(histogram, "minmax")) * 1.02
    reach = [(values.min() * s, values.max() * t) for s in (0.3, 0.6, 0.9) for t in (0.3, 0.6, 0.9)]
    assert best <= min(rounding_error(values, bounds) for bounds in reach) * 1.05


def test_mse_keeps_few_values_whole():
    assert value_range(seen([-1.0, 0.5, 2.0]), "mse") == (-1.0, 2.0)


def test_percentile_leaves_out_the_ends():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[:3] = [-50, 50, 60]
    low, high = value_range(seen(values), "percentile")
    assert -5 < low < -3
    assert 3 < high < 5


def test_entropy_leaves_out_outliers():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[0] = 500
    low, high = value_range(seen(values), "entropy")
    assert high < 250
    assert low == pytest.approx(values.min(), rel=0.5)


def test_zeros_do_not_move_a_range():
    values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    padded = np.concatenate([values, np.zeros(500_000, np.float32)])
    assert value_range(seen(padded), "mse") == value_range(seen(values), "mse")
    assert value_range(seen(np.zeros(4)), "mse") == (0.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_noticed(bad):
    histogram = seen([1.0, 2.0], [bad, 3.0])
    assert not histogram.finite
    assert seen([1.0, 2.0]).finite


def test_empty_arrays_add_nothing():
    histogram = seen(np.zeros((0, 4)))
    assert (histogram.count, histogram.finite, histogram.low) == (0, True, np.inf)


def test_arrays_are_not_changed_and_integers_are_taken():
    array = np.arange(6).reshape(2, 3)
    histogram = Histogram()
    histogram.add(array)
    np.testing.assert_array_equal(array, np.arange(6).reshape(2, 3))
    assert (histogram.low, histogram.high, histogram.count) == (0, 5, 6)
