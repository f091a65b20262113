"""Views: what they say is shown must be what the runtime shows."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxopt.analysis.dims import evaluate
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import View, measured, view

CONSTANTS: dict[str, np.ndarray] = {
    "heads": np.array([0, 0, 3, 4], np.int64),
    "three": np.array([0, 0, 3, 2, 2], np.int64),
    "rows": np.array([-1, 12], np.int64),
    "merged": np.array([0, 0, 12], np.int64),
    "third": np.array([4, 4, 4], np.int64),
    "i0": np.array([0], np.int64),
    "i1": np.array([1], np.int64),
    "i2": np.array([2], np.int64),
    "m1": np.array([-1], np.int64),
    "m4": np.array([-4], np.int64),
    "i4": np.array([4], np.int64),
    "i8": np.array([8], np.int64),
    "end": np.array([2**62], np.int64),
    "n1": np.array(1, np.int64),
    "half": np.array(0.5, np.float32),
    "four": np.array([4], np.float32),
    "copies": np.array([1, 1, 5, 1, 1], np.int64),
}


def read(nodes: str, **allowed: bool) -> tuple[onnx.ModelProto, View]:
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[B,S,12] x) => (float[] y) {{ {nodes} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in used)
    model = ir.from_proto(proto)
    found = view(model.graph.outputs[0], Shapes(model), **allowed)
    assert found is not None
    return proto, found


def shown(found: View, x: np.ndarray) -> np.ndarray:
    """Return the elements that a view of x shows."""
    sizes = dict(zip([("B", False), ("S", False)], x.shape, strict=False))
    axes = [[(leaf, evaluate(leaf.size, sizes)) for leaf in axis] for axis in found.axes]
    shape = [int(np.prod([size for _, size in axis])) for axis in axes]
    result = np.empty(shape, x.dtype)
    for index in itertools.product(*(range(n) for n in shape)):
        at = list(found.starts)
        for position, axis in zip(index, axes, strict=True):
            for leaf, size in reversed(axis):
                position, digit = divmod(position, size)
                if leaf.axis is not None:
                    at[leaf.axis] += digit * evaluate(leaf.stride, sizes)
        result[index] = x[tuple(at)] * found.factor
    return result


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Reshape(x, heads)",
        "h = Reshape(x, heads) y = Transpose<perm=[0,2,3,1]>(h)",
        "r = Reshape(x, rows) y = Transpose<perm=[1,0]>(r)",
        "h = Reshape(x, heads) t = Transpose<perm=[0,2,1,3]>(h) u = Unsqueeze(t, i2) y = Expand(u, copies)",
        "a, b, c = Split<axis=2>(x, third) y = Mul(b, half)",
        "y = Slice(x, i4, i8, i2)",
        "y = Slice(x, m4, end, i2)",
        "y = Slice(x, i1, end, i2, i2)",
        "h = Reshape(x, three) t = Transpose<perm=[2,0,3,1,4]>(h) y = Gather<axis=0>(t, n1)",
        "h = Reshape(x, three) y = Gather<axis=2>(h, i2)",
        "h = Reshape(x, heads) s = Slice(h, i1, end, m1) q = Div(s, four) y = Transpose<perm=[2,0,1,3]>(q)",
        "a, b, c = Split<axis=2>(x, third) s = Slice(c, i1, i2, i2) y = Squeeze(s, i2)",
        "h = Reshape(x, heads) y0 = Slice(h, i1, end, i2) y = Slice(y0, i1, end, i2)",
    ],
)
def test_a_view_shows_what_the_runtime_does(nodes: str) -> None:
    proto, found = read(nodes)
    assert found.source.name == "x"
    x = np.arange(2 * 3 * 12, dtype=np.float32).reshape(2, 3, 12)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(shown(found, x), session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("nodes", "source"),
    [
        ("a = Neg(x) y = Reshape(a, heads)", "a"),
        ("h = Reshape(x, heads) t = Transpose<perm=[0,2,1,3]>(h) y = Slice(t, i1, end, i2)", "y"),  # of unknown length
        ("y = Mul(x, x)", "y"),
    ],
)
def test_the_source_is_the_farthest_that_can_be_told(nodes: str, source: str) -> None:
    assert read(nodes)[1].source.name == source


def test_what_is_looked_through_can_be_limited() -> None:
    nodes = "a, b, c = Split<axis=2>(x, third) h = Mul(b, half) y = Transpose<perm=[1,0,2]>(h)"
    assert read(nodes)[1].source.name == "x"
    assert read(nodes, selections=False)[1].source.name == "b"
    assert read(nodes, factors=False)[1].source.name == "h"


def test_columns_and_rearrangement() -> None:
    found = read("h = Reshape(x, three) t = Transpose<perm=[2,0,3,1,4]>(h) y = Gather<axis=0>(t, n1)")[1]
    batch, heads, length, size = found.axes
    columns = found.columns((*heads, *size))
    assert columns is not None
    assert columns.tolist() == [4, 5, 6, 7]
    assert found.columns(batch) is None
    assert found.rearrangement((batch, length, (*heads, *size))) is None  # only a part of x
    whole = read("h = Reshape(x, heads) y = Transpose<perm=[0,2,1,3]>(h)")[1]
    back = whole.rearrangement((whole.axes[0], whole.axes[2], (*whole.axes[1], *whole.axes[3])))
    assert back is not None
    assert back.before == back.after


def test_a_size_is_read_off_an_input() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[B,S] x) => (float[S,B] y) '
        "{ a = Neg(x) y = Transpose<perm=[1,0]>(a) }"
    )
    model = ir.from_proto(proto)
    shapes = Shapes(model)
    shape = shapes.of(model.graph.outputs[0])
    assert shape is not None
    found = measured(shape[0], [model.graph.outputs[0]], model.graph, shapes)
    assert found is not None
    assert (found[0].name, found[1]) == ("x", 1)


class Chain:
    """A chain of nodes over an input x of a known shape, and what numpy makes of it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        self.array = self.x
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(
        self, op: str, result: np.ndarray, constants: tuple[object, ...] = (), place: int = 0, **given: object
    ) -> None:
        """Add a node; `place` says which of `outputs` of a Split goes on."""
        at = len(self.nodes)
        names = [f"c{at}_{i}" for i in range(len(constants))]
        self.constants += [numpy_helper.from_array(np.asarray(c), n) for c, n in zip(constants, names, strict=True)]
        outputs = [f"v{at}" if i == place else f"v{at}_{i}" for i in range(int(str(given.pop("outputs", 1))))]
        self.nodes.append(helper.make_node(op, [f"v{at - 1}" if at else "x", *names], outputs, **given))
        self.array = result

    def model(self) -> ir.Model:
        """Return the model, without any shape but that of x."""
        last = f"v{len(self.nodes) - 1}"
        inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, self.x.shape)]
        outputs = [helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.constants)
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def factorizations(number: int, draw: st.DrawFn) -> list[int]:
    sizes = []
    while number > 1:
        sizes.append(draw(st.sampled_from([d for d in range(1, number + 1) if number % d == 0])))
        number //= sizes[-1]
    return sizes or [1]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    chain = Chain(tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(1, 6))):
        array = chain.array
        axis = draw(st.integers(0, array.ndim - 1))
        size = array.shape[axis]
        match draw(st.sampled_from(["Reshape", "Transpose", "Slice", "Gather", "Split", "Expand", "Unsqueeze", "Mul"])):
            case "Reshape" if array.size:
                shape = np.array(factorizations(array.size, draw))
                chain.add("Reshape", array.reshape(shape), (shape,))
            case "Transpose":
                perm = draw(st.permutations(range(array.ndim)))
                chain.add("Transpose", array.transpose(perm), perm=perm)
            case "Slice":
                start, end = draw(st.integers(-size - 1, size)), draw(st.integers(-size, size + 1))
                step = draw(st.sampled_from([1, 1, 2, 3]))
                kept = array[(slice(None),) * axis + (slice(start, end, step),)]
                chain.add("Slice", kept, tuple(np.array([c]) for c in (start, end, axis - array.ndim, step)))
            case "Gather" if size and array.ndim > 1:
                index = draw(st.sampled_from([np.array(-1), np.array([size - 1]), np.array(0), np.array([[0]])]))
                chain.add("Gather", array.take(index, axis), (index,), axis=axis)
            case "Split" if size > 1:
                first = draw(st.integers(1, size - 1))
                place = draw(st.integers(0, 1))
                parts = np.split(array, [first], axis)
                chain.add("Split", parts[place], (np.array([first, size - first]),), place, axis=axis, outputs=2)
            case "Expand" if size == 1 and array.size < 100:
                shape = np.array([2, *array.shape[:axis], 3, *array.shape[axis + 1 :]])
                chain.add("Expand", np.broadcast_to(array, shape), (shape,))
            case "Unsqueeze" if array.ndim < 6:
                chain.add("Unsqueeze", np.expand_dims(array, axis), (np.array([axis]),))
            case "Mul":
                chain.add("Mul", array * np.float32(0.5), (np.array([0.5], np.float32),))
    if not chain.nodes:
        chain.add("Identity", chain.array)
    return chain


@settings(max_examples=300, deadline=None)
@given(chains())
def test_views_of_random_chains_show_what_numpy_does(chain: Chain) -> None:
    model = chain.model()
    shapes = Shapes(model)
    found = view(model.graph.outputs[0], shapes)
    assert found is not None
    if found.source.name == "x":
        np.testing.assert_array_equal(shown(found, chain.x), chain.array)
