import numpy as np
import onnx
import pytest
from onnx import numpy_helper

PASSES = "fold-constants,settle-shapes,remove-identities,merge-layout,remove-dead-code,simplify-masks,remove-dead-code"
CONSTANTS = {
    "n0": np.array(0, np.int64),
    "n1": np.array(1, np.int64),
    "i0": np.array([0], np.int64),
    "i1": np.array([1], np.int64),
    "i3": np.array([3], np.int64),
    "i01": np.array([0, 1], np.int64),
    "i12": np.array([1, 2], np.int64),
    "i013": np.array([0, 1, 3], np.int64),
    "i012": np.array([0, 1, 2], np.int64),
    "i123": np.array([1, 2, 3], np.int64),
    "i4": np.array([4], np.int64),
    "m1": np.array([-1], np.int64),
    "zero": np.array(0, np.float32),
    "few": np.array(-1e4, np.float32),
    "lowest": np.array(np.finfo(np.float32).min, np.float32),
    "inf": np.array(-np.inf, np.float32),
    "true": np.array(True),
    "false": np.array([False]),
    "square": np.tril(np.ones((4, 4), bool)),
    "column": np.array([[True], [False]]),
}
SIZES = "ms = Shape(mask) b = Gather(ms, n0) t = Gather(ms, n1) "
GRID = (
    SIZES + "rb = Range(n0, b, n1) rt = Range(n0, t, n1) gb = Unsqueeze(rb, i123) gi = Unsqueeze(rt, i013) "
    "gj = Unsqueeze(rt, i012) "
)
# The mask that torch.export writes: mask[b, j], gathered along a grid, where every query may look.
GATHERED = (
    GRID + "yes = GreaterOrEqual(gi, n0) most = And(true, yes) big = Max(gb, gj) whole = Shape(big) "
    "eb = Expand(gb, whole) et = Expand(gj, whole) ub = Unsqueeze(eb, m1) ut = Unsqueeze(et, m1) "
    "at = Concat<axis=-1>(ub, ut) picked = GatherND(mask, at) cond = And(most, picked) "
)


def model(nodes, opset=18, inputs="float[B,2,T,T] s, bool[B,T] mask", outputs="float[B,2,T,T] y"):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {nodes} }}'
    )
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in used)
    return proto


def test_the_mask_of_torch_export(rewritten):
    found = rewritten(model(GATHERED + "m = Where(cond, zero, lowest) y = Add(s, m)"), PASSES)
    assert found.ops == {"Unsqueeze": 1, "Where": 1, "Add": 1}


def test_gather_of_a_flattened_mask(rewritten):
    nodes = (
        GRID + "ft = Reshape(mask, flat) row = Mul(gb, t) at = Add(row, gj) picked = Gather(ft, at) "
        "m = Where(picked, zero, lowest) y = Add(s, m)"
    )
    proto = model(nodes)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "flat"))
    assert rewritten(proto, PASSES).ops == {"Unsqueeze": 1, "Where": 1, "Add": 1}


def test_a_gather_may_transpose(rewritten):
    nodes = (
        SIZES + "rb = Range(n0, b, n1) rt = Range(n0, t, n1) gb = Unsqueeze(rb, i0) gt = Unsqueeze(rt, i1) "
        "big = Max(gb, gt) whole = Shape(big) eb = Expand(gb, whole) et = Expand(gt, whole) "
        "ub = Unsqueeze(eb, m1) ut = Unsqueeze(et, m1) at = Concat<axis=-1>(ub, ut) y = GatherND(mask, at)"
    )
    found = rewritten(model(nodes, inputs="bool[B,T] mask", outputs="bool[T,B] y"), PASSES)
    assert found.ops == {"Transpose": 1}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("rt = Range(n0, t, n1)", "rt = Range(n0, b, n1)"),  # not all of the axis
        ("rb = Range(n0, b, n1)", "rb = Range(n1, b, n1)"),  # not from the first on
        ("Concat<axis=-1>(ub, ut)", "Concat<axis=-1>(ub, ub)"),  # a diagonal
    ],
)
def test_other_gathers_stay(rewritten, before, after):
    nodes = GATHERED.replace(before, after, 1) + "m = Where(cond, zero, lowest) y = Add(s, m)"
    assert rewritten(model(nodes), PASSES, verify=False).ops["GatherND"] == 1


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        ("c = GreaterOrEqual(gi, n0) k = And(c, m4)", {"Unsqueeze", "Where", "Add"}),
        ("c = Less(gi, n0) k = Or(m4, c)", {"Unsqueeze", "Where", "Add"}),
        ("e = Add(gj, n1) c = Greater(e, gj) k = And(m4, c)", {"Unsqueeze", "Where", "Add"}),
        ("e = Sub(t, gj) c = Greater(e, n0) k = And(m4, c)", {"Unsqueeze", "Where", "Add"}),
        ("c = GreaterOrEqual(gi, n0) n = Not(c) k = Not(n)", {"Relu"}),
        ("c = GreaterOrEqual(gi, gj) k = And(c, m4)", {"GreaterOrEqual", "And"}),
        ("c = Greater(gi, n0) k = And(c, m4)", {"Greater", "And"}),
        ("e = Sub(t, gj) c = Greater(e, n1) k = And(m4, c)", {"Greater", "And"}),
    ],
)
def test_conditions_over_counting_indices(rewritten, condition, left):
    nodes = GRID + f"m4 = Unsqueeze(mask, i12) {condition} m = Where(k, zero, lowest) z = Add(s, m) y = Relu(z)"
    found = rewritten(model(nodes), PASSES)
    if left & {"GreaterOrEqual", "Greater"}:
        assert left <= set(found.ops)
    else:
        assert set(found.ops) == left | {"Relu"}


