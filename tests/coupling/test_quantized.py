"""Channels of models that are quantized already: those whose grids the file gives can go."""

import numpy as np
import pytest

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Refusal
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.grids import numbers
from onnxopt.coupling.importance import magnitude
from onnxopt.passes.prune.merge_channels import MergeChannels


def integers(*shape, dtype=np.int8, seed=0):
    # Of 7 bits: sums of two products of 8 bits overflow in kernels of processors without VNNI.
    low, high = (-60, 60) if dtype == np.int8 else (5, 250)
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


SCALES = {"s": np.float32(0.05), "z": np.uint8(7)}


@pytest.mark.parametrize("channels", [False, True])
def test_convolutions_of_integers_to_given_grids(prune, channels):
    zero = integers(8, seed=4) if channels else np.int8(3)
    scale = np.linspace(0.01, 0.02, 8, dtype=np.float32) if channels else np.float32(0.01)
    done = prune(
        """(float[1,3,5,5] x) => (float[1,4,5,5] y) {
        q = QuantizeLinear(x, s, z) a = QLinearConv(q, s, z, w, ws, wz, s, z, b)
        c = QLinearConv <group = 2> (a, s, z, u, us, uz, s, z) y = DequantizeLinear(c, s, z) }""",
        {**SCALES, "w": integers(8, 3, 1, 1), "ws": scale, "wz": zero, "b": integers(8).astype(np.int32),
         "u": integers(4, 4, 1, 1, dtype=np.uint8), "us": np.float32(0.01), "uz": np.uint8(120)},
    )  # fmt: skip
    assert done.groups == {"w": 4}  # both groups of the second one keep equal sizes
    assert [done.shape(name) for name in "wub"] == [[4, 3, 1, 1], [4, 2, 1, 1], [4]]


def test_products_of_integers_to_given_grids(prune):
    done = prune(
        """(float[2,6] x) => (float[2,4] y) {
        q = QuantizeLinear(x, s, z) a = QLinearMatMul(q, s, z, w, ws, wz, s, z)
        c = com.microsoft.QGemm <transB = 1> (a, s, z, v, ws, wz, b, s, z) d = com.microsoft.QLinearAdd(c, s, z, c, s, z, s, z)
        e = com.microsoft.QLinearSigmoid(d, s, z, s, z) f = QLinearMatMul(e, s, z, u, us, uz, s, z)
        y = DequantizeLinear(f, s, z) }""",
        {**SCALES, "w": integers(6, 8), "v": integers(10, 8, seed=1), "ws": np.float32(0.01), "wz": np.int8(-2),
         "b": integers(10).astype(np.int32), "u": integers(10, 4, seed=2), "us": np.linspace(0.01, 0.02, 4, dtype=np.float32),
         "uz": integers(4, seed=3)},
    )  # fmt: skip
    assert done.groups == {"w": 8, "v": 10}
    assert [done.shape(name) for name in "wvu"] == [[6, 4], [5, 4], [5, 4]]


def test_what_follows_from_integers_of_a_range_found_at_run_time(prune):
    done = prune(
        """(float[2,6] x) => (float[2,4] y) {
        q, s, z = DynamicQuantizeLinear(x) a = MatMulInteger(q, w, z, wz) b = Cast <to = 1> (a) c = Mul(s, ws)
        d = Mul(b, c) e = Relu(d) y = MatMul(e, v) }""",
        {"w": integers(6, 8, dtype=np.uint8), "wz": integers(8, dtype=np.uint8), "ws": np.float32(0.01)}, v=(8, 4),
    )  # fmt: skip
    assert done.groups == {"w": 8}
    assert done.shape("wz") == [4]


@pytest.mark.parametrize(
    "product",
    [
        "com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b)",
        "com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz, b)",
    ],
)
def test_products_that_come_out_scaled(prune, product):
    done = prune(
        f"""(float[2,6] x) => (float[2,4] y) {{
        q, s, z = DynamicQuantizeLinear(x) a = {product} e = Relu(a) y = MatMul(e, v) }}""",
        {"w": integers(6, 8), "wz": np.zeros(8, np.int8), "ws": np.linspace(0.01, 0.02, 8, dtype=np.float32)},
        b=(8,), v=(8, 4),
    )  # fmt: skip
    assert done.groups == {"w": 8}
    assert [done.shape(name) for name in ("w", "ws", "b")] == [[6, 4], [4], [4]]


def test_what_shares_a_range_found_at_run_time_stays(build):
    model = build(
        """(float[1,6,3,3] x) => (float[1,4,3,3] y) {
        h = Conv(x, w) q, s, z = DynamicQuantizeLinear(h) a = ConvInteger(q, u, z) b = Cast <to = 1> (a) y = Mul(b, s) }""",
        {"u": integers(4, 8, 1, 1)}, w=(8, 6, 1, 1),
    )  # fmt: skip
    coupling = analyse(model)
    assert coupling.groups == ()
    reason = "DynamicQuantizeLinear q takes its range from all channels together"
    assert coupling.frozen(model.graph.initializers["w"], 0) == reason
    assert coupling.frozen(model.graph.initializers["u"], 1) == reason


QDQ = """(float[2,6] x) => (float[2,4] y) {
    f = DequantizeLinear(w, ws, wz) a = MatMul(x, f) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z)
    g = DequantizeLinear <axis = 1> (u, us) y = MatMul(d, g) }"""
