import collections

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import NEEDS_DATA, Context, Edit
from onnxopt.errors import UsageError
from onnxopt.passes.quantize.quantize_static import QuantizeStatic

KERNELS = {
    "QLinearConv",
    "QGemm",
    "QLinearAdd",
    "QLinearMul",
    "QLinearConcat",
    "QLinearSigmoid",
    "QLinearLeakyRelu",
    "QLinearGlobalAveragePool",
    "NhwcMaxPool",
}
MOVES = {
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Gather",
    "Expand",
    "Tile",
    "Split",
    "Resize",
}
"""What may be left besides: on integers, for there is one QuantizeLinear and one DequantizeLinear in all."""


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def build(body, inputs="float[1,8,12,12] x", outputs="float y", opset=18, extra=None):
    """Build a model; its weights w* are [8,8,3,3], d* depthwise, p* pointwise, b* biases, whatever it uses."""
    opsets = f'"" : {opset}, "com.microsoft" : 1'
    proto = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: [{opsets}]> agraph ({inputs}) => ({outputs}) {{ {body} }}"
    )
    arrays = {
        **{f"w{i}": random(8, 8, 3, 3, seed=i) / 8 for i in range(4)},
        **{f"d{i}": random(8, 1, 3, 3, seed=i) / 3 for i in range(2)},
        **{f"p{i}": random(8, 8, 1, 1, seed=i) / 3 for i in range(3)},
        **{f"b{i}": random(8, seed=i) for i in range(4)},
        "six": np.array(6, np.float32),
        "zero": np.array(0, np.float32),
        **(extra or {}),
    }
    used = {name for node in proto.graph.node for name in node.input}
    for name, array in arrays.items():
        if name in used or f"{name})" in body:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def feeds_for(model, count=8, seed=5):
    return [
        {v.name: random(*v.shape.numpy(), seed=seed + i) for v in model.graph.inputs if v.dtype == ir.DataType.FLOAT}
        for i in range(count)
    ]


def context(model, feeds=None, target="cpu"):
    return Context(
        target=target,
        seed=0,
        evaluate=lambda node, inputs, opset: None,
        shapes=Shapes(model),
        calibration=calibration(feeds if feeds is not None else feeds_for(model), real=True),
    )


def apply(model, feeds=None, deny=(), target="cpu", **options):
    """Apply every edit but those denied; return the summaries and the reasons by the output of their node."""
    edits, refusals = {}, {}
    for found in QuantizeStatic(**options).run(model, context(model, feeds, target)):
        if not isinstance(found, Edit):
            refusals[found.site.output] = found.reason
        elif found.site.output not in deny:
            found.apply()
            edits[found.site.output] = found.summary
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return edits, refusals


def session(model, path=None):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def kernels(model, tmp_path):
    """Return what ONNX Runtime makes of the model: operator -> how many nodes."""
    path = tmp_path / "optimized.onnx"
    session(model, path)
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def error(original, model, feeds=None):
    """Return the root mean square error of the outputs as a part of their standard deviation, the worst of them."""
    feeds = feeds or feeds_for(original, seed=50)
    before, after = session(original), session(model)
    worst = 0.0
    for feed in feeds:
        for expected, got in zip(before.run(None, feed), after.run(None, feed), strict=True):
            assert expected.shape == got.shape
            worst = max(worst, float(np.sqrt(np.mean((expected - got) ** 2)) / np.std(expected)))
    return worst


