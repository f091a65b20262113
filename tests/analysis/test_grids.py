"""Counting tensors, truth values over them, and bounds: against what the runtime computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from onnxopt.analysis.bounds import Bounds, bounds
from onnxopt.analysis.dims import evaluate
from onnxopt.analysis.grids import at_least, grid, some_true_in_row, truth
from onnxopt.analysis.shapes import Shapes

CONSTANTS: dict[str, np.ndarray] = {
    "n0": np.array(0, np.int64),
    "n1": np.array(1, np.int64),
    "n3": np.array(3, np.int64),
    "i0": np.array([0], np.int64),
    "i1": np.array([1], np.int64),
    "table": np.arange(5, 25, 2, dtype=np.int64).reshape(2, 5),
    "uneven": np.array([1, 2, 4], np.int64),
    "zero": np.array(0, np.float32),
    "low": np.array(-3.4e38, np.float32),
    "inf": np.array(-np.inf, np.float32),
    "nan": np.array(np.nan, np.float32),
    "pair": np.array([-2, 3], np.float32),
    "yes": np.array([[True, True]]),
    "some": np.array([[True, False], [False, True]]),
}
SETUP = "sx = Shape(x) b = Gather(sx, n0) t = Gather(sx, n1) rb = Range(n0, b, n1) rt = Range(n0, t, n1) "


def graph(nodes: str) -> tuple[onnx.ModelProto, ir.Model, Shapes]:
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[B,T] x, bool[B,T] m) => (float[B,T] out) '
        f"{{ {SETUP} {nodes} out = Identity(x) }}"
    )
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items())
    model = ir.from_proto(proto)
    return proto, model, Shapes(model)


def value(model: ir.Model, name: str = "y") -> ir.Value:
    return next(o for n in model.graph for o in n.outputs if o.name == name)


def computed(proto: onnx.ModelProto, b: int, t: int) -> np.ndarray:
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    shown.graph.output.append(onnx.ValueInfoProto(name="y"))
    session = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"x": np.zeros((b, t), np.float32), "m": np.zeros((b, t), bool)}
    found: np.ndarray = session.run(["y"], {i.name: feed[i.name] for i in session.get_inputs()})[0]
    return found


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Identity(rt)",
        "y = Range(n3, t, n1)",
        "r = Range(n1, t, n3) y = Unsqueeze(r, i0)",
        "u = Unsqueeze(rb, i1) y = Add(u, rt)",
        "u = Unsqueeze(rb, i1) k = Mul(u, t) y = Add(k, rt)",
        "u = Unsqueeze(rb, i1) d = Sub(rt, u) y = Transpose<perm=[1,0]>(d)",
        "u = Unsqueeze(rt, i0) y = Expand(u, sx)",
        "k = Cast<to=6>(rt) y = Cast<to=7>(k)",
        "y = Identity(table)",
    ],
)
def test_a_grid_is_what_the_runtime_computes(nodes: str) -> None:
    proto, model, shapes = graph(nodes)
    read = grid(value(model), shapes)
    assert read is not None
    for b, t in ((2, 5), (1, 1), (3, 8)):
        sizes = {("B", False): b, ("T", False): t}
        expected = computed(proto, b, t)
        shape = tuple(evaluate(d, sizes) for d in read.shape)
        made = np.full(shape, evaluate(read.base, sizes))
        for axis, step in enumerate(read.steps):
            along = np.arange(shape[axis]) * evaluate(step, sizes)
            made = made + along.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    "nodes", ["y = Identity(uneven)", "u = Unsqueeze(rt, i1) y = Mul(u, rt)", "y = Gather(uneven, rt)"]
)
def test_what_does_not_count_is_no_grid(nodes: str) -> None:
    _, model, shapes = graph(nodes)
    assert grid(value(model), shapes) is None


@pytest.mark.parametrize(
    ("nodes", "known"),
    [
        ("y = GreaterOrEqual(rt, n0)", True),
        ("y = Greater(rt, n0)", None),
        ("y = Less(rt, t)", True),
        ("y = GreaterOrEqual(rt, t)", False),
        ("e = Add(rt, n1) y = LessOrEqual(e, rt)", False),
        ("u = Unsqueeze(rb, i1) y = Less(rt, u)", None),
        ("a = Less(rt, n0) y = Not(a)", True),
        ("a = GreaterOrEqual(rt, n0) y = And(a, m)", None),
        ("a = Less(rt, n0) y = And(a, m)", False),
        ("a = GreaterOrEqual(rt, n0) y = Or(m, a)", True),
        ("y = Expand(yes, sx)", True),
        ("y = Identity(some)", None),
        ("y = Identity(m)", None),
    ],
)
def test_truth(nodes: str, known: bool | None) -> None:
    proto, model, shapes = graph(nodes)
    assert truth(value(model), shapes) is known
    if known is not None and "yes" not in nodes:
        assert (computed(proto, 2, 5) == known).all()


@pytest.mark.parametrize(
    ("nodes", "kept"),
    [
        ("u = Unsqueeze(rt, i1) y = LessOrEqual(rt, u)", True),
        ("u = Unsqueeze(rt, i1) y = Less(rt, u)", False),
        ("u = Unsqueeze(rt, i1) a = Greater(rt, u) y = Not(a)", True),
        ("u = Unsqueeze(rt, i1) y = GreaterOrEqual(rt, u)", True),
        ("u = Unsqueeze(rb, i1) y = LessOrEqual(u, rt)", False),  # more sequences than keys
        ("y = Identity(m)", False),
    ],
)
def test_rows_with_something_true(nodes: str, kept: bool) -> None:
    proto, model, shapes = graph(nodes)
    assert some_true_in_row(value(model), shapes) is kept
    if kept:
        assert all(computed(proto, 2, t).any(axis=-1).all() for t in (1, 5))


def test_rows_of_a_constant() -> None:
    _, model, shapes = graph("y = Identity(m)")
    assert some_true_in_row(model.graph.initializers["some"], shapes)
    assert some_true_in_row(model.graph.initializers["yes"], shapes)


def test_a_comparison_as_a_grid() -> None:
    _, model, shapes = graph("u = Unsqueeze(rt, i1) y = Less(u, rt)")
    read = at_least(value(model), shapes)
    assert read is not None
    difference, positive = read
    assert (difference.base, difference.steps, positive) == (0, (1, -1), False)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = Where(m, zero, low)", Bounds(float(np.float32(-3.4e38)), 0)),
        ("y = Where(m, zero, inf)", Bounds(-np.inf, 0)),
        ("y = Where(m, zero, nan)", None),
        ("a = Where(m, zero, low) y = Add(a, a)", Bounds(-np.inf, 0)),
        ("a = Where(m, zero, low) u = Unsqueeze(a, i1) y = Neg(u)", Bounds(0, float(np.float32(3.4e38)))),
        ("f = Cast<to=1>(m) y = Mul(f, pair)", Bounds(-2, 3)),
        ("f = Cast<to=1>(m) y = Sub(pair, f)", Bounds(-3, 3)),
        ("a = Where(m, zero, inf) y = Mul(a, pair)", None),
        ("a = Where(m, zero, inf) y = Sub(a, a)", None),
        ("a = Where(m, zero, inf) c = Neg(a) y = Add(a, c)", None),
        ("a = Where(m, zero, inf) y = Add(a, pair)", Bounds(-np.inf, 3)),
        ("a = Where(m, zero, low) c = Where(m, pair, zero) y = Max(a, c)", Bounds(-2, 3)),
        ("y = Min(pair, zero)", Bounds(-2, 0)),
        ("y = Concat<axis=0>(pair, pair)", Bounds(-2, 3)),
        ("f = Cast<to=1>(m) y = Trilu(f)", Bounds(0, 1)),
        ("y = ConstantOfShape<value = float[1] {-4.0}>(sx)", Bounds(-4, -4)),
        ("a = GreaterOrEqual(rt, n0) y = Where(a, zero, inf)", Bounds(0, 0)),
        ("y = Sigmoid(x)", Bounds(0, 1)),
        ("y = Neg(x)", None),
        ("y = Cast<to=1>(rt)", Bounds(-(2.0**63), 2.0**63 - 1)),
        ("h = Cast<to=10>(rt) y = Cast<to=1>(h)", Bounds(-np.inf, np.inf)),
    ],
)
def test_bounds(nodes: str, expected: Bounds | None) -> None:
    _, model, shapes = graph(nodes)
    assert bounds(value(model), shapes) == expected
