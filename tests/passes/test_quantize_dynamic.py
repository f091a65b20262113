import collections

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import NEEDS_DATA, Context, Edit, Guarantee
from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes, scopes
from onnxopt.passes.quantize.quantize_dynamic import QuantizeDynamic

K, N = 96, 64
STANDARD = {"DynamicQuantizeLinear": 1, "MatMulInteger": 1, "Cast": 1, "Mul": 2}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def declare(text, arrays, opset=17):
    """Build a model from ONNX text and give it initializers of this content."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head} agraph {text}")
    for name, array in arrays.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        data = np.ascontiguousarray(array).tobytes()
        proto.graph.initializer.append(onnx.helper.make_tensor(name, dtype, array.shape, data, raw=True))
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def apply(model, target="cpu", deny=(), feeds=None, **options):
    """Apply the edits but those denied; return the summaries and the reasons of refusals by output."""
    edits, refusals = {}, {}
    shapes, learnt = Shapes(model), None if feeds is None else calibration(feeds, real=True)
    ctx = Context(target=target, seed=0, evaluate=lambda *_: None, shapes=shapes, calibration=learnt)
    assert QuantizeDynamic(**options).skip_reason(model, ctx) is None
    for found in QuantizeDynamic(**options).run(model, ctx):
        if not isinstance(found, Edit):
            refusals[found.site.output] = found.reason
        elif found.site.output not in deny:
            found.apply()
            edits[found.site.output] = found.summary
    return edits, refusals


def ops(model):
    return dict(collections.Counter(node.op_type for node in all_nodes(model)))


def session(model, path=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, **feed):
    return session(model).run(None, feed)


def stored(model):
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for s in scopes(model) for v in s.graph.initializers.values())


def relative_error(got, expected):
    return float(np.max(np.abs(got - expected)) / np.ptp(expected))


W, WT, B = random(K, N), random(N, K), random(N, seed=1)
SPREAD = W * np.geomspace(1, 100, N, dtype=np.float32)
CASES = {
    "MatMul": ("(float[n,K] x) => (float[n,N] y) { y = MatMul(x, w) }", {"w": SPREAD}),
    "MatMul of three axes": ("(float[2,n,K] x) => (float[2,n,N] y) { y = MatMul(x, w) }", {"w": SPREAD}),
    "MatMul and Add": ("(float[n,K] x) => (float[n,N] y) { t = MatMul(x, w) y = Add(t, b) }", {"w": W, "b": 9 * B}),
    "Add of bias first": ("(float[n,K] x) => (float[n,N] y) { t = MatMul(x, w) y = Add(b, t) }", {"w": W, "b": 9 * B}),
    "bias of two axes": (
        "(float[n,K] x) => (float[n,N] y) { t = MatMul(x, w) y = Add(t, b) }",
        {"w": W, "b": 9 * B[None]},
    ),
    "scalar bias": (
        "(float[n,K] x) => (float[n,N] y) { t = MatMul(x, w) y = Add(t, b) }",
        {"w": W, "b": np.float32([70])},
    ),
    "Gemm": ("(float[n,K] x) => (float[n,N] y) { y = Gemm(x, w) }", {"w": SPREAD}),
    "Gemm with all": (
        "(float[n,K] x) => (float[n,N] y) { y = Gemm<transB = 1, alpha = -0.5, beta = 3.0>(x, w, b) }",
        {"w": WT, "b": 9 * B},
    ),
    "FusedMatMul": (
        "(float[n,K] x) => (float[n,N] y) { y = com.microsoft.FusedMatMul<transB = 1, alpha = 0.125>(x, w) }",
        {"w": WT},
    ),
    "Transpose": ("(float[n,K] x) => (float[n,N] y) { t = Transpose(w) y = MatMul(x, t) }", {"w": WT}),
    "Identity": ("(float[n,K] x) => (float[n,N] y) { t = Identity(w) y = MatMul(x, t) }", {"w": W}),
    "Constant": ("(float[n,K] x) => (float[n,N] y) { y = MatMul(x, w) }", {}),
}


def case(name, opset=17):
    text, arrays = CASES[name]
    model = declare(text.replace("K", str(K)).replace("N]", f"{N}]"), arrays, opset)
    if name == "Constant":
        node = ir.node("Constant", [], {"value": ir.tensor(W, name="w")})
        node.outputs[0].name = "w"
        product = next(iter(model.graph))
        model.graph.insert_before(product, node)
        product.replace_input_with(1, node.outputs[0])
    return model


def feed_for(model):
    dims = [d if isinstance(d, int) else 5 for d in model.graph.inputs[0].shape]
    return {"x": random(*dims, seed=2)}


def test_promises_what_it_keeps():
    assert QuantizeDynamic.guarantee is Guarantee.APPROXIMATE
    assert not QuantizeDynamic.needs_data
    assert "batch" in QuantizeDynamic().caveat()


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", CASES)
def test_every_form_ends_in_the_fastest_kernel(name, target, tmp_path):
    original, model = case(name), case(name)
    edits, refusals = apply(model, target)
    assert len(edits) == 1
    assert not refusals
    if target == "portable":
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert {k: v for k, v in ops(model).items() if k != "Add"} == STANDARD
    else:
        assert ops(model) == {"DynamicQuantizeMatMul": 1}
    feed = feed_for(model)
    assert 0 < relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.015
    path = tmp_path / "optimized.onnx"
    session(model, path)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["DynamicQuantizeMatMul"]
    assert stored(model) < 1.2 * K * N
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_both_targets_compute_the_same(target):
    models = [case("MatMul and Add"), case("MatMul and Add")]
    for model, each in zip(models, ("cpu", "portable"), strict=True):
        apply(model, each)
    feed = feed_for(models[0])
    np.testing.assert_allclose(run(models[0], **feed)[0], run(models[1], **feed)[0], rtol=1e-5, atol=1e-5)


def test_neighbours_fit_into_sixteen_bits_together():
    model = case("MatMul")
    apply(model)
    integers = model.graph.initializers["w/int8"].const_value.numpy().astype(int)
    first, second = integers[:-1:2], integers[1::2]
    together = np.abs(first) + np.abs(second)
    assert together[(first > 0) == (second > 0)].max() == 128
    assert np.abs(integers).max() > 64


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", ["MatMul", "MatMul and Add", "Gemm"])
def test_corrected_biases_keep_means(name, target):
    original, plain, corrected = case(name), case(name), case(name)
    shift = random(K, seed=7) * 4
    feeds = [{"x": feed_for(original)["x"] + shift}]
    assert apply(plain, target)[0].keys() == apply(corrected, target, feeds=feeds, correct_bias=True)[0].keys()
    expected, before, after = (run(m, **feeds[0])[0].reshape(-1, N).mean(axis=0) for m in (original, plain, corrected))
    assert np.abs(after - expected).mean() < 0.6 * np.abs(before - expected).mean()


def test_correcting_biases_needs_data_and_finite_means():
    model = case("MatMul")
    ctx = Context(target="cpu", seed=0, evaluate=lambda *_: None, shapes=Shapes(model))
    assert QuantizeDynamic(correct_bias=True).skip_reason(model, ctx) == NEEDS_DATA
    assert QuantizeDynamic(correct_bias=True).wants_data()
    feed = {"x": np.full_like(feed_for(model)["x"], np.nan)}
    assert apply(model, feeds=[feed], correct_bias=True)[0]
    assert [n.op_type for n in model.graph] == ["DynamicQuantizeMatMul"]
    assert len(next(iter(model.graph)).inputs) == 3


def test_a_bias_is_taken_out_of_a_sum():
    text = f"(float[n,{K}] x, float[n,{N}] r) => (float[n,{N}] y) {{ t = MatMul(x, w) y = Sum(t, b, r) }}"
    original, model = (declare(text, {"w": W, "b": 9 * B}) for _ in range(2))
    edits, _ = apply(model)
    assert edits
    assert ops(model) == {"DynamicQuantizeMatMul": 1, "Sum": 1}
    total = next(n for n in model.graph if n.op_type == "Sum")
    assert len(total.inputs) == 2
    feed = {**feed_for(model), "r": random(5, N, seed=3)}
    assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.015


@pytest.mark.parametrize(
    ("add", "arrays"),
    [
        ("u = Add(t, b) y = Add(u, t)", {"b": B}),  # the product is used elsewhere too
        ("y = Add(t, b)", {"b": random(2, 1, N)}),  # the bias gives the result more axes
        ("y = Add(t, b)", {"b": random(5, N)}),  # one number per row and column
    ],
)
def test_what_is_no_bias_stays_an_add(add, arrays):
    text = f"(float[5,{K}] x) => (float y) {{ t = MatMul(x, w) {add} }}"
    original, model = (declare(text, {"w": W, **arrays}) for _ in range(2))
    edits, _ = apply(model)
    assert edits
    assert len(next(n for n in model.graph if n.op_type == "DynamicQuantizeMatMul").inputs) == 3
    feed = {"x": random(5, K, seed=2)}
    assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.015


ATTENTION = f"""(float[b,s,{K}] x, float[b,4,s,s] m) => (float[b,s,32] y)
    {{ y = com.microsoft.Attention<num_heads = 4, @>(x, w, b, , , m) }}"""


@pytest.mark.parametrize("attributes", ["scale = 0.3", "unidirectional = 1", "qkv_hidden_sizes = [24, 24, 48]"])
def test_attention_becomes_a_product_and_the_rest(attributes):
    text = ATTENTION.replace("@", attributes).replace(",32]", ",48]" if "qkv" in attributes else ",32]")
    original, model = (declare(text, {"w": random(K, 96) / 10, "b": random(96)}) for _ in range(2))
    edits, refusals = apply(model)
    assert (len(edits), refusals) == (1, {})
    assert ops(model) == {"DynamicQuantizeMatMul": 1, "Split": 1, "MultiHeadAttention": 1}
    feed = {"x": random(2, 7, K), "m": random(2, 4, 7, 7)}
    assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.015


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_lstm(direction):
    count = 1 if direction == "forward" else 2
    text = f"""(float[s,b,{K}] x, int32[b] lengths) => (float y, float c)
        {{ y, , c = LSTM<hidden_size = 32, direction = "{direction}", activations = ["Sigmoid", "Tanh", "Tanh"
        {', "Sigmoid", "Tanh", "Tanh"' if count == 2 else ""}]>(x, w, r, b, lengths) }}"""
    arrays = {"w": random(count, 128, K) / 5, "r": random(count, 128, 32, seed=1) / 5, "b": random(count, 256, seed=2)}
    original, model = (declare(text, arrays) for _ in range(2))
    edits, refusals = apply(model)
    assert (len(edits), refusals) == (1, {})
    assert ops(model) == {"DynamicQuantizeLSTM": 1}
    feed = {"x": random(6, 3, K), "lengths": np.int32([6, 2, 4])}
    for got, expected in zip(run(model, **feed), run(original, **feed), strict=True):
        assert 0 < relative_error(got, expected) < 0.05
    assert [v.name for v in model.graph.outputs] == ["y", "c"]
    assert stored(model) < 0.32 * stored(original)


TIED = "(int64[n] ids) => (float[n,V] y) { x = Gather(w, ids) t = Transpose(w) y = MatMul(x, t) }"


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_a_tied_embedding_is_stored_once(target, tmp_path):
    table = random(128, K)
    original, model = (declare(TIED.replace("V", "128"), {"w": table}) for _ in range(2))
    edits, _ = apply(model, target)
    assert edits
    assert stored(model) < 0.3 * stored(original)
    feed = {"ids": np.arange(5)}
    assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.02
    path = tmp_path / "optimized.onnx"
    session(model, path)
    assert sorted(n.op_type for n in onnx.load(path).graph.node) == ["DynamicQuantizeMatMul", "Gather"]


def test_layers_that_share_a_weight_share_its_integers():
    text = f"(float[n,{K}] x) => (float[n,{K}] y) {{ a = MatMul(x, w) b = Tanh(a) c = MatMul(b, w) y = Relu(c) }}"
    original, model = (declare(text, {"w": random(K, K) / 10}) for _ in range(2))
    edits, _ = apply(model)
    assert list(edits) == ["a", "c"]
    assert stored(model) < 0.3 * stored(original)
    feed = feed_for(model)
    assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.02


@pytest.mark.parametrize("denied", ["a", "c"])
def test_each_layer_can_be_left_out_alone(denied):
    text = f"(float[n,{K}] x) => (float[n,{K}] y) {{ a = MatMul(x, w) b = Tanh(a) c = MatMul(b, w) y = Relu(c) }}"
    original, model = (declare(text, {"w": random(K, K) / 10}) for _ in range(2))
    edits, _ = apply(model, deny=[denied])
    assert len(edits) == 1
    assert ops(model) == {"DynamicQuantizeMatMul": 1, "MatMul": 1, "Tanh": 1, "Relu": 1}
    feed = feed_for(model)
    assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.02


def test_both_orders_of_one_weight():
    text = f"(float[n,{K}] x) => (float[n,{K}] y) {{ a = MatMul(x, w) t = Transpose(w) y = MatMul(a, t) }}"
    model = declare(text, {"w": random(K, K)})
    edits, refusals = apply(model)
    assert list(edits) == ["a"]
    assert "the transposed weight" in refusals["y"]
    run(model, **feed_for(model))


def test_bodies_of_if_use_weights_of_the_outer_graph():
    text = f"""(float[n,{K}] x, bool c) => (float y) {{
        a = MatMul(x, w)
        y = If (c) <then_branch = t () => (float[n,{N}] p) {{ p = MatMul(x, w) }},
                    else_branch = e () => (float[n,{N}] q) {{ q = Neg(a) }}>
    }}"""
    original, model = (declare(text, {"w": W}) for _ in range(2))
    edits, _ = apply(model)
    assert list(edits) == ["a", "p"]
    assert list(model.graph.initializers) == ["w/int8", "w/scale"]
    for condition in (True, False):
        feed = {**feed_for(model), "c": np.array(condition)}
        assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.015


def test_functions_keep_their_weights_as_constants():
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[n,{K}] x) => (float[n,{N}] y) {{ y = my.F(x) }}
        <domain: "my", opset_import: ["" : 17]> F (x) => (y)
        {{ w = Constant <value = float[1] {{1.0}}> () y = MatMul(x, w) }}""")
    proto.functions[0].node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(W, "w"))
    model, original = ir.from_proto(proto), ir.from_proto(proto)
    edits, _ = apply(model)
    assert edits
    assert ops(model)["DynamicQuantizeMatMul"] == 1
    feed = feed_for(model)
    assert relative_error(run(model, **feed)[0], run(original, **feed)[0]) < 0.015


