import numpy as np
import pytest

from onnxopt.numeric.channel_moments import ChannelMoments


def test_moments_over_several_arrays():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(3, 2, (n, 4, 5)).astype(np.float32) for n in (1, 3)]
    moments = ChannelMoments(4, 1)
    for array in arrays:
        moments.add(array)
    seen = np.concatenate(arrays).astype(np.float64).transpose(1, 0, 2).reshape(4, -1)
    assert moments.count == 20
    np.testing.assert_allclose(moments.mean_square, (seen**2).mean(axis=1))
    np.testing.assert_allclose(moments.variance, seen.var(axis=1))
    assert moments.usable


def test_nothing_seen_or_not_numbers():
    moments = ChannelMoments(2, -1)
    assert not moments.usable
    moments.add(np.array([[np.inf, 1]], np.float32))
    assert not moments.usable
    with pytest.raises(ValueError, match="should have 2 elements"):
        moments.add(np.zeros((2, 3)))