def test_a_mask_stays_wide_where_its_shape_is_seen(rewritten):
    nodes = GATHERED + "y = Where(cond, zero, lowest)"
    found = rewritten(model(nodes, inputs="bool[B,T] mask", outputs="float[B,1,T,T] y"), PASSES)
    assert found.ops["And"] == 1


def test_layers_share_the_narrow_mask(rewritten):
    nodes = GATHERED + "m = Where(cond, zero, lowest) z = Add(s, m) y = Add(z, m)"
    assert rewritten(model(nodes), PASSES).ops == {"Unsqueeze": 1, "Where": 1, "Add": 2}


def test_a_mask_that_is_all_zero_goes(rewritten):
    nodes = GRID + "c = GreaterOrEqual(gi, n0) m = Where(c, zero, lowest) y0 = Add(s, m) y = Relu(y0)"
    assert rewritten(model(nodes), PASSES).ops == {"Relu": 1}


GUARD = "p = Softmax<axis=-1>(sm) n = IsNaN(p) y = Where(n, zero, p) "
SCORES = "st = Transpose<perm=[0,1,3,2]>(s) k = MatMul(s, st) "
FINITE = "a row may be masked in full with -infinity, which gives NaN, and the guard makes that 0"


@pytest.mark.parametrize(
    "masked",
    [
        "sm = Identity(k)",
        "m4 = Unsqueeze(mask, i12) m = Where(m4, zero, lowest) sm = Add(k, m)",
        "m4 = Unsqueeze(mask, i12) f = Cast<to=1>(m4) m = Mul(f, few) sm = Add(m, k)",
        "m4 = Unsqueeze(mask, i12) m = Where(m4, zero, few) km = Add(k, m) sm = Add(km, m)",
        GRID + "c = LessOrEqual(gj, gi) m = Where(c, zero, inf) sm = Add(k, m)",
        GRID + "c = Less(gi, gj) m = Where(c, zero, few) sm = Add(k, m)",
        GRID + "e = Add(gi, n1) c = Less(gj, e) m = Where(c, zero, inf) sm = Add(k, m)",
        "m4 = Unsqueeze(mask, i12) sm = Where(m4, k, lowest)",
    ],
)
def test_guards_that_never_apply_go(rewritten, masked):
    found = rewritten(model(f"{SCORES} {masked} {GUARD}"), PASSES)
    assert "IsNaN" not in found.ops


@pytest.mark.parametrize(
    "masked",
    [
        "m4 = Unsqueeze(mask, i12) m = Where(m4, zero, inf) sm = Add(k, m)",
        "m4 = Unsqueeze(mask, i12) m = Where(m4, zero, lowest) km = Add(k, m) sm = Add(km, m)",  # -6.8e38
        GRID + "c = Less(gj, gi) m = Where(c, zero, inf) sm = Add(k, m)",  # nothing for the first query
        GRID
        + "c = LessOrEqual(gj, gi) m4 = Unsqueeze(mask, i12) a = And(c, m4) m = Where(a, zero, inf) sm = Add(k, m)",
        "sm = Add(k, s)",  # the caller's
    ],
)
def test_guards_that_may_apply_stay(rewritten, masked):
    found = rewritten(model(f"{SCORES} {masked} {GUARD}"), PASSES)
    assert found.ops["IsNaN"] == 1
    assert FINITE in found.refusals


def test_a_guard_of_something_else_stays(rewritten):
    found = rewritten(model(f"{SCORES} sm = Identity(s) {GUARD}"), PASSES)
    assert found.ops["IsNaN"] == 1
    assert "it is not known that what is put into the softmax is finite" in found.refusals
    found = rewritten(model(f"{SCORES} sm = Identity(k) {GUARD}".replace("axis=-1>(sm)", "axis=2>(sm)")), PASSES)
    assert found.ops["IsNaN"] == 1
    assert "the softmax is not over the last axis" in found.refusals


@pytest.mark.parametrize(
    "masked", ["sm = Mul(k, s)", "sm = Mul(s, k)", "sm = Div(k, s)", "sm = Div(k, zero)", "sm = Div(few, k)", "sm = Mul(inf, k)"]
)  # fmt: skip
def test_scores_times_something_that_may_be_infinite_are_guarded(rewritten, masked):
    found = rewritten(model(f"{SCORES} {masked} {GUARD}"), PASSES, verify=False)
    assert found.ops["IsNaN"] == 1
    assert "it is not known that what is put into the softmax is finite" in found.refusals


def test_scaled_scores_need_no_guard(rewritten):
    found = rewritten(model(f"{SCORES} ks = Mul(few, k) kd = Div(ks, few) sm = Reshape(kd, whole) {GUARD}".replace(
        "st =", "whole = Shape(s) st =", 1)), PASSES)  # fmt: skip
    assert "IsNaN" not in found.ops


def test_a_causal_constant_keeps_a_key_in_every_row(rewritten):
    nodes = "st = Transpose<perm=[0,1,3,2]>(s) k = MatMul(s, st) m = Where(square, zero, inf) sm = Add(k, m) " + GUARD
    proto = model(nodes, inputs="float[B,2,4,4] s", outputs="float[B,2,4,4] y")
    assert "IsNaN" not in rewritten(proto, PASSES).ops
