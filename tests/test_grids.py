import math

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxopt.numeric import grids
from onnxopt.numeric.blocks import along, blocks

FLOATS = st.floats(-1e6, 1e6, width=32)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=FLOATS)
MAKERS = {"symmetric": grids.symmetric, "minmax": grids.asymmetric}


def grid_for(array, mode, axis):
    low, high = grids.value_range(array, axis)
    return MAKERS[mode](low, high, axis)


@settings(max_examples=60, deadline=None)
@given(array=ARRAYS, per_axis=st.booleans())
def test_float8_is_off_by_a_sixteenth_of_each_number_at_most(array, per_axis):
    axis = array.ndim - 1 if per_axis else None
    low, high = grids.value_range(array, axis)
    grid = grids.float8(low, high, axis)
    back = grids.dequantize(grids.quantize(array, grid), grid)
    least = along(grid.scale, axis, array.ndim) * 2.0**-9  # steps of numbers below the normal ones
    assert np.isfinite(back).all()
    assert (np.abs(back - array) <= np.abs(array) / 16 * (1 + 1e-5) + least).all()
    assert (
        np.abs(back - array).max() <= 2 * grids.error_bound(low, high, grid) * np.abs(array).max() * (1 + 1e-5)
    ).all()


@pytest.mark.parametrize("mode", MAKERS)
@settings(max_examples=60, deadline=None)
@given(array=ARRAYS, per_axis=st.booleans())
def test_round_trip_is_off_by_half_a_step_at_most(mode, array, per_axis):
    axis = array.ndim - 1 if per_axis else None
    grid = grid_for(array, mode, axis)
    back = grids.dequantize(grids.quantize(array, grid), grid)
    step = along(grid.scale, axis, array.ndim).astype(np.float64)
    error = np.abs(back.astype(np.float64) - array)
    # Beyond half a step, only what float32 itself rounds away of numbers this large.
    assert np.all(error <= step / 2 + 2e-7 * (np.abs(array) + 128 * step))
    assert np.all(back[array == 0] == 0)


@settings(max_examples=60, deadline=None)
@given(
    array=ARRAYS,
    zero_point=st.integers(0, 255),
    scale=st.floats(2**-10, 2**10, width=32),
    signed=st.booleans(),
)
def test_matches_the_runtime_bit_for_bit_even_out_of_reach(array, zero_point, scale, signed):
    dtype = np.int8 if signed else np.uint8
    point = np.asarray(zero_point - 128 if signed else zero_point, dtype)
    grid = grids.Grid(np.asarray(scale, np.float32), point, None)
    integers, reals = run_in_runtime(array, grid)
    np.testing.assert_array_equal(grids.quantize(array, grid), integers)
    np.testing.assert_array_equal(grids.dequantize(integers, grid), reals)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("mode", MAKERS)
def test_matches_the_runtime_per_axis(mode, axis):
    rng = np.random.default_rng(axis)
    array = rng.normal(size=(7, 33, 5)).astype(np.float32) * rng.lognormal(size=(7, 33, 5)).astype(np.float32)
    grid = grid_for(array, mode, axis)
    integers, reals = run_in_runtime(array, grid)
    np.testing.assert_array_equal(grids.quantize(array, grid), integers)
    np.testing.assert_array_equal(grids.dequantize(integers, grid), reals)