FUSED = {
    "one": "y = Conv(x, w0, b0)",
    "without bias": "y = Conv(x, w0)",
    "chain": "a = Conv(x, w0, b0) y = Conv(a, w1, b1)",
    "relu": "a = Conv(x, w0, b0) r = Relu(a) y = Conv(r, w1, b1)",
    "relu last": "a = Conv(x, w0, b0) y = Relu(a)",
    "relu6": "a = Conv(x, w0, b0) r = Clip(a, zero, six) y = Conv(r, w1, b1)",
    "depthwise": "a = Conv<group = 8>(x, d0, b0) y = Conv(a, p0)",
    "grouped": "a = Conv<group = 2>(x, grouped, b0) y = Conv(a, p0)",
    "dilated": "a = Conv<dilations = [2, 2]>(x, w0, b0) y = Conv(a, p0)",
    "same padding": 'a = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w0, b0) y = Conv(a, p0)',
    "residual": "a = Conv(x, p0, b0) b = Conv(a, p1) s = Add(a, b) r = Relu(s) y = Conv(r, p2)",
    "added constant": "a = Conv(x, p0, b0) s = Add(a, one) y = Conv(s, p2)",
    "gate": """a = Conv(x, p0, b0) g = GlobalAveragePool(a) c = Conv(g, p1) h = HardSigmoid(c) s = Mul(a, h)
        y = Conv(s, p2)""",
    "hard swish": "a = Conv(x, p0, b0) h = HardSwish(a) y = Conv(h, p2)",
    "steep gate": "a = Conv(x, p0, b0) h = HardSigmoid<alpha = 0.3, beta = 0.4>(a) s = Mul(a, h) y = Conv(s, p2)",
    "mean": "a = Conv(x, p0, b0) g = ReduceMean<keepdims = 1>(a, spatial) y = Conv(g, p1)",
    "silu": "a = Conv(x, p0, b0) g = Sigmoid(a) s = Mul(a, g) y = Conv(s, p2)",
    "leaky": "a = Conv(x, p0, b0) s = LeakyRelu<alpha = 0.1>(a) y = Conv(s, p2)",
    "max pool": "a = Conv(x, p0, b0) s = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a) y = Conv(s, p2)",
    "average pool": "a = Conv(x, p0, b0) s = AveragePool<kernel_shape = [3, 3], strides = [2, 2]>(a) y = Conv(s, p2)",
    "padded average pool": """a = Conv(x, p0, b0)
        s = AveragePool<kernel_shape = [3, 2], pads = [1, 0, 1, 1], count_include_pad = 1>(a) y = Conv(s, p2)""",
    "concat": "a = Conv(x, p0, b0) b = Conv(x, p1) s = Concat<axis = 1>(a, b) y = Conv(s, wide)",
    "concat of activated": """a = Conv(x, p0, b0) r = Relu(a) b = Conv(x, p1) q = Relu(b) s = Concat<axis = 1>(r, q)
        y = Conv(s, wide)""",
    "concat of one activated": """a = Conv(x, p0, b0) r = Relu(a) b = Conv(x, p1) s = Concat<axis = 1>(r, b)
        y = Conv(s, wide)""",
    "activated concat": "a = Conv(x, p0, b0) b = Conv(x, p1) s = Concat<axis = 1>(a, b) r = Relu(s) y = Conv(r, wide)",
    "resize": "a = Conv(x, p0, b0) s = Resize(a, , twice) y = Conv(s, p2)",
    "uneven resize": """a = Conv(x, p0, b0)
        s = Resize<coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(a, , uneven) y = Conv(s, p2)""",
    "scaled": "a = Conv(x, p0, b0) m = Mul(a, steep) g = Sigmoid(m) s = Mul(g, a) y = Conv(s, p2)",
    "scaled twice": "a = Conv(x, p0, b0) m = Mul(steep, a) n = Mul(m, steep) s = Add(n, a) y = Conv(s, p2)",
    "scaled and activated": "a = Conv(x, p0, b0) m = Mul(a, steep) r = Relu(m) y = Conv(r, p2)",
    "scaled and joined": "a = Conv(x, p0, b0) m = Mul(a, gentle) s = Concat<axis = 1>(m, a) y = Conv(s, wide)",
    "windows": "a = Conv(x, p0, b0) s = ConvTranspose<strides = [2, 2]>(a, up, b1) r = Relu(s) y = Conv(r, p2)",
    "linear resize": 'a = Conv(x, p0, b0) s = Resize<mode = "linear">(a, , twice) y = Conv(s, p2)',
    "moves": """a = Conv(x, p0, b0) s = Transpose<perm = [0, 1, 3, 2]>(a) u = Unsqueeze(s, axis) v = Squeeze(u, axis)
        q = Reshape(v, shape) y = Conv(q, p2)""",
    "slice": "a = Conv(x, p0, b0) s = Slice(a, first, last, axis) y = Conv(s, p2)",
    "gather": "a = Conv(x, p0, b0) s = Gather<axis = 2>(a, order) y = Conv(s, p2)",
    "expand": "a = Conv(x, p0, b0) m = GlobalAveragePool(a) s = Expand(m, shape) y = Conv(s, p2)",
    "tile": "a = Conv(x, p0, b0) s = Tile(a, repeats) y = Conv(s, p2)",
    "split": """a = Conv(x, p0, b0) s, t = Split<axis = 1, num_outputs = 2>(a) b = Conv(s, half) c = Conv(t, half)
        y = Add(b, c)""",
    "dense": "a = Conv(x, w0, b0) f = Flatten(a) g = Gemm<transB = 1>(f, dense, b1) r = Relu(g) y = Gemm(r, last8, b2)",
}
EXTRA = {
    "grouped": random(8, 4, 3, 3) / 6,
    "one": random(1, 8, 1, 1),
    "spatial": np.array([2, 3], np.int64),
    "wide": random(8, 16, 1, 1) / 4,
    "twice": np.array([1, 1, 2, 2], np.float32),
    "uneven": np.array([1, 1, 3, 2], np.float32),
    "steep": np.array(1.7, np.float32),
    "gentle": np.array([0.9], np.float32),
    "up": random(8, 8, 2, 2) / 3,
    "axis": np.array([2], np.int64),
    "shape": np.array([1, 8, 8, 18], np.int64),
    "first": np.array([1], np.int64),
    "last": np.array([7], np.int64),
    "order": np.array([3, 1, 0, 5], np.int64),
    "repeats": np.array([1, 1, 2, 1], np.int64),
    "half": random(8, 4, 1, 1) / 2,
    "dense": random(8, 800) / 30,
    "last8": random(8, 8) / 3,
}
FLOATING = {"split": {"Add": 1}}
"""What has no 8-bit kernel, or feeds no layer, and so is computed in floating point."""


