"""Layer and RMS normalization in all exporters' forms."""

import pytest

SPEC = "fuse-normalization"
CONSTANTS = (
    "float two = {2}, float four = {4}, float eps = {0.00001}, float minus = {-0.5}, float half = {0.5}, int64[1] last = {-1}, int64[1] first = {1},"
    " float[4] w = {1, 2, 3, 4}, float[4] b = {4, 3, 2, 1}, float[3, 1] column = {1, 2, 3}"
)


def model(body, opset=18):
    return f"""<ir_version: 10, opset_import: ["" : {opset}]> g (float[n, 3, 4] x, float[n, 3, 4] u) => (float[n, 3, 4] y)
    <{CONSTANTS}> {{ {body} }}"""


CENTRED = "m = ReduceMean(x, last) d = Sub(x, m) "
LAYER = {
    "pow, div": "s = Pow(d, two) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) z = Div(d, r) g = Mul(z, w) y = Add(g, b)",
    "mul, reciprocal": "s = Mul(d, d) v = ReduceMean(s, last) e = Add(eps, v) r = Sqrt(e) i = Reciprocal(r) z = Mul(i, d) g = Mul(w, z) y = Add(b, g)",
    "power of -1/2": "s = Mul(d, d) v = ReduceMean(s, last) e = Add(eps, v) r = Pow(e, minus) z = Mul(d, r) g = Mul(z, w) y = Add(g, b)",
    "scale first": "s = Pow(d, two) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) g = Mul(w, d) z = Div(g, r) y = Add(z, b)",
}
RMS = {
    "reciprocal": "s = Pow(x, two) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) z = Mul(x, i) y = Mul(w, z)",
    "div": "s = Mul(x, x) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) z = Div(x, r) y = Mul(z, w)",
}


@pytest.mark.parametrize("body", LAYER.values(), ids=LAYER)
def test_layer_normalization_is_one_node(rewritten, body):
    done = rewritten(model(CENTRED + body), SPEC)
    assert done.ops == {"LayerNormalization": 1}
    assert [v.name for v in done.nodes[0].inputs] == ["x", "w", "b"]
    assert done.nodes[0].attributes["epsilon"].value == pytest.approx(1e-5)


def test_without_scale_and_bias_the_scale_is_one(rewritten):
    body = CENTRED + "s = Pow(d, two) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) y = Div(d, r)"
    done = rewritten(model(body), SPEC)
    assert done.ops == {"LayerNormalization": 1}


def test_a_bias_that_is_computed_is_added_afterwards(rewritten):
    body = CENTRED + LAYER["pow, div"].replace("y = Add(g, b)", "o = Neg(b) y = Add(g, o)")
    assert rewritten(model(body), SPEC).ops == {"LayerNormalization": 1, "Neg": 1, "Add": 1}


def test_before_opset_17_there_is_no_operator(rewritten):
    body = CENTRED.replace("ReduceMean(x, last)", "ReduceMean <axes = [-1]> (x)") + LAYER["pow, div"].replace(
        "ReduceMean(s, last)", "ReduceMean <axes = [-1]> (s)"
    )
    done = rewritten(model(body, 13), SPEC)
    assert done.edits == 0
    assert done.refusals == {"LayerNormalization needs opset 17; raise it with --opset"}


@pytest.mark.parametrize("body", RMS.values(), ids=RMS)
def test_rms_normalization_is_one_node_where_the_opset_has_it(rewritten, body):
    assert rewritten(model(body, 23), SPEC).ops == {"RMSNormalization": 1}


@pytest.mark.parametrize("body", RMS.values(), ids=RMS)
def test_rms_normalization_is_what_the_runtime_fuses_elsewhere(rewritten, body, tmp_path):
    import onnx
    import onnxruntime as ort

    import onnxopt

    done = rewritten(model(body), SPEC)
    onnxopt.save(done.model, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (CENTRED + LAYER["pow, div"].replace("two", "four"), "the mean is not one of squares"),
        (RMS["div"].replace("ReduceMean(s, last)", "ReduceMean(s, first)"), "the mean is not over the last axes"),
        (RMS["div"].replace("z = Div(x, r)", "z = Div(u, r)"), "what is normalized is not a plain factor"),
    ],
)
def test_near_misses_are_refused_with_the_reason(rewritten, body, reason):
    done = rewritten(model(body), SPEC)
    assert done.edits == 0
    assert any(r.startswith(reason) for r in done.refusals)


def test_a_mean_over_other_axes_than_the_deviation_is_no_layer_normalization(rewritten):
    body = "m = ReduceMean(x, first) d = Sub(x, m) " + LAYER["pow, div"]
    assert "LayerNormalization" not in rewritten(model(body, 23), SPEC).ops


def test_a_factor_of_another_shape_is_multiplied_afterwards(rewritten):
    body = (
        CENTRED + "s = Pow(d, two) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) z = Div(d, r) y = Mul(z, column)"
    )
    assert rewritten(model(body), SPEC).ops == {"LayerNormalization": 1, "Mul": 1}
