"""Means of channels, and what a layer makes of them."""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxopt.numeric.means import ChannelMeans, mean_response


def random(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def test_means_are_those_of_all_arrays_together():
    arrays = [random(2, 3, 4, 5), random(1, 3, 7, 2)]
    seen = ChannelMeans()
    for array in arrays:
        seen.add(array)
    joined = np.concatenate([a.transpose(1, 0, 2, 3).reshape(3, -1) for a in arrays], axis=1)
    np.testing.assert_allclose(seen.means, joined.mean(axis=1), rtol=1e-5)


def test_nothing_seen():
    assert ChannelMeans().means is None
    seen = ChannelMeans()
    seen.add(np.zeros((0, 3), np.float32))
    assert seen.means is None


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_response_is_what_a_convolution_makes_of_constant_channels(groups):
    weight, means = random(12, 6 // groups, 3, 2), random(6).astype(np.float64)
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1,6,3,2] x, float[12,{6 // groups},3,2] w) => (float[1,12,1,1] y) {{ y = Conv<group = {groups}>(x, w) }}""")
    x = np.broadcast_to(means.astype(np.float32).reshape(1, 6, 1, 1), (1, 6, 3, 2))
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x, "w": weight})
    np.testing.assert_allclose(mean_response(weight, means, 0), expected.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_response_of_a_product(axis):
    weight, means = random(5, 7), random(7 if axis == 0 else 5).astype(np.float64)
    expected = weight @ means if axis == 0 else means @ weight
    np.testing.assert_allclose(mean_response(weight, means, axis), expected, rtol=1e-6)