@pytest.mark.parametrize("case", FUSED)
def test_everything_becomes_8_bit_kernels(case, tmp_path):
    extra = {**EXTRA, "shape": np.array([1, 8, 5, 7], np.int64)} if case == "expand" else EXTRA
    model = build(FUSED[case], extra=extra)
    original = model.clone()
    edits, refusals = apply(model)
    assert edits
    assert refusals == {}
    found = kernels(model, tmp_path)
    left = {op: n for op, n in found.items() if op not in KERNELS | MOVES | {"QuantizeLinear", "DequantizeLinear"}}
    assert left == FLOATING.get(case, {})
    assert found["QuantizeLinear"] == 1 + (case == "linear resize")
    assert found["DequantizeLinear"] <= 1 + (case in ("linear resize", "split"))
    assert 1e-5 < error(original, model) < 0.06


@pytest.mark.parametrize(
    ("body", "op"),
    [
        ("h = HardSigmoid(x) y = Conv(h, p1)", "HardSigmoid"),
        ("a = Conv(x, p0, b0) y = HardSwish(a)", "HardSwish"),
        ("a = Conv(x, p0, b0) h = HardSwish(a) s = Softmax(h) y = Conv(s, p2)", "HardSwish"),
    ],
)
def test_hard_activations_stay_whole_where_floating_point_surrounds_them(body, op):
    model = build(body)
    apply(model)
    assert [n.op_type for n in model.graph].count(op) == 1
    assert "Clip" not in {n.op_type for n in model.graph}


def test_inputs_of_other_ranks_are_convolved_with_integers(tmp_path):
    for shape, weight in (((1, 8, 20), (8, 8, 3)), ((1, 4, 5, 5, 5), (4, 4, 3, 3, 3))):
        sizes = ",".join(map(str, shape))
        model = build("y = Conv(x, k)", inputs=f"float[{sizes}] x", extra={"k": random(*weight) / 5})
        original = model.clone()
        assert list(apply(model)[0]) == ["y"]
        assert kernels(model, tmp_path)["QLinearConv"] == 1
        assert error(original, model) < 0.1


