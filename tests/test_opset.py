"""Converting the opset: what computes the same, what survives, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from onnxopt.errors import ModelError, UsageError
from onnxopt.model import convert_opset, load, save
from onnxopt.proto.encode import encode

ort = pytest.importorskip("onnxruntime")
TARGET = 21


def run(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(r) for r in session.run(None, feed)]


def random(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def graph(opset: int, inputs: str, body: str, outputs: str = "float[A] y", more: str = "") -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: 7, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {more} {{ {body} }}'
    )


def assert_same(proto: onnx.ModelProto, feed: dict[str, np.ndarray], version: int = TARGET) -> ir.Model:
    """Convert, check, run both, and return the result."""
    before = proto.SerializeToString()
    model = load(proto)
    converted = convert_opset(model, version)
    assert converted.opset_imports[""] == version
    assert proto.SerializeToString() == before
    assert encode(model).opset_import[0].version != version
    after = encode(converted)
    onnx.checker.check_model(after)
    expected, found = run(proto, feed), run(after, feed)
    for one, two in zip(expected, found, strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    return converted


X = "float[N, 3, 8] x"
IMAGE = "float[1, 2, 4, 5] x"

CASES: dict[str, tuple[onnx.ModelProto, dict[str, np.ndarray]]] = {
    **{
        f"{op} over {axis}": (graph(11, X, f"y = {op}<axis = {axis}>(x)"), {"x": random(2, 3, 8)})
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for axis in (0, 1, 2, -1)
    },
    **{
        f"{op} {mode} {scale}": (
            graph(
                opset,
                IMAGE,
                f'y = {op}<mode = "{mode}">(x, s)',
                more=f"<float[4] s = {{1, 1, {scale}, {scale}}}>",
            ),
            {"x": random(1, 2, 4, 5)},
        )
        for op, opset in (("Upsample", 9), ("Resize", 10))
        for mode in ("nearest", "linear")
        for scale in (2, 3, 1.5)
    },
    "Upsample with an attribute": (
        graph(7, IMAGE, 'y = Upsample<mode = "linear", scales = [1.0, 1.0, 3.0, 3.0]>(x)'),
        {"x": random(1, 2, 4, 5)},
    ),
    "Clip": (graph(9, X, "y = Clip<min = -0.5, max = 0.5>(x)"), {"x": random(2, 3, 8)}),
    "Clip with one bound": (graph(9, X, "y = Clip<max = 0.5>(x)"), {"x": random(2, 3, 8)}),
    "Clip of float16": (
        graph(9, "float16[N] x", "y = Clip<min = -0.5, max = 0.5>(x)", "float16[N] y"),
        {"x": random(9, dtype=np.float16)},
    ),
    "Clip of an inferred float16": (
        graph(9, "float16[N] x", "z = Relu(x) y = Clip<max = 0.5>(z)", "float16[N] y"),
        {"x": random(9, dtype=np.float16)},
    ),
    "Pad": (graph(9, X, "y = Pad<pads = [0, 1, 0, 0, 2, 0], value = 3.0>(x)"), {"x": random(2, 3, 8)}),
    "Slice": (graph(9, X, "y = Slice<axes = [1], starts = [1], ends = [9223372036854775807]>(x)"), {"x": random(2, 3, 8)}),
    "TopK": (graph(9, X, "y, i = TopK<k = 2>(x)", "float[A] y, int64[A] i"), {"x": random(2, 3, 8)}),
    "Squeeze": (graph(9, "float[1, 3] x", "z = Squeeze<axes = [0]>(x) y = Unsqueeze<axes = [0, 2]>(z)"), {"x": random(1, 3)}),
    "Split": (graph(9, X, "y, z = Split<axis = 2>(x)", "float[A] y, float[A] z"), {"x": random(2, 3, 8)}),
    "Split into unequal parts": (
        graph(9, X, "y, z = Split<axis = 2, split = [3, 5]>(x)", "float[A] y, float[A] z"),
        {"x": random(2, 3, 8)},
    ),
    "ReduceMean": (graph(9, X, "y = ReduceMean<axes = [1, 2], keepdims = 0>(x)"), {"x": random(2, 3, 8)}),
    "ReduceSum over everything": (graph(9, X, "y = ReduceSum<keepdims = 0>(x)", "float y"), {"x": random(2, 3, 8)}),
    "Dropout": (graph(9, X, "y, mask = Dropout<ratio = 0.3>(x)"), {"x": random(2, 3, 8)}),
    "GridSample": (
        graph(16, "float[1, 1, 4, 4] x, float[1, 2, 2, 2] p", 'y = GridSample<mode = "bilinear">(x, p)'),
        {"x": random(1, 1, 4, 4), "p": random(1, 2, 2, 2).clip(-1, 1)},
    ),
    "RoiAlign": (
        graph(11, "float[1, 1, 8, 8] x, float[1, 4] r, int64[1] b", "y = RoiAlign<output_height = 2, output_width = 2>(x, r, b)"),
        {"x": random(1, 1, 8, 8), "r": np.array([[1, 1, 5, 6]], np.float32), "b": np.zeros(1, np.int64)},
    ),
    "LSTM": (
        graph(7, "float[3, 1, 2] x, float[1, 4, 2] w, float[1, 4, 1] r", "y = LSTM<hidden_size = 1>(x, w, r)"),
        {"x": random(3, 1, 2), "w": random(1, 4, 2), "r": random(1, 4, 1)},
    ),
    "Scatter": (
        graph(9, "float[3, 3] x, int64[1, 3] i, float[1, 3] u", "y = Scatter<axis = 0>(x, i, u)"),
        {"x": random(3, 3), "i": np.array([[0, 1, 2]]), "u": random(1, 3)},
    ),
    "DFT": (graph(17, "float[1, 8, 1] x", "y = DFT<axis = 1>(x)"), {"x": random(1, 8, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operators_that_changed(case: str) -> None:
    proto, feed = CASES[case]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    for output, result in zip(proto.graph.output, run(proto, feed), strict=True):
        # The checker wants to know the rank.
        output.type.tensor_type.shape.SetInParent()
        for _ in result.shape:
            output.type.tensor_type.shape.dim.add()
    assert_same(proto, feed)


def test_what_a_body_uses_may_be_replaced() -> None:
    """ONNX's own converter fails on this model."""
    proto = graph(
        12,
        "float[2, 3, 8] x, bool c",
        """s = Softmax<axis = 1>(x)
        y = If(c) <then_branch = t () => (a) { a = ReduceSum<axes = [1, 2], keepdims = 0>(s) },
                   else_branch = e () => (b) { q = Squeeze(s) b = ReduceMean<axes = [1, 2], keepdims = 0>(q) }>""",
        "float[2] y",
    )
    with pytest.raises(RuntimeError):
        onnx.version_converter.convert_version(proto, TARGET)
    for branch in (True, False):
        assert_same(proto, {"x": random(2, 3, 8), "c": np.array(branch)})