GIVEN = {**SCALES, "w": integers(6, 8, dtype=np.uint8), "ws": np.float32(0.1), "wz": np.uint8(128),
         "u": integers(8, 4), "us": np.linspace(0.01, 0.02, 4, dtype=np.float32)}  # fmt: skip


def test_pairs_around_float_operators(prune):
    done = prune(QDQ, GIVEN)
    assert done.groups == {"w": 8}
    assert [done.shape(name) for name in "wu"] == [[6, 4], [4, 4]]


def test_importance_is_that_of_the_numbers_that_are_meant(build):
    (group,) = analyse(build(QDQ, GIVEN)).groups
    first, second = (numbers(member.value, member.tensor) for member in group.members)
    np.testing.assert_allclose(first, (GIVEN["w"].astype(np.float32) - 128) * np.float32(0.1), rtol=1e-6)
    np.testing.assert_allclose(second, GIVEN["u"] * GIVEN["us"], rtol=1e-6)
    parts = [np.square(first).sum(axis=0), np.square(second).sum(axis=1)]
    np.testing.assert_allclose(magnitude(group), sum(part / part.mean() for part in parts), rtol=1e-5)


def test_quantized_weights_are_not_summed_up(build):
    model = build(QDQ, GIVEN)
    ctx = Context(target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model))
    (refusal,) = MergeChannels().run(model, ctx)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "a weight behind it is quantized, and sums of its slices would not be"


NHWC_POOL = "com.microsoft.NhwcMaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)"


def test_maxima_of_integers_with_channels_last(prune):
    done = prune(
        f"""(float[1,3,6,6] x) => (float[1,4,3,3] y) {{
        q = QuantizeLinear(x, s, z) a = QLinearConv(q, s, z, w, s, wz, s, z)
        t = Transpose <perm = [0, 2, 3, 1]> (a) m = {NHWC_POOL} u = Transpose <perm = [0, 3, 1, 2]> (m)
        d = DequantizeLinear(u, s2, z) y = Conv(d, v) }}""",
        {**SCALES, "s2": np.float32(0.2), "w": integers(8, 3, 1, 1), "wz": np.int8(0)}, v=(4, 8, 1, 1), opset=11,
    )  # fmt: skip
    assert done.groups == {"w": 8}
    assert [done.shape(name) for name in "wv"] == [[4, 3, 1, 1], [4, 4, 1, 1]]


@pytest.mark.parametrize("height", [3, "h"])
def test_integers_that_gathers_repeat(prune, height):
    index = "i = Identity(known)" if height == 3 else (
        "n = Shape(t) c = Gather <axis = 0> (n, one) e = Mul(c, two) r = Range(zero, e, one) i = Div(r, two)"
    )  # fmt: skip
    done = prune(
        f"""(float[1,3,{height},6] x) => (float[1,4,{"6" if height == 3 else "H"},6] y) {{
        q = QuantizeLinear(x, s, z) a = QLinearConv(q, s, z, w, s, wz, s, z)
        t = Transpose <perm = [0, 2, 3, 1]> (a) {index} g = Gather <axis = 1> (t, i)
        u = Transpose <perm = [0, 3, 1, 2]> (g) d = DequantizeLinear(u, s, z) y = Conv(d, v) }}""",
        {**SCALES, "w": integers(8, 3, 1, 1), "wz": np.int8(0), "known": np.array([0, 0, 1, 1, 2, 2]),
         "zero": np.int64(0), "one": np.int64(1), "two": np.int64(2)},
        v=(4, 8, 1, 1), opset=11,
    )  # fmt: skip
    assert done.groups == {"w": 8}
    assert [done.shape(name) for name in "wv"] == [[4, 3, 1, 1], [4, 4, 1, 1]]


@pytest.mark.parametrize("height", [3, "h"])
def test_windows_that_a_change_of_order_makes(prune, height):
    done = prune(
        f"""(float[1,3,{height},{height}] x) => (float[1,4,{"6,6" if height == 3 else "H,W"}] y) {{
        a = Conv(x, w, b) r = Relu(a) t = Transpose <perm = [0, 3, 2, 1]> (r) c = Reshape(t, rows)
        d = Transpose <perm = [0, 2, 1, 3]> (c) e = Reshape(d, columns) f = Transpose <perm = [0, 3, 1, 2]> (e)
        y = Conv(f, v) }}""",
        {"rows": np.array([0, 0, -1, 12]), "columns": np.array([0, 0, -1, 6])},
        w=(24, 3, 1, 1), b=(24,), v=(4, 6, 1, 1), opset=11,
    )  # fmt: skip
    assert done.groups == {"w": 6}
    assert [done.shape(name) for name in "wbv"] == [[12, 3, 1, 1], [12], [4, 3, 1, 1]]


def test_a_row_of_computed_size_keeps_its_channels(prune):
    """Its size is worked out from that of the channels, and would no longer fit."""
    done = prune(
        """(float[1,3,h,4] x) => (float[1,4,6,H] y) {
        a = Conv(x, w) t = Transpose <perm = [0, 3, 2, 1]> (a) n = Shape(t) p = Gather(n, places) m = ReduceProd(p)
        k = Div(m, six) s = Concat <axis = 0> (begin, k, six) c = Reshape(t, s) u = Transpose <perm = [0, 3, 1, 2]> (c)
        y = Conv(u, v) }""",
        {"places": np.array([2, 3]), "six": np.array([6]), "begin": np.array([0, 0])}, w=(12, 3, 1, 1), v=(4, 6, 1, 1),
        opset=11,
    )  # fmt: skip
    assert done.groups == {}
