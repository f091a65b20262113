import numpy as np
import onnx
import pytest

SPEC = "fuse-conv-add"


def model(body, *, inputs="float[1,4,6,6] x", outputs="float y", opset=17, dtype=np.float32):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    given = {"w": (4, 4, 1, 1), "v": (4, 4, 3, 3), "b": (4,)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in given.items()}
    arrays |= {"low": np.array(-0.5, dtype), "high": np.array(0.5, dtype)}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def fused(found):
    node = next(n for n in found.nodes if n.op_type == "FusedConv")
    return node, {name: a.value for name, a in node.attributes.items()}


@pytest.mark.parametrize(
    ("tail", "activation", "parameters"),
    [
        ("y = Add(r, c)", None, None),
        ("a = Add(c, r) y = Relu(a)", "Relu", None),
        ("a = Add(c, r) y = Clip(a, low, high)", "Clip", (-0.5, 0.5)),
        ("a = Add(r, c) y = LeakyRelu <alpha = 0.3> (a)", "LeakyRelu", (pytest.approx(0.3),)),
        ("a = Add(r, c) y = HardSigmoid <alpha = 0.3> (a)", "HardSigmoid", (pytest.approx(0.3), pytest.approx(0.5))),
        ("a = Add(r, c) y = Sigmoid(a)", "Sigmoid", None),
        ("a = Add(r, c) y = Tanh(a)", "Tanh", None),
    ],
)
@pytest.mark.parametrize("conv", ["Conv(r, w)", "Conv <pads = [1, 1, 1, 1]> (r, v, b)"])
def test_residual_and_activation(rewritten, tail, activation, parameters, conv):
    found = rewritten(model(f"k = Conv(x, w, b) r = Relu(k) c = {conv} {tail}"), SPEC, target="cpu")
    assert found.ops == {"Conv": 1, "Relu": 1, "FusedConv": 1}
    node, attributes = fused(found)
    assert attributes.get("activation") == activation
    assert attributes.get("activation_params") == parameters
    assert len(node.inputs) == 4


def test_another_activation_stays_behind(rewritten):
    found = rewritten(model("r = Conv(x, w) c = Conv(r, w) a = Add(c, r) y = Elu(a)"), SPEC, target="cpu")
    assert found.ops == {"Conv": 1, "FusedConv": 1, "Elu": 1}


def test_residuals_in_a_row(rewritten):
    body = """k = Conv(x, w) c = Conv(k, w) a = Add(c, k) s = Relu(a)
        d = Conv(s, w) e = Conv(d, w) f = Add(s, e) y = Relu(f)"""
    found = rewritten(model(body), SPEC, target="cpu")
    assert found.ops == {"Conv": 2, "FusedConv": 2}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("c = Conv(x, w) y = Add(c, x)", "does not come from a convolution"),
        ("r = Conv(x, w) s = Softmax(r) c = Conv(r, w) y = Add(c, s)", "does not come from a convolution"),
        ("r = Conv(x, w) c = Conv(r, w) a = Add(c, r) y = Mul(a, c)", "is used elsewhere, too"),
        ("r = Conv(x, w) p = GlobalAveragePool(r) c = Conv(r, w) y = Add(c, p)", "may differ in shape"),
    ],
)
def test_what_stays(rewritten, body, reason):
    found = rewritten(model(body), SPEC, target="cpu")
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals


def test_other_types_stay(rewritten):
    proto = model("r = Conv(x, w) c = Conv(r, w) y = Add(c, r)", inputs="float16[1,4,6,6] x", outputs="float16 y",
                  dtype=np.float16)  # fmt: skip
    found = rewritten(proto, SPEC, target="cpu")
    assert found.edits == 0
    assert found.refusals == {"the runtime has FusedConv for float32 only"}


@pytest.mark.parametrize("target", ["portable", "cuda"])
def test_other_targets_have_no_such_operator(rewritten, target):
    found = rewritten(model("r = Conv(x, w) c = Conv(r, w) y = Add(c, r)"), SPEC, target=target)
    assert found.report.passes[0].status == "skipped"


def test_nested_graphs(rewritten):
    body = """r = Conv(x, w) y = If (p) <
        then_branch = t () => (float[1,4,6,6] a) { c = Conv(x, w) a = Add(c, r) },
        else_branch = e () => (float[1,4,6,6] f) { f = Relu(r) }>"""
    found = rewritten(model(body, inputs="float[1,4,6,6] x, bool p"), SPEC, target="cpu")
    assert found.ops == {"Conv": 1, "If": 1, "FusedConv": 1, "Relu": 1}