def test_before_and_after():
    model = build("a = Conv(x, p0, b0) y = Relu(a)")
    edits, _ = apply(model, target="portable")
    assert edits["a"].startswith("Conv with [8,8,1,1] weights in int8 per channel, input -")
    assert [node.op_type for node in model.graph] == [
        "DequantizeLinear",
        "DequantizeLinear",
        "QuantizeLinear",
        "DequantizeLinear",
        "Conv",
        "Relu",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
    assert [v.name for v in model.graph.outputs] == ["y"]
    types = {name: (str(v.dtype), tuple(v.shape.numpy())) for name, v in model.graph.initializers.items()}
    assert types == {
        "p0_int8": ("INT8", (8, 8, 1, 1)),
        "p0_scale": ("FLOAT", (8,)),
        "b0_int32": ("INT32", (8,)),
        "b0_scale": ("FLOAT", (8,)),
        "x_scale": ("FLOAT", ()),
        "zero_point": ("UINT8", ()),
        "y_scale": ("FLOAT", ()),
        "zero_point_1": ("UINT8", ()),
    }
    step = (
        model.graph.initializers["x_scale"].const_value.numpy()
        * model.graph.initializers["p0_scale"].const_value.numpy()
    )
    np.testing.assert_array_equal(model.graph.initializers["b0_scale"].const_value.numpy(), step)


NET = """a = Conv<pads = [1,1,1,1]>(x, w0, b0) r = Relu(a) m = MaxPool<kernel_shape = [3, 3], pads = [1,1,1,1]>(r)
    c = Conv(m, p0) d = Conv<group = 8, pads = [1,1,1,1]>(c, d0) s = Add(c, d) t = Concat<axis = 1>(s, r) e = Conv(t, wide)
    g = GlobalAveragePool(e) f = Flatten(g) y = Gemm(f, last8, b2)"""


@pytest.mark.parametrize("opset", [10, 11, 18])
def test_fused_convolutions_are_taken_apart(opset, tmp_path):
    model = build(
        """a = Conv(x, p0, b0) b = com.microsoft.FusedConv<activation = "Relu">(a, p1, b1, a)
        c = com.microsoft.FusedConv<activation = "Clip", activation_params = [0.0, 6.0]>(b, p2)
        d = com.microsoft.FusedConv<activation = "LeakyRelu", activation_params = [0.1]>(c, p0, , c)
        e = com.microsoft.FusedConv(d, p1) y = Conv(e, p2)""",
        opset=opset,
    )
    model.graph.outputs[0].shape = ir.Shape([1, 8, 12, 12])
    original = model.clone()
    edits, refusals = apply(model)
    assert refusals == {}
    assert [edits[name] for name in "bcde"] == [
        "FusedConv into Conv, Add, Relu",
        "FusedConv into Conv, Clip",
        "FusedConv into Conv, Add, LeakyRelu",
        "FusedConv into Conv",
    ]
    found = kernels(model, tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QLinearLeakyRelu"], found["QuantizeLinear"]) == (
        6,
        2,
        1,
        1,
    )
    assert error(original, model) < 0.15
    some = original.clone()
    edits, refusals = apply(some, deny=["c"])
    assert refusals == {"c": "it is fused with what follows, and cannot be taken apart"}
    assert error(original, some) < 0.15


UNEVEN = ("pads = [1, 1, 1, 1]", "ceil_mode = 1, strides = [2, 2]", 'auto_pad = "SAME_UPPER"')


@pytest.mark.parametrize("how", UNEVEN)
def test_average_pools_over_uneven_windows_stay_in_float(how, tmp_path):
    model = build(f"a = Conv(x, p0, b0) s = AveragePool<kernel_shape = [3, 3], {how}>(a) r = Relu(s) y = Conv(r, p2)")
    original = model.clone()
    edits, refusals = apply(model)
    assert edits["s"] == "AveragePool in float32, where it is faster"
    assert refusals == {}
    found = kernels(model, tmp_path)
    assert (found["AveragePool"], found["QLinearAveragePool"], found["QLinearConv"]) == (1, 0, 2)
    assert error(original, model) < 0.06
    # Where nothing around it is rounded there is nothing to guard against.
    assert "s" not in apply(original.clone(), deny=["a"])[0]


def test_every_edit_can_be_left_out(tmp_path):
    original = build(NET, extra=EXTRA)
    whole = original.clone()
    edits, _ = apply(whole)
    assert list(edits) == ["a", "c", "d", "e", "y", "f", "g", "t", "s", "m"]
    assert error(original, whole) < 0.08
    for site in edits:
        model = original.clone()
        rest, _ = apply(model, deny=[site])
        assert site not in rest
        assert error(original, model) < 0.08
    model = original.clone()
    assert list(apply(model, deny=["d"])[0]) == ["a", "c", "e", "y", "f", "g", "t", "s", "m"]
    found = kernels(model, tmp_path)
    assert found["QLinearConv"] == 3
    assert found["Conv"] == 1
    left = original.clone()
    apply(left, deny=edits)
    assert ir.to_proto(left).SerializeToString() == ir.to_proto(original).SerializeToString()


def test_weights_of_float_layers_between_integers_are_not_rounded_by_the_runtime(tmp_path):
    model = build("a = Conv(x, p0, b0) s = ConvTranspose(a, w1) r = Relu(s) y = Conv(r, p2)")
    original = model.clone()
    edits, refusals = apply(model)
    assert list(edits) == ["a", "y"]
    assert refusals == {"s": "ONNX Runtime has no 8-bit kernel for ConvTranspose"}
    assert [n.op_type for n in model.graph if n.op_type in ("ConvTranspose", "Relu", "Max")] == [
        "ConvTranspose",
        "Relu",
        "Max",
    ]
    path = tmp_path / "optimized.onnx"
    session(model, path)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    (node,) = [n for n in onnx.load(path).graph.node if n.op_type == "ConvTranspose"]
    np.testing.assert_array_equal(weights[node.input[1]], original.graph.initializers["w1"].const_value.numpy())
    assert error(original, model) < 0.06


MOVES_BEHIND = (
    "m = Transpose<perm = [0, 1, 3, 2]>(s)",
    "m = Slice(s, first, last, axis)",
    "m = MaxPool<kernel_shape = [2, 2]>(s)",
    "u = Unsqueeze(s, axis) m = Squeeze(u, axis)",
    "f = Flatten(s) m = Reshape(f, shape)",
    "r = Relu(s) i = Identity(r) m = Transpose<perm = [0, 1, 3, 2]>(i)",
)


@pytest.mark.parametrize("opset", [10, 18])
@pytest.mark.parametrize("moves", MOVES_BEHIND)
def test_nor_are_those_behind_which_elements_are_moved(moves, opset, tmp_path):
    if opset == 10 and "Squeeze" in moves:
        moves = "u = Unsqueeze<axes = [2]>(s) m = Squeeze<axes = [2]>(u)"
    model = build(
        f"a = Conv(x, p0, b0) s = ConvTranspose(a, w1, b1) {moves} y = Conv(m, p2)",
        extra={**EXTRA, "shape": np.array([1, 8, 7, 28], np.int64)},
        opset=opset,
    )
    original = model.clone()
    assert list(apply(model)[0]) == ["a", "y"]
    path = tmp_path / "optimized.onnx"
    session(model, path)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    (node,) = [n for n in onnx.load(path).graph.node if n.op_type == "ConvTranspose"]
    np.testing.assert_array_equal(weights[node.input[1]], original.graph.initializers["w1"].const_value.numpy())
    assert error(original, model) < 0.06


def test_what_lies_between_float_layers_stays_float():
    model = build(NET, extra=EXTRA)
    assert list(apply(model, deny=["a", "c"])[0]) == ["d", "e", "y", "f", "g", "t", "s"]
    assert list(apply(build(NET, extra=EXTRA), deny=["c", "d", "e", "y"])[0]) == ["a"]


def test_looking_changes_nothing_and_twice_is_the_same():
    model = build(NET, extra=EXTRA)
    before = ir.to_proto(model).SerializeToString()
    found = list(QuantizeStatic().run(model, context(model)))
    assert found
    assert ir.to_proto(model).SerializeToString() == before
    twin = model.clone()
    apply(model)
    apply(twin)
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(twin).SerializeToString()


def test_a_value_is_rounded_once_for_all_that_use_it():
    model = build(
        "a = Conv(x, p0) b = Conv(a, p1) c = Conv(a, p2) y = Add(b, c) z = Neg(a)", outputs="float y, float z"
    )
    original = model.clone()
    apply(model)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 4
    assert error(original, model) < 0.06


def test_shared_weights_are_stored_once():
    model = build("a = Conv(x, p0, b0) b = Conv(a, p0, b0) y = Conv(b, p0)")
    original = model.clone()
    apply(model, target="portable")
    assert [v.name for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8 and len(v.shape) == 4] == [
        "p0_int8"
    ]
    # The steps of the two inputs differ, and with them those of the biases.
    assert {name for name in model.graph.initializers if name.startswith("b0_int32")} == {"b0_int32", "b0_int32_1"}
    assert error(original, model) < 0.06
    part = original.clone()
    apply(part, deny=["b"])
    assert {"p0", "p0_int8", "b0"} <= set(part.graph.initializers)
    assert error(original, part) < 0.06


def test_names_of_graph_outputs_survive():
    model = build("a = Conv(x, p0) r = Relu(a) y = Conv(r, p1) z = Identity(x)", outputs="float y, float r, float z")
    original = model.clone()
    apply(model)
    assert [v.name for v in model.graph.outputs] == ["y", "r", "z"]
    assert error(original, model) < 0.06


def test_values_captured_by_a_body_keep_their_meaning():
    body = """a = Conv(x, p0) r = Relu(a) y = If (c) <
        then_branch = t () => (float[1,8,12,12] u) { u = Neg(r) },
        else_branch = e () => (float[1,8,12,12] v) { v = Conv(r, p1) }>"""
    model = build(body, inputs="float[1,8,12,12] x, bool c")
    original = model.clone()
    feeds = [{**feed, "c": np.array(i % 2 == 0)} for i, feed in enumerate(feeds_for(model))]
    edits, refusals = apply(model, feeds)
    assert list(edits) == ["a"]
    assert refusals == {
        "v": "it lies in the body of a node or in a function, whose values are not seen on the calibration data"
    }
    assert error(original, model, feeds) < 0.06


def test_a_large_bias_fits_32_bits():
    weight = random(8, 8, 1, 1)
    weight[3] *= 1e-9
    model = build("y = Conv(x, k, b)", extra={"k": weight, "b": np.full(8, 5, np.float32)})
    original = model.clone()
    apply(model, target="portable")
    assert error(original, model) < 0.06
    assert model.graph.initializers["b_int32"].const_value.numpy().max() <= 2**30


@pytest.mark.parametrize("opset", [10, 11, 12, 13, 17, 21, 23])
def test_opsets(opset, tmp_path):
    model = build("a = Conv(x, p0, b0) r = Relu(a) y = Conv(r, p1)", opset=opset)
    original = model.clone()
    portable = model.clone()
    assert all("int8 per channel" in summary for summary in apply(model)[0].values())
    assert kernels(model, tmp_path)["QLinearConv"] == 2
    assert error(original, model) < 0.06
    granularity = "channel" if opset >= 13 else "tensor"
    edits, _ = apply(portable, target="portable")
    assert all(f"int8 per {granularity}" in summary for summary in edits.values())
    assert {node.domain for node in portable.graph} == {""}
    assert kernels(portable, tmp_path)["QLinearConv"] == 2
    assert error(original, portable) < 0.08


def test_the_runtime_rounds_biases_of_convolutions(tmp_path):
    """For the cpu they stay in float32 where that is no risk; a bias that would leave 32 bits widens the scale."""
    weight = random(8, 8, 1, 1)
    weight[3] *= 1e-9
    original = build("a = Conv(x, p0, b0) y = Conv(a, k, b)", extra={"k": weight, "b": np.full(8, 5, np.float32)})
    model = original.clone()
    apply(model, correct_bias=False)
    biases = [node.inputs[2].name for node in model.graph if node.op_type == "Conv"]
    assert biases == ["b0_float", "b_float"]
    found = kernels(model, tmp_path)
    assert (found["QLinearConv"], found["Conv"]) == (2, 0)
    assert error(original, model) < 0.06


def test_neighbours_fit_into_sixteen_bits_together():
    model = build("a = Conv(x, p0) y = Conv(a, p1)")
    apply(model, target="portable")
    weights = [v.const_value.numpy() for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert len(weights) == 2
    for weight in weights:
        rows = np.moveaxis(weight.astype(int), 1, -1).reshape(len(weight), -1)
        first, second = rows[:, : rows.shape[1] // 2 * 2 : 2], rows[:, 1::2]
        assert (np.abs(first) + np.abs(second))[(first > 0) == (second > 0)].max() <= 128


@pytest.mark.parametrize(
    ("opset", "target", "edits"), [(11, "portable", "ay"), (11, "cpu", "aym"), (12, "portable", "aym")]
)
def test_max_pool_of_integers_is_the_runtime_s_own_before_opset_12(opset, target, edits, tmp_path):
    model = build(
        """a = Conv(x, p0) m = MaxPool<kernel_shape = [3, 2], pads = [1, 0, 1, 1], storage_order = 1>(a)
        y = Conv(m, p1)""",
        opset=opset,
    )
    original = model.clone()
    assert list(apply(model, target=target)[0]) == list(edits)
    assert [n.op_type for n in model.graph].count("NhwcMaxPool") == (target == "cpu")
    assert kernels(model, tmp_path)["NhwcMaxPool"] == ("m" in edits)
    assert error(original, model) < 0.06


def test_a_multiple_is_the_same_integers_on_another_grid(tmp_path):
    model = build(FUSED["scaled"], extra=EXTRA)
    apply(model)
    (node,) = [n for n in model.graph if n.op_type == "Sigmoid"]
    restored = node.inputs[0].producer()
    scales = [u.node for u in restored.inputs[0].uses() if u.node.op_type == "DequantizeLinear"]
    found = [n.inputs[1].const_value.numpy() for n in scales]
    assert sorted(float(scale / min(found)) for scale in found) == [1.0, pytest.approx(1.7)]
    assert kernels(model, tmp_path)["QLinearMul"] == 1


@pytest.mark.parametrize("factor", [1e-37, 1e-45, 1e38])
def test_multiples_whose_levels_are_no_normal_numbers_stay_in_floating_point(factor):
    feeds = [{"x": random(1, 8, 12, 12, seed=i) * np.float32(4)} for i in range(4)]
    model = build(
        "a = Conv(x, p0) m = Mul(a, factor) s = Sigmoid(m) y = Conv(s, p2)",
        extra={"factor": np.array(factor, np.float32)},
    )
    edits, refusals = apply(model, feeds)
    assert list(edits) == ["a", "y"]
    assert refusals == {"s": '"m" is too small or too large for a scale in float32'}


@pytest.mark.parametrize("case", ["resize", "uneven resize"])
@pytest.mark.parametrize("sizes", ["1,8,12,12", "n,8,h,w"])
def test_repeated_elements_are_those_of_resize(case, sizes, tmp_path):
    feeds = [{"x": random(1, 8, 12, 12, seed=i)} for i in range(4)]
    models = [build(FUSED[case], inputs=f"float[{sizes}] x", extra=EXTRA) for _ in range(2)]
    assert "s" in apply(models[0], feeds)[0]
    apply(models[1], feeds, deny=["s"])
    assert [kernels(m, tmp_path)["Resize"] for m in models] == [0, 1]
    feed = {"x": random(1, 8, 12, 12, seed=9) if sizes[0] == "1" else random(2, 8, 7, 5, seed=9)}
    got, wanted = (session(m).run(None, feed)[0] for m in models)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "how",
    [
        'coordinate_transformation_mode = "asymmetric", nearest_mode = "ceil"',
        'coordinate_transformation_mode = "align_corners", nearest_mode = "floor"',
        'coordinate_transformation_mode = "half_pixel", nearest_mode = "floor"',
    ],
)
def test_other_resizes_stay_what_they_are(how, tmp_path):
    model = build(f"a = Conv(x, p0, b0) s = Resize<{how}>(a, , twice) y = Conv(s, p2)", extra=EXTRA)
    original = model.clone()
    assert "s" in apply(model)[0]
    assert kernels(model, tmp_path)["Resize"] == 1
    assert error(original, model) < 0.06


@pytest.mark.parametrize("sizes", ["1,8,12,12", "n,8,h,w"])
@pytest.mark.parametrize(("height", "width", "bias"), [(2, 2, ", b1"), (3, 1, ""), (1, 2, ", b1")])
def test_windows_apart_compute_what_conv_transpose_does(sizes, height, width, bias):
    body = f"""a = Conv(x, p0, b0) s = ConvTranspose<strides = [{height}, {width}]>(a, k{bias}) r = Relu(s)
        y = Conv(r, p2)"""
    model = build(body, inputs=f"float[{sizes}] x", extra={"k": random(8, 8, height, width)})
    original, feeds = model.clone(), [{"x": random(1, 8, 12, 12, seed=i)} for i in range(3)]
    assert apply(model, feeds, deny=["a", "y", "s/Conv_output", "s/Relu_output"])[0].keys() == {"s"}
    assert "ConvTranspose" not in {n.op_type for n in model.graph}
    assert error(original, model, feeds) < 1e-6


def test_windows_may_have_no_batch():
    body = "a = Conv(x, p0, b0) s = ConvTranspose<strides = [2, 2]>(a, up, b1) r = Relu(s) y = Conv(r, p2)"
    model = build(body, inputs="float[n,8,5,6] x", extra=EXTRA)
    assert "s" in apply(model, [{"x": random(2, 8, 5, 6, seed=i)} for i in range(3)])[0]
    (got,) = session(model).run(None, {"x": np.zeros((0, 8, 5, 6), np.float32)})
    assert got.shape == (0, 8, 10, 12)


def test_bounds_behind_windows_may_be_constants_that_stand_there():
    model = build(
        """a = Conv(x, p0, b0) s = ConvTranspose<strides = [2, 2]>(a, up, b1) one = Constant<value_float = 1.0>()
        r = Clip(s, zero, one) y = Conv(r, p2)""",
        extra={"up": EXTRA["up"]},
    )
    original = model.clone()
    assert "s" in apply(model)[0]
    assert error(original, model) < 0.06


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv(x, p0, b0) y = ConvTranspose<strides = [2, 2]>(a, up)",
        "a = Conv(x, p0, b0) s = ConvTranspose<strides = [2, 2]>(a, up) y = Sigmoid(s)",
        "s = ConvTranspose<strides = [2, 2]>(x, up) y = Conv(s, p0)",
        "a = Conv(x, p0, b0) s = ConvTranspose<strides = [1, 2]>(a, up) y = Conv(s, p1)",
        "a = Conv(x, p0, b0) s = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1]>(a, up) y = Conv(s, p1)",
        "a = Conv(x, p0, b0) s = ConvTranspose<strides = [2, 2], group = 2>(a, up) y = Conv(s, thrice)",
    ],
)
def test_other_conv_transposes_stay_in_floating_point(body):
    model = build(body, extra={**EXTRA, "thrice": random(8, 16, 1, 1)})
    assert "ONNX Runtime has no 8-bit kernel for ConvTranspose" in apply(model)[1].values()
    assert "ConvTranspose" in {n.op_type for n in model.graph}


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy", "mse"])
def test_ranges(ranges):
    model = build(NET, extra=EXTRA)
    original = model.clone()
    apply(model, ranges=ranges)
    assert error(original, model) < 0.1