REFUSED = {
    "left": (f"(float[{K},4] x) => (float y) {{ y = MatMul(w, x) }}", {"w": WT}, {}, "the constant is on the left"),
    "small": ("(float[4,32] x) => (float y) { y = MatMul(x, w) }", {"w": random(32, 64)}, {}, "too small to gain"),
    "narrow": ("(float[4,256] x) => (float y) { y = MatMul(x, w) }", {"w": random(256, 16)}, {}, "too small to gain"),
    "stacked": (f"(float[3,4,{K}] x) => (float y) {{ y = MatMul(x, w) }}", {"w": random(3, K, N)}, {}, "not two axes"),
    "vector": (f"(float[{K}] x) => (float y) {{ y = MatMul(x, w) }}", {"w": W}, {}, "is a vector"),
    "transA": (f"(float[{K},4] x) => (float y) {{ y = Gemm<transA = 1>(x, w) }}", {"w": W}, {}, "transposes its"),
    "other bias": (f"(float[4,{K}] x, float[4,{N}] c) => (float y) {{ y = Gemm(x, w, c) }}", {"w": W}, {}, "its bias"),
    "float16": (f"(float16[4,{K}] x) => (float16 y) {{ y = MatMul(x, w) }}", {"w": W.astype("f2")}, {}, "float16"),
    "bfloat16": (
        f"(bfloat16[4,{K}] x) => (bfloat16 y) {{ y = MatMul(x, w) }}",
        {"w": W.astype(ml_dtypes.bfloat16)},
        {},
        "bfloat16",
    ),
    "float64": (f"(double[4,{K}] x) => (double y) {{ y = MatMul(x, w) }}", {"w": W.astype("f8")}, {}, "float64"),
    "NaN": (f"(float[4,{K}] x) => (float y) {{ y = MatMul(x, w) }}", {"w": W * np.float32("nan")}, {}, "NaN"),
    "overridable": (
        f"(float[4,{K}] x, float[{K},{N}] w) => (float y) {{ y = MatMul(x, w) }}",
        {"w": W},
        {},
        "override",
    ),
    "old": (f"(float[4,{K}] x) => (float y) {{ y = MatMul(x, w) }}", {"w": W}, {"opset": 10}, "needs opset 11"),
    "GRU": (
        f"(float[3,4,{K}] x) => (float y) {{ y = GRU<hidden_size = 32>(x, w, r) }}",
        {"w": random(1, 96, K), "r": random(1, 96, 32)},
        {},
        "no GRU for integer weights",
    ),
    "portable LSTM": (
        f"(float[3,4,{K}] x) => (float y) {{ y = LSTM<hidden_size = 32>(x, w, r) }}",
        {"w": random(1, 128, K), "r": random(1, 128, 32)},
        {"target": "portable"},
        "for the target cpu",
    ),
    "LSTM of batches first": (
        f"(float[3,4,{K}] x) => (float y) {{ y = LSTM<hidden_size = 32, layout = 1>(x, w, r) }}",
        {"w": random(1, 128, K), "r": random(1, 128, 32)},
        {},
        "on the second axis",
    ),
    "portable attention": (
        f"(float[b,s,{K}] x) => (float y) {{ y = com.microsoft.Attention<num_heads = 4>(x, w, b) }}",
        {"w": random(K, 96), "b": random(96)},
        {"target": "portable"},
        "no standard operator",
    ),
    "attention with a mask": (
        f"(float[b,s,{K}] x, int32[b] m) => (float y) {{ y = com.microsoft.Attention<num_heads = 4>(x, w, b, m) }}",
        {"w": random(K, 96), "b": random(96)},
        {},
        "a mask or a past",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_give_their_reason_and_change_nothing(name):
    text, arrays, options, reason = REFUSED[name]
    options = dict(options)
    if "opset" in options:
        options["target"] = "portable"
    model = declare(text, arrays, options.pop("opset", 17))
    before = ir.to_proto(model).SerializeToString()
    edits, refusals = apply(model, **options)
    assert not edits
    assert reason in refusals["y"]
    assert ir.to_proto(model).SerializeToString() == before


def test_there_is_nothing_for_cuda():
    model = case("MatMul")
    ctx = Context(target="cuda", seed=0, evaluate=lambda node, inputs, opset: None, shapes=Shapes(model))
    assert "CUDA" in QuantizeDynamic().skip_reason(model, ctx)


@pytest.mark.parametrize(("option", "value"), [("min_elements", 0)])
def test_options_are_checked(option, value):
    with pytest.raises(UsageError, match=option):
        QuantizeDynamic(**{option: value})


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("content", ["zero", "constant", "nan", "inf"])
def test_activations_of_no_range_crash_nothing(content, target):
    model = case("MatMul and Add")
    apply(model, target)
    fill = {"zero": 0, "constant": 3, "nan": np.nan, "inf": np.inf}[content]
    x = np.full((4, K), fill, np.float32)
    got = run(model, x=x)[0]
    if content in ("zero", "constant"):
        np.testing.assert_allclose(got, run(case("MatMul and Add"), x=x)[0], rtol=0.02, atol=1.4)


def test_a_channel_of_zeros_stays_zero():
    weight = W.copy()
    weight[:, 3] = 0
    model = declare(f"(float[n,{K}] x) => (float[n,{N}] y) {{ y = MatMul(x, w) }}", {"w": weight})
    apply(model)
    assert not run(model, **feed_for(model))[0][:, 3].any()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(64, 130),
    n=st.integers(32, 70),
    kind=st.sampled_from(["MatMul", "Gemm"]),
    transposed=st.booleans(),
    bias=st.booleans(),
    target=st.sampled_from(["cpu", "portable"]),
)
def test_many_sizes(rows, k, n, kind, transposed, bias, target):
    w = random(n, k) if transposed else random(k, n)
    if kind == "Gemm":
        body = f"y = Gemm<transB = {int(transposed)}>(x, w{', b' if bias else ''})"
    else:
        body = "v = Transpose(w) " if transposed else "v = Identity(w) "
        body += "t = MatMul(x, v) y = Add(t, b)" if bias else "y = MatMul(x, v)"
    arrays = {"w": w, **({"b": random(n, seed=4)} if bias else {})}
    text = f"(float[{rows},{k}] x) => (float[{rows},{n}] y) {{ {body} }}"
    original, model = (declare(text, arrays) for _ in range(2))
    assert apply(model, target)[0]
    x = random(rows, k, seed=5)
    assert relative_error(run(model, x=x)[0], run(original, x=x)[0]) < 0.025
