"""Weights whose products can be added up by pairs in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.numeric import grids
from onnxopt.numeric.adjacent import (
    EQUAL,
    MOST,
    fitting_grid,
    fitting_integers,
    held_orders,
    orders_of_convolution,
    orders_of_matrix,
    too_large,
)
from onnxopt.runtime import open_session

SHAPES = [((6, 5, 3, 3), 0), ((4, 1, 5), 0), ((8, 16, 1, 1), 0), ((2, 3, 2, 2, 2), 0)]


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def largest_sum(integers: np.ndarray, order: tuple[int, ...]) -> int:
    """Return the most that two neighbours of the same sign add up to."""
    kept = [i for i in range(integers.ndim) if i not in order]
    rows = integers.astype(int).transpose(*kept, *order).reshape(*(integers.shape[i] for i in kept), -1)
    first, second = rows[..., : rows.shape[-1] // 2 * 2 : 2], rows[..., 1::2]
    return int(np.where(first * second > 0, np.abs(first + second), 0).max(initial=0))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_no_pair_of_a_convolution_is_too_large(shape: tuple[int, ...], axis: int, *, per_channel: bool) -> None:
    weight = draw(shape, 1)
    orders = orders_of_convolution(shape, 1)
    grid = fitting_grid(weight, axis if per_channel else None, orders)
    integers = fitting_integers(weight, grid, orders)
    assert integers.dtype == np.int8
    assert integers.shape == shape
    assert all(largest_sum(integers, order) <= MOST for order in orders)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1), st.floats(0.2, 3.0))
def test_matrices(seed: int, rows: int, columns: int, axis: int, power: float) -> None:
    weight = draw((rows, columns), seed)
    weight = np.sign(weight) * np.abs(weight) ** np.float32(power)
    orders = orders_of_matrix(axis)
    grid = fitting_grid(weight, axis, orders)
    integers = fitting_integers(weight, grid, orders)
    assert largest_sum(integers, orders[0]) <= MOST
    low, high = grids.value_range(weight, axis)
    halved = grids.symmetric(low, high, axis, levels=EQUAL)
    lost = [
        np.square(grids.dequantize(q, g) - weight).sum()
        for q, g in ((integers, grid), (grids.quantize(weight, halved), halved))
    ]
    assert lost[0] <= lost[1] * 1.0001


def test_what_fits_is_rounded_to_nearest() -> None:
    weight = draw((8, 32), 2)
    grid = fitting_grid(weight, 0, orders_of_matrix(0))
    integers, nearest = fitting_integers(weight, grid, orders_of_matrix(0)), grids.quantize(weight, grid)
    changed = (integers != nearest).reshape(8, -1, 2).any(axis=-1)
    pairs = np.abs(nearest.astype(int)).reshape(8, -1, 2).sum(axis=-1)
    assert 0 < changed.mean() < 0.25
    assert pairs[changed].min() > MOST
    assert (np.sign(integers) == np.sign(nearest))[np.abs(nearest) > MOST - 127].all()


def test_far_finer_than_halved_weights() -> None:
    weight = draw((64, 512), 3)
    grid = fitting_grid(weight, 0, orders_of_matrix(0))
    low, high = grids.value_range(weight, 0)
    halved = grids.symmetric(low, high, 0, levels=EQUAL)
    lost = np.square(grids.dequantize(fitting_integers(weight, grid, orders_of_matrix(0)), grid) - weight).sum()
    assert lost < 0.6 * np.square(grids.dequantize(grids.quantize(weight, halved), halved) - weight).sum()


def test_equal_weights_become_the_largest_that_all_may_be() -> None:
    weight = np.full((2, 6), 0.5, np.float32)
    grid = fitting_grid(weight, 0, orders_of_matrix(0))
    assert (fitting_integers(weight, grid, orders_of_matrix(0)) == EQUAL).all()
    assert grids.dequantize(fitting_integers(weight, grid, orders_of_matrix(0)), grid).max() == 0.5


def test_a_weight_of_zeros() -> None:
    weight = np.zeros((3, 4), np.float32)
    grid = fitting_grid(weight, 0, orders_of_matrix(0))
    assert not fitting_integers(weight, grid, orders_of_matrix(0)).any()


@pytest.mark.parametrize("rows", [1, 24])
def test_the_runtime_adds_them_up_exactly(rows: int) -> None:
    # On x86-64 processors without VNNI it does not, for weights that are only rounded to nearest.
    weight, orders = draw((16, 64), 4), orders_of_matrix(0)
    integers = fitting_integers(weight, fitting_grid(weight, 0, orders), orders)
    activations = np.random.default_rng(5).integers(200, 256, (rows, 64)).astype(np.uint8)
    activations[0] = 255
    text = "g (uint8[m,64] a, int8[64,16] b) => (int32[m,16] y) { y = MatMulInteger(a, b) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 13]> {text}')
    session = open_session(ir.from_proto(model), optimized=True)
    found = session.run({"a": activations, "b": np.ascontiguousarray(integers.T)})["y"]
    assert (found == activations.astype(np.int64) @ integers.T.astype(np.int64)).all()


@pytest.mark.parametrize(
    ("channels", "groups", "kernel"), [(16, 1, 1), (8, 1, 3), (3, 1, 3), (6, 2, 3), (8, 8, 3), (16, 16, 3)]
)
@pytest.mark.parametrize("optimized", [True, False])
def test_the_runtime_adds_up_convolutions_exactly(channels: int, groups: int, kernel: int, *, optimized: bool) -> None:
    weight = draw((16, channels // groups, kernel, kernel), 6)
    orders = orders_of_convolution(weight.shape, groups)
    integers = fitting_integers(weight, fitting_grid(weight, 0, orders), orders)
    text = f"""<ir_version: 8, opset_import: ["": 13]>
        g (uint8[1,{channels},9,9] x) => (uint8[1,16,p,q] y) {{
        y = QLinearConv<group = {groups}>(x, one, zero, w, one, none, step, half) }}"""
    step = np.float32(np.abs(integers.astype(int)).sum() * 255 / 16 / 256)
    constants = {"one": np.float32(1), "zero": np.uint8(0), "none": np.int8(0), "half": np.uint8(128), "step": step}
    proto = onnx.parser.parse_model(text)
    for name, array in {**constants, "w": integers}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    x = np.random.default_rng(7).integers(200, 256, (1, channels, 9, 9)).astype(np.uint8)
    x[:, :, :4] = 255
    found = open_session(ir.from_proto(proto), optimized=optimized).run({"x": x})["y"]
    size = 10 - kernel
    wanted = np.zeros((16, size, size))
    for out in range(16):
        of = out * groups // 16 * (channels // groups)
        part = x[0, of : of + channels // groups].astype(int)
        for i in range(size):
            for j in range(size):
                wanted[out, i, j] = (part[:, i : i + kernel, j : j + kernel] * integers[out].astype(int)).sum()
    assert np.abs(found[0].astype(int) - np.clip(np.rint(wanted / step) + 128, 0, 255)).max() <= 1


def test_which_pairs_are_too_large_and_in_which_orders_none_is() -> None:
    weight = np.array([[100, 29, -100, 29, 127], [100, 28, 1, 127, 127]], np.int8)
    assert too_large(weight, [(1,)]).tolist() == [[True, True, False, False, False], [False] * 5]
    assert held_orders(weight) == []
    assert held_orders(weight[1:]) == [(0,), (1,)]
    fitted = fitting_integers(draw((4, 6, 3, 3), 8), fitting_grid(draw((4, 6, 3, 3), 8), 0, ((2, 3, 1),)), ((2, 3, 1),))
    assert (2, 3, 1) in held_orders(fitted)
