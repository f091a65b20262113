"""GELU in all exporters' forms."""

import itertools

import pytest

SPEC = "fuse-gelu"
CONSTANTS = "float half = {0.5}, float one = {1}, float root2 = {1.4142135}, float inv = {0.70710678}, float c = {0.044715}, float k = {0.7978845}, float two = {2}, float three = {3}"


def model(body, opset=18):
    return f"""<ir_version: 10, opset_import: ["" : {opset}]> g (float[n, 8] x, float[n, 8] u) => (float[n, 8] y)
    <{CONSTANTS}> {{ {body} }}"""


ERF = {
    "legacy": "a = Div(x, root2) b = Erf(a) d = Add(b, one) e = Mul(x, d) y = Mul(e, half)",
    "dynamo": "a = Mul(x, inv) b = Erf(a) d = Add(one, b) e = Mul(half, d) y = Mul(x, e)",
    "half first": "h = Mul(x, half) a = Div(x, root2) b = Erf(a) d = Add(b, one) y = Mul(h, d)",
    "halved by two": "a = Div(x, root2) b = Erf(a) d = Add(b, one) e = Mul(d, x) y = Div(e, two)",
}
TANH = {
    "cube": "p = Pow(x, three) q = Mul(p, c) r = Add(x, q) s = Mul(r, k) t = Tanh(s) d = Add(t, one) h = Mul(x, half) y = Mul(h, d)",
    "factored": "p = Mul(x, x) q = Mul(c, p) r = Add(one, q) m = Mul(x, r) s = Mul(k, m) t = Tanh(s) d = Add(one, t) e = Mul(x, d) y = Mul(e, half)",
}


@pytest.mark.parametrize("body", ERF.values(), ids=ERF)
@pytest.mark.parametrize(("target", "opset"), [("portable", 20), ("cpu", 20), ("cpu", 18)])
def test_the_exact_form_is_one_node(rewritten, body, target, opset):
    done = rewritten(model(body, opset), SPEC, target=target)
    assert done.ops == {"Gelu": 1}
    assert done.nodes[0].domain == ("" if opset == 20 else "com.microsoft")


@pytest.mark.parametrize("body", TANH.values(), ids=TANH)
def test_the_approximation_is_kept_apart(rewritten, body):
    done = rewritten(model(body, 20), SPEC)
    assert done.ops == {"Gelu": 1}
    assert done.nodes[0].attributes["approximate"].value == "tanh"
    assert rewritten(model(body), SPEC, target="cpu").ops == {"FastGelu": 1}


@pytest.mark.parametrize(("body", "edits"), [(ERF["legacy"], 0), (ERF["half first"], 0), (ERF["dynamo"], 1)])
def test_without_an_operator_the_order_is_the_one_the_runtime_fuses(rewritten, body, edits, tmp_path):
    import onnx
    import onnxruntime as ort

    import onnxopt

    done = rewritten(model(body), SPEC)
    assert done.edits == edits
    onnxopt.save(done.model, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["Gelu"]


def test_further_factors_stay(rewritten):
    body = "a = Div(x, root2) b = Erf(a) d = Add(b, one) e = Mul(x, d) f = Mul(e, u) y = Mul(f, two)"
    assert rewritten(model(body, 20), SPEC).ops == {"Gelu": 1, "Mul": 2}


@pytest.mark.parametrize(
    "body",
    [
        "a = Div(x, two) b = Erf(a) d = Add(b, one) e = Mul(x, d) y = Mul(e, half)",
        "a = Div(x, root2) b = Erf(a) d = Sub(one, b) e = Mul(x, d) y = Mul(e, half)",
        "a = Div(u, root2) b = Erf(a) d = Add(b, one) e = Mul(x, d) y = Mul(e, half)",
        "a = Div(x, root2) b = Erf(a) d = Add(b, two) e = Mul(x, d) y = Mul(e, half)",
        "p = Pow(x, two) q = Mul(p, c) r = Add(x, q) s = Mul(r, k) t = Tanh(s) d = Add(t, one) h = Mul(x, half) y = Mul(h, d)",
    ],
)
def test_what_only_looks_like_it_is_left_alone(rewritten, body):
    assert rewritten(model(body, 20), SPEC).edits == 0


def test_a_power_of_the_input_is_refused_with_the_reason(rewritten):
    body = "a = Div(x, root2) b = Erf(a) d = Add(b, one) e = Mul(x, d) f = Mul(e, x) y = Mul(f, half)"
    done = rewritten(model(body, 20), SPEC)
    assert done.edits == 0
    assert done.refusals == {"the input or another factor is raised to a power"}


def test_inner_values_used_elsewhere_are_computed_once(rewritten):
    body = "a = Div(x, root2) b = Erf(a) d = Add(b, one) e = Mul(x, d) f = Mul(e, half) y = Add(f, e)"
    assert rewritten(model(body, 20), SPEC).ops == {"Gelu": 1, "Mul": 2, "Add": 1}
    body = "a = Div(x, root2) b = Erf(a) d = Add(b, one) e = Mul(x, d) f = Mul(e, half) y = Add(f, d)"
    assert rewritten(model(body, 20), SPEC).ops["Erf"] == 1


def test_every_order_of_the_factors_is_found(rewritten):
    for first, second, third in itertools.permutations(["x", "d", "half"]):
        body = f"a = Mul(inv, x) b = Erf(a) d = Add(b, one) e = Mul({first}, {second}) y = Mul({third}, e)"
        assert rewritten(model(body, 20), SPEC).ops == {"Gelu": 1}, (first, second, third)
