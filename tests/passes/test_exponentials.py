import numpy as np
import onnx
import pytest

SPEC = "fuse-exponentials"


def model(body, *, inputs="float[2,3,5] x", outputs="float y", opset=17, **arrays):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    given = {"one": np.float32(1), "two": np.float32(2), "minus": np.float32(-1), "slope": np.float32(-1.5)}
    given |= {"axis": np.array([1]), "last": np.array([-1]), "kept": np.array([2, 1, 5])} | arrays
    used = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    for name, array in given.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


# Sigmoid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("n = Neg(x) e = Exp(n) s = Add(one, e) y = Div(one, s)", {"Sigmoid": 1}),
        ("n = Neg(x) e = Exp(n) s = Add(e, one) y = Reciprocal(s)", {"Sigmoid": 1}),
        ("n = Mul(x, minus) e = Exp(n) s = Add(e, one) y = Reciprocal(s)", {"Sigmoid": 1}),
        ("n = Neg(x) e = Exp(n) s = Add(e, one) y = Div(x, s)", {"Sigmoid": 1, "Mul": 1}),
        ("n = Neg(x) e = Exp(n) s = Add(e, one) r = Reciprocal(s) y = Mul(r, x)", {"Sigmoid": 1, "Mul": 1}),
        ("n = Mul(x, slope) e = Exp(n) s = Add(e, one) y = Div(x, s)", {"Sigmoid": 1, "Mul": 2}),
        ("n = Neg(x) e = Exp(n) s = Add(e, one) y = Div(two, s)", {"Sigmoid": 1, "Mul": 1}),
    ],
)
def test_sigmoid(rewritten, body, ops):
    assert rewritten(model(body), SPEC).ops == ops


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("n = Neg(x) e = Exp(n) s = Add(e, two) y = Div(one, s)", "is not 1"),
        ("e = Exp(x) s = Add(e, one) y = Div(one, s)", "not a negative multiple"),
    ],
)
def test_what_is_no_sigmoid(rewritten, body, reason):
    found = rewritten(model(body), SPEC)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals


def test_an_exponential_that_is_used_elsewhere_stays(rewritten):
    body = "n = Neg(x) e = Exp(n) s = Add(e, one) d = Div(one, s) y = Add(d, e)"
    assert rewritten(model(body), SPEC).edits == 0


# Softmax ------------------------------------------------------------------------------------------------------

SOFTMAXES = {
    "plain": "e = Exp(x) s = ReduceSum(e, axis) y = Div(e, s)",
    "shifted": "m = ReduceMax <axes = [1]> (x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, axis) y = Div(e, s)",
    "reciprocal": "e = Exp(x) s = ReduceSum(e, axis) r = Reciprocal(s) y = Mul(r, e)",
    "reshaped": """m = ReduceMax <axes = [1], keepdims = 0> (x) k = Reshape(m, kept) d = Sub(x, k) e = Exp(d)
        s = ReduceSum <keepdims = 0> (e, axis) t = Unsqueeze(s, axis) y = Div(e, t)""",
    "shifted by anything": """m = ReduceMin <axes = [1]> (x) n = Neg(m) d = Sub(x, n) e = Exp(d)
        s = ReduceSum(e, axis) y = Div(e, s)""",
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax(rewritten, name):
    (node,) = rewritten(model(SOFTMAXES[name]), SPEC).nodes
    assert node.op_type == "Softmax"
    assert node.attributes["axis"].value == 1


def test_softmax_before_it_went_along_one_axis(rewritten):
    body = "e = Exp(x) s = ReduceSum <axes = [{}]> (e) y = Div(e, s)"
    (node,) = rewritten(model(body.format(-1), opset=11), SPEC).nodes
    assert (node.op_type, node.attributes["axis"].value) == ("Softmax", 2)
    found = rewritten(model(body.format(1), opset=11), SPEC)
    assert found.edits == 0
    assert found.refusals == {"before opset 13, Softmax takes the last axes only; raise it with --opset"}


@pytest.mark.parametrize(
    "body",
    [
        "e = Exp(x) s = ReduceSum(e, both) y = Div(e, s)",
        "e = Exp(x) s = ReduceSum(e) y = Div(e, s)",
        "e = Exp(x) t = Transpose <perm = [0, 2, 1]> (e) s = ReduceSum(t, axis) y = Div(e, s)",
        "e = Exp(x) f = Exp(e) s = ReduceSum(f, axis) y = Div(e, s)",
        "e = Exp(x) s = ReduceSum(e, axis) y = Div(s, e)",
        "e = Exp(x) s = ReduceMax <axes = [1]> (e) y = Div(e, s)",
    ],
)
def test_what_is_no_softmax(rewritten, body):
    assert rewritten(model(body, inputs="float[3,3,3] x", both=np.array([1, 2])), SPEC).edits == 0


def test_a_shift_that_varies_along_the_axis_stays(rewritten):
    body = "m = ReduceMax <axes = [2]> (x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, axis) y = Div(e, s)"
    assert rewritten(model(body), SPEC).ops == {"ReduceMax": 1, "Sub": 1, "Softmax": 1}


def test_an_exponential_with_more_uses(rewritten):
    body = "e = Exp(x) s = ReduceSum(e, axis) d = Div(e, s) y = Mul(d, e)"
    found = rewritten(model(body), SPEC)
    assert found.edits == 0
    assert found.refusals == {"the exponential is used elsewhere, too"}