def run_in_runtime(array, grid):
    axis = "" if grid.axis is None else f"<axis = {grid.axis}>"
    dims = ",".join(map(str, array.shape))
    sizes = ",".join(map(str, grid.scale.shape))
    scalar = f"[{sizes}]" if sizes else ""
    graph = f"""
        <ir_version: 8, opset_import: ["" : 13]>
        agraph (float[{dims}] x, float{scalar} s, {grid.dtype}{scalar} z) => ({grid.dtype}[{dims}] q, float[{dims}] y) {{
            q = QuantizeLinear {axis} (x, s, z)
            y = DequantizeLinear {axis} (q, s, z)
        }}
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = onnx.parser.parse_model(graph).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": array, "s": grid.scale, "z": grid.zero_point})


def test_halves_go_to_the_even_integer():
    grid = grids.Grid(np.float32(1).reshape(()), np.asarray(0, np.int8), None)
    array = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    assert grids.quantize(array, grid).tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("mode", MAKERS)
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-39, -3e-38])
def test_channels_without_range_get_a_usable_scale(mode, tiny):
    array = np.array([[tiny] * 4, [1, -2, 3, 4]], np.float32)
    grid = grid_for(array, mode, 0)
    assert grid.scale[0] == 1
    back = grids.dequantize(grids.quantize(array, grid), grid)
    assert back[0].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(back[1], array[1], atol=float(grid.scale[1]) / 2 + 1e-6)


def test_a_constant_channel_is_restored():
    array = np.full((2, 8), 0.3, np.float32)
    for mode in MAKERS:
        grid = grid_for(array, mode, 0)
        np.testing.assert_allclose(grids.dequantize(grids.quantize(array, grid), grid), array, rtol=1e-6)


def test_minmax_uses_all_levels_of_a_one_sided_range():
    array = np.linspace(2, 3, 101, dtype=np.float32)
    grid = grid_for(array, "minmax", None)
    assert (grid.zero_point, grid.dtype) == (0, np.uint8)
    assert grids.quantize(array, grid).max() == 255
    assert grid_for(-array, "minmax", None).zero_point == 255


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_scale_in_sixteen_bits_is_rounded_up_so_that_nothing_saturates(dtype):
    largest = np.linspace(0.001, 0.01, 200, dtype=np.float32)
    grid = grids.symmetric(-largest, largest, 0, dtype)
    assert grid.scale.dtype == dtype
    assert np.all(grid.scale.astype(np.float64) * 127 >= largest)
    assert np.all(grid.scale.astype(np.float64) * 127 <= largest * 1.01)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_quantize_like_float32(dtype):
    array = np.random.default_rng(0).normal(size=(5, 70)).astype(dtype)
    same = array.astype(np.float64).astype(np.float32)
    grid, expected = grid_for(array, "symmetric", 0), grid_for(same, "symmetric", 0)
    assert grid.scale.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert np.count_nonzero(grids.quantize(array, grid) != grids.quantize(same, expected)) <= 2


def test_huge_float64_ranges_do_not_overflow():
    low, high = np.asarray(-1.7e308), np.asarray(1.7e308)
    for make in MAKERS.values():
        assert np.isfinite(make(low, high).scale)


def test_ranges_show_nan_and_infinity():
    array = np.zeros((4, 3), np.float32)
    array[1, 1], array[2, 0] = np.nan, np.inf
    low, high = grids.value_range(array, 0)
    assert np.isfinite(low).tolist() == [True, False, True, True]
    assert np.isfinite(high).tolist() == [True, False, False, True]


def test_error_bound_is_relative_to_the_widened_range():
    low, high = np.array([-1, 0, 0], np.float32), np.array([1, 1, 0], np.float32)
    symmetric, minmax = grids.symmetric(low, high, 0), grids.asymmetric(low, high, 0)
    assert math.isclose(grids.error_bound(low, high, symmetric), 1 / 254, rel_tol=1e-6)
    assert math.isclose(grids.error_bound(low, high, minmax), 1 / 510, rel_tol=1e-6)


def test_a_grid_whose_parts_do_not_fit_is_an_error():
    with pytest.raises(ValueError, match="do not fit axis"):
        grids.Grid(np.ones(3, np.float32), np.zeros(2, np.int8), 0)
    with pytest.raises(ValueError, match="do not fit axis"):
        grids.Grid(np.ones(3, np.float32), np.zeros(3, np.int8), None)


@settings(max_examples=100, deadline=None)
@given(shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), limit=st.integers(1, 40))
def test_blocks_cover_an_array_once_in_memory_order(shape, limit):
    array = np.arange(math.prod(shape)).reshape(shape)
    pieces = [array[index] for index in blocks(shape, limit)]
    assert all(piece.ndim == array.ndim and 0 < piece.size <= limit for piece in pieces)
    joined = np.concatenate([piece.reshape(-1) for piece in pieces]) if pieces else np.array([])
    assert joined.tolist() == array.reshape(-1).tolist()


def test_small_blocks_give_the_same_result(monkeypatch):
    array = np.random.default_rng(0).normal(size=(6, 40, 7)).astype(np.float32)
    for axis in (None, 0, 1, 2):
        grid = grid_for(array, "minmax", axis)
        whole = grids.quantize(array, grid)
        with monkeypatch.context() as patch:
            patch.setattr(grids, "blocks", lambda shape: blocks(shape, 13))
            np.testing.assert_array_equal(grid_for(array, "minmax", axis).scale, grid.scale)
            np.testing.assert_array_equal(grids.quantize(array, grid), whole)


@pytest.mark.parametrize("mode", MAKERS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_number_has_a_grid_too(mode, dtype):
    array = np.asarray(3.0, dtype)
    grid = grid_for(array, mode, None)
    integers = grids.quantize(array, grid)
    assert (integers.shape, integers.dtype) == ((), grid.dtype)
    assert grids.dequantize(integers, grid) == pytest.approx(3.0, rel=1e-2)