def test_an_outlier_does_not_spoil_the_range():
    model = build("a = Conv(x, p0) y = Conv(a, p1)")
    feeds = feeds_for(model)
    spoilt = [dict(feed) for feed in feeds]
    spoilt[0]["x"] = spoilt[0]["x"].copy()
    spoilt[0]["x"][0, 0, 0, 0] = 1000.0
    errors = {}
    for ranges in ("minmax", "percentile"):
        copy = model.clone()
        apply(copy, spoilt + feeds * 20, ranges=ranges)
        errors[ranges] = error(model, copy, feeds[1:])
    assert errors["percentile"] < errors["minmax"] / 5


REFUSED = {
    "its weight is computed while the model runs": ("k = Neg(p0) y = Conv(x, k)", {}),
    "its bias is not constant": ("k = Neg(b0) y = Conv(x, p0, k)", {}),
    "its weight or bias holds NaN or infinity": ("y = Conv(x, k)", {"k": np.full((8, 8, 1, 1), np.nan, np.float32)}),
    "ONNX Runtime has no 8-bit kernel for ConvTranspose": ("y = ConvTranspose(x, p0)", {}),
    "it is fused with what follows, and cannot be taken apart": (
        'y = com.microsoft.FusedConv<activation = "Softsign">(x, p0)',
        {},
    ),
    "there is an 8-bit kernel for Gemm only with transA 0, alpha 1 and beta 1": (
        "f = Flatten(x) y = Gemm<alpha = 2.0>(f, k)",
        {"k": random(1152, 4)},
    ),
    '"n" took on NaN or infinity on the calibration data': ("z = Sub(x, x) n = Log(z) y = Conv(n, p0)", {}),
    '"n" was 0 throughout the calibration data, so there is no range to divide into levels': (
        "n = Sub(x, x) y = Conv(n, p0)",
        {},
    ),
    '"y" held no elements on the calibration data': (
        "n = Slice(x, first, first, axis) y = Conv(n, p0)",
        {"first": np.array([1], np.int64), "axis": np.array([0], np.int64)},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    body, extra = REFUSED[reason]
    model = build(body, extra=extra)
    before = ir.to_proto(model).SerializeToString()
    edits, refusals = {}, {}
    for found in QuantizeStatic().run(model, context(model)):
        (edits if isinstance(found, Edit) else refusals)[found.site.output] = found
    assert not edits
    assert [r.reason for r in refusals.values()] == [reason]
    assert ir.to_proto(model).SerializeToString() == before


def test_weights_that_the_caller_can_override_are_refused():
    model = build("y = Conv(x, p0)")
    model.graph.inputs.append(model.graph.initializers["p0"])
    feeds = [{"x": feed["x"]} for feed in feeds_for(model)]
    edits, refusals = apply(model, feeds)
    assert not edits
    assert refusals == {"y": "its weight is also an input of the graph, so the caller can override it"}


def test_float16_is_refused():
    body = "h = Cast<to = 10>(x) v = Conv(h, k) y = Cast<to = 1>(v)"
    model = build(body, extra={"k": random(8, 8, 1, 1).astype(np.float16)})
    assert apply(model) == ({}, {"v": "8-bit kernels stand for float32, and this computes with float16"})


def test_functions_are_refused():
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18, "my" : 1]>
        g (float[1,8,12,12] x, float[8,8,1,1] k) => (float y) { y = my.F(x, k) }
        <domain: "my", opset_import: ["" : 18]> F (a, k) => (b) { b = Conv(a, k) }""")
    model = ir.from_proto(proto)
    found = list(QuantizeStatic().run(model, context(model)))
    assert [(f.site.graph, f.reason) for f in found] == [
        (
            "function my::F",
            "it lies in the body of a node or in a function, whose values are not seen on the calibration data",
        )
    ]


def test_constants_between_layers_that_have_no_grid_are_refused(tmp_path):
    model = build(
        "a = Conv(x, p0) s = Add(a, k) y = Conv(s, p1)", extra={"k": np.full((1, 8, 1, 1), np.inf, np.float32)}
    )
    feeds = feeds_for(model)
    edits, refusals = apply(model, feeds)
    assert list(edits) == ["a"]
    assert set(refusals) == {"y"}
    model = build("a = Conv(x, p0) s = Mul(a, k) y = Conv(s, p1)", extra={"k": np.zeros((1, 8, 1, 1), np.float32)})
    assert set(apply(model, feeds)[1]) == {"y"}


def test_skipped():
    model = build("y = Conv(x, p0)")
    graph_pass = QuantizeStatic()
    assert graph_pass.skip_reason(model, context(model)) is None
    without = Context(target="cpu", seed=0, evaluate=lambda node, inputs, opset: None, shapes=Shapes(model))
    assert graph_pass.skip_reason(model, without) == NEEDS_DATA
    assert "CUDA" in graph_pass.skip_reason(model, context(model, target="cuda"))
    old = build("y = Conv(x, p0)", opset=9)
    assert graph_pass.skip_reason(old, context(old)) == (
        "QuantizeLinear exists from opset 10 on, and this model has 9; raise it with --opset 13"
    )


def test_unknown_ranges():
    with pytest.raises(UsageError, match='ranges is "best"; use auto, minmax'):
        QuantizeStatic(ranges="best")


@pytest.mark.parametrize("body", ["y = Conv(x, k)", "y = Conv(x, k, b0)", "f = Flatten(x) y = Gemm(f, dense8, b0)"])
def test_corrected_biases_keep_means(body):
    # Weights that all round down, on inputs that are all positive: every product comes out too small.
    weight = np.full((8, 8, 3, 3), 0.4 / 127, np.float32)
    weight[:, 0, 0, 0] = 1
    dense = np.full((1152, 8), 0.4 / 127, np.float32)
    dense[0] = 1
    original = build(body, extra={"k": weight, "dense8": dense})
    feeds = [{"x": np.abs(feed["x"]) + 1} for feed in feeds_for(original)]
    shifts = {}
    for correct in (True, False):
        model = original.clone()
        apply(model, feeds, correct_bias=correct)
        before, after = (np.concatenate([session(m).run(None, f)[0] for f in feeds]) for m in (original, model))
        shifts[correct] = abs(float((after - before).mean()))
    assert shifts[True] < shifts[False] / 20