def test_loops() -> None:
    proto = graph(
        10,
        "float[2, 6] x, int64 n",
        """t = Constant<value = bool {1}>()
        y = Loop(n, t, x) <body = b (int64 i, bool c, float[2, 6] v) => (bool d, float[2, 6] w) {
            d = Identity(c) s = Softmax<axis = 0>(v) w = Clip<min = 0.1>(s) }>""",
        "float[2, 6] y",
    )
    assert_same(proto, {"x": random(2, 6), "n": np.array(3)})


def test_functions() -> None:
    """Their bodies are converted, references to attributes are kept, and they import the new opset."""
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[1, 3] x) => (float[1] y) { y = f.G<to = 1>(x) }
        <domain: "f", opset_import: ["": 17]> G<to>(x) => (y) {
            z = Flatten<axis: int = @to>(x) y = ReduceMean<axes = [1], keepdims = 0>(z) }"""
    )
    (function,) = assert_same(proto, {"x": random(1, 3)}).functions.values()
    assert function.opset_imports == {"": TARGET}
    assert next(iter(function)).attributes["axis"].is_ref()


def test_what_does_not_change_is_untouched() -> None:
    proto = parser.parse_model(
        """<ir_version: 7, opset_import: ["": 12, "com.microsoft": 1], producer_name: "p", doc_string: "d", metadata_props: ["k": "v"]>
        g (float[N, 3] x) => (float[N, 3] y) <float[N, 3] a, float[N, 3] b> {
            a = com.microsoft.Gelu(x) b = Relu(a) y = Softmax<axis = 0>(b) }"""
    )
    for node in proto.graph.node:
        node.name = f"node {node.op_type}"
        node.doc_string = "doc"
        node.metadata_props.add(key="k", value="v")
    model = assert_same(proto, {"x": random(2, 3)})
    assert (model.producer_name, model.doc_string, model.metadata_props) == ("p", "d", {"k": "v"})
    assert model.ir_version == 7
    gelu, relu, *rest = model.graph
    assert (gelu.name, gelu.doc_string, relu.name, relu.outputs[0].name) == ("node Gelu", "doc", "node Relu", "b")
    assert model.opset_imports == {"": TARGET, "com.microsoft": 1}
    (softmax,) = (n for n in rest if n.op_type == "Softmax")
    assert (softmax.doc_string, softmax.metadata_props) == ("doc", {"k": "v"})
    assert [i.name for i in encode(model).graph.value_info][:2] == ["a", "b"]


def test_names_of_outputs_and_types_of_replaced_values_survive() -> None:
    proto = graph(9, X, "t = Clip<max = 0.5>(x) y = Relu(t)", "float[N, 3, 8] y, float[N, 3, 8] t")
    model = assert_same(proto, {"x": random(2, 3, 8)})
    assert [v.name for v in model.graph.outputs] == ["y", "t"]
    assert model.graph.outputs[1].producer().op_type == "Clip"
    assert str(model.graph.outputs[1].shape) == "[N,3,8]"


def test_constants_that_are_graph_inputs() -> None:
    """Of IR version 3, as a file, so that inputs come back."""
    proto = parser.parse_model(
        '<ir_version: 3, opset_import: ["": 7]> g (float[1, 3, 4, 4] x, float[3] s, float[3] b, float[3] m, float[3] v)'
        " => (float[1, 3, 4, 4] y) <float[3] s = {1, 2, 3}, float[3] b = {1, 1, 1}, float[3] m = {0, 0, 0},"
        " float[3] v = {1, 1, 1}> { y = BatchNormalization<spatial = 1, epsilon = 0.1>(x, s, b, m, v) }"
    )
    model = assert_same(proto, {"x": random(1, 3, 4, 4)})
    assert [i.name for i in encode(model).graph.input] == ["x", "s", "b", "m", "v"]


def test_large_weights_are_not_read(tmp_path: Path) -> None:
    proto = graph(12, "float[N, 4] x", "t = MatMul(x, w) y = Softmax<axis = 1>(t)", "float[N, 3000] y")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(random(4, 3000), "w"))
    model = load(proto)
    weight = model.graph.initializers["w"].const_value
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        lambda: pytest.fail("the weight was read"), dtype=weight.dtype, shape=weight.shape, name="w"
    )
    converted = convert_opset(model, TARGET)
    converted.graph.initializers["w"].const_value = weight
    save(converted, tmp_path / "o.onnx")
    x = random(2, 4)
    np.testing.assert_allclose(run(onnx.load(tmp_path / "o.onnx"), {"x": x})[0], run(proto, {"x": x})[0], rtol=1e-6)


def test_the_same_version_is_the_same_model() -> None:
    model = load(graph(17, X, "y = Relu(x)"))
    assert convert_opset(model, 17) is model


def test_unknown_versions() -> None:
    model = load(graph(17, X, "y = Relu(x)"))
    for version in (0, -1, onnx.defs.onnx_opset_version() + 1):
        with pytest.raises(UsageError, match=f"knows the opsets 1 to .*, not {version}"):
            convert_opset(model, version)


def test_a_model_without_standard_operators() -> None:
    proto = parser.parse_model('<ir_version: 8, opset_import: ["a": 1]> g (float[N] x) => (float[N] y) { y = a.B(x) }')
    with pytest.raises(ModelError, match="no standard operator set"):
        convert_opset(load(proto), 17)


@pytest.mark.parametrize(
    ("proto", "version", "complaint"),
    [
        (
            graph(17, X, "a = Abs(x) y = LayerNormalization(a, a)"),
            15,
            r'from opset 17 to 15: the node "y" \(LayerNorm',
        ),
        (graph(17, X, "y = Relu(x)"), 13, r'the node "y" \(Relu\) cannot be converted'),
        (graph(10, X, "y, m = Dropout(x)", "float[N] y, bool[N] m"), 21, "returns a mask"),
        (
            graph(
                18,
                "float[1, 4, 3] x",
                "y = GroupNormalization<num_groups = 2>(x, s, s)",
                more="<float[2] s = {1, 2}>",
            ),
            21,
            "scale per group",
        ),
        (
            graph(7, X, "y = BatchNormalization<spatial = 0>(x, x, x, x, x)"),
            21,
            r'the node "y" \(BatchNormalization\) cannot be converted',
        ),
        (
            parser.parse_model(
                """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[1, 3] x) => (float[1, 3] y) { y = f.G<axes = [0]>(x) }
                <domain: "f", opset_import: ["": 17]> G<axes>(x) => (y) { y = ReduceMean<axes: ints = @axes>(x) }"""
            ),
            21,
            'the attribute "axes" .* in function f::G becomes an input',
        ),
    ],
)
def test_refusals(proto: onnx.ModelProto, version: int, complaint: str) -> None:
    model = load(proto)
    before = encode(model).SerializeToString()
    with pytest.raises(ModelError, match=complaint) as caught:
        convert_opset(model, version)
    assert "\n" not in str(caught.value)
    assert encode(model).SerializeToString() == before


def test_lower_versions_where_that_is_possible() -> None:
    assert_same(graph(14, X, "y = Sigmoid(x)", "float[N, 3, 8] y"), {"x": random(2, 3, 8)}, 13)


def test_many_nodes() -> None:
    """Those that changed among those that did not, all in one go."""
    body, last = "", "x"
    for i in range(150):
        body += f" a{i} = Clip<max = 0.9>({last}) b{i} = Relu(a{i})"
        last = f"b{i}"
    assert_same(graph(9, X, f"{body} y = Softmax<axis = 2>({last})"), {"x": random(2, 3, 8)})
