"""Views: what they say is shown must be what the runtime shows."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

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
    sizes = {("B", False): x.shape[0], ("S", False): x.shape[1]}
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
