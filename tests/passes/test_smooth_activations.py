import collections

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import NEEDS_DATA, Context, Edit, Guarantee
from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes
from onnxopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from onnxopt.passes.quantize.smooth_activations import SmoothActivations
from onnxopt.runtime import RunOptions, open_session

K, N = 96, 64


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, V, B = random(K, N), random(N, K, seed=1), random(N, seed=2)
UNEVEN = np.geomspace(0.01, 30, K).astype(np.float32)[np.random.default_rng(3).permutation(K)]
"""Sizes of the channels of an activation."""
W /= UNEVEN[:, None]  # all channels matter alike


def declare(text, arrays, opset=17):
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head} agraph {text}")
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def samples(model, count=8, rows=6):
    """Inputs whose channels are of very different size."""
    feeds = []
    for number in range(count):
        feed = {}
        for i, value in enumerate(model.graph.inputs):
            shape = [d if isinstance(d, int) else rows for d in value.shape]
            feed[value.name] = random(*shape, seed=100 * number + i)
            if shape and shape[-1] == K:
                feed[value.name] *= UNEVEN
        feeds.append(feed)
    return feeds


def context(model, feeds=None, target="cpu"):
    data = None if feeds is None else calibration(feeds, real=True)
    return Context(
        target=target, seed=0, evaluate=lambda node, inputs, opset: None, shapes=Shapes(model), calibration=data
    )


def apply(model, feeds=None, deny=(), graph_pass=None, **options):
    ctx = context(model, samples(model) if feeds is None else feeds)
    edits, refusals = {}, {}
    for found in (graph_pass or SmoothActivations(**options)).run(model, ctx):
        if not isinstance(found, Edit):
            refusals[found.site.output] = found.reason
        elif found.site.output not in deny:
            found.apply()
            edits[found.site.output] = found.summary
    onnx.checker.check_model(ir.to_proto(model))
    return edits, refusals


def run(model, feed):
    with open_session(model, RunOptions(), optimized=False) as session:
        return session.run(feed)


def ops(model):
    return dict(collections.Counter(node.op_type for node in all_nodes(model)))


def deviation(model, original, feeds):
    """Largest error of an output relative to its range."""
    worst = 0.0
    for feed in feeds:
        for got, expected in zip(run(model, feed).values(), run(original, feed).values(), strict=True):
            worst = max(worst, float(np.max(np.abs(got - expected)) / np.ptp(expected)))
    return worst


CASES = {
    "MatMul": (f"(float[n,{K}] x) => (float[n,{N}] y) {{ y = MatMul(x, w) }}", {"w": W}, {"MatMul": 1, "Mul": 1}),
    "Gemm transB": (
        f"(float[n,{K}] x) => (float[n,{N}] y) {{ y = Gemm<transB = 1, alpha = 0.5>(x, w, b) }}",
        {"w": W.T, "b": B},
        {"Gemm": 1, "Mul": 1},
    ),
    "Transpose": (
        f"(float[n,{K}] x) => (float[n,{N}] y) {{ t = Transpose(w) y = MatMul(x, t) }}",
        {"w": W.T},
        {"Transpose": 1, "MatMul": 1, "Mul": 1},
    ),
    "LayerNormalization": (
        f"(float[n,{K}] x) => (float[n,{N}] y) {{ l = LayerNormalization(x, s, c) y = MatMul(l, w) }}",
        {"w": W, "s": UNEVEN, "c": UNEVEN[::-1]},
        {"LayerNormalization": 1, "MatMul": 1},
    ),
    "normalization used by a residual too": (
        f"""(float[n,{K}] x) => (float[n,{K}] y)
            {{ l = LayerNormalization(x, s, c) a = MatMul(l, w) b = MatMul(a, v) y = Add(b, l) }}""",
        {"w": W, "v": V, "s": UNEVEN, "c": UNEVEN[::-1]},
        {"LayerNormalization": 1, "MatMul": 2, "Mul": 1, "Add": 1},
    ),
    "query, key and value": (
        f"""(float[n,{K}] x) => (float y) {{ l = LayerNormalization(x, s) q = MatMul(l, w) k = MatMul(l, u)
            p = Gemm<transB = 1>(l, v) a = Add(q, k) y = Add(a, p) }}""",
        {"w": W, "u": W[::-1], "v": V, "s": UNEVEN},
        {"LayerNormalization": 1, "MatMul": 2, "Gemm": 1, "Add": 2},
    ),
    "scale of a spelled out normalization": (
        f"(float[n,{K}] x) => (float y) {{ m = ReduceMax<axes = [1]>(x) d = Div(x, m) l = Mul(s, d) y = MatMul(l, w) }}",
        {"w": W, "s": UNEVEN},
        {"ReduceMax": 1, "Div": 1, "Mul": 1, "MatMul": 1},
    ),
    "layer before": (
        f"(float[n,{N}] x) => (float y) {{ a = MatMul(x, v) l = Add(a, c) y = MatMul(l, w) }}",
        {"v": V * UNEVEN, "c": UNEVEN, "w": W},
        {"MatMul": 2, "Add": 1, "Mul": 1},
    ),
    "Gemm before": (
        f"(float[n,{N}] x) => (float y) {{ l = Gemm<transB = 1, beta = 2.0>(x, v, c) y = MatMul(l, w) }}",
        {"v": (V * UNEVEN).T, "c": UNEVEN, "w": W},
        {"Gemm": 1, "MatMul": 1, "Mul": 1},
    ),
    "gated layers": (
        f"""(float[n,{N}] x) => (float y) {{ g = MatMul(x, u) h = Sigmoid(g) a = MatMul(x, v) l = Mul(h, a)
            y = MatMul(l, w) }}""",
        {"u": V, "v": V * UNEVEN, "w": W},
        {"MatMul": 3, "Sigmoid": 1, "Mul": 2},
    ),
    "activation function between": (
        f"(float[n,{N}] x) => (float y) {{ a = MatMul(x, v) l = Tanh(a) y = MatMul(l, w) }}",
        {"v": V * UNEVEN, "w": W},
        {"MatMul": 2, "Tanh": 1, "Mul": 2},
    ),
}


def test_is_judged_alone_and_needs_data():
    assert SmoothActivations.guarantee is Guarantee.APPROXIMATE
    assert SmoothActivations.needs_data
    model = declare(*CASES["MatMul"][:2])
    assert SmoothActivations().skip_reason(model, context(model)) == NEEDS_DATA
    assert SmoothActivations().skip_reason(model, context(model, samples(model))) is None


@pytest.mark.parametrize("name", CASES)
def test_products_stay_what_they_were(name):
    text, arrays, left = CASES[name]
    original, model = declare(text, arrays), declare(text, arrays)
    edits, _ = apply(model, alpha=0.7)
    assert edits
    assert ops(model) == left
    assert deviation(model, original, samples(original)) < 1e-5
    assert {v.name for v in model.graph.initializers.values()} != set(arrays)
    assert len(model.graph.initializers) == len(arrays) + ops(model).get("Mul", 0) - ops(original).get("Mul", 0)


@pytest.mark.parametrize("name", ["MatMul", "Gemm transB", "LayerNormalization", "query, key and value"])
def test_what_is_quantized_behind_it_is_more_accurate(name):
    text, arrays, _ = CASES[name]
    original, plain, smoothed = (declare(text, arrays) for _ in range(3))
    edits, _ = apply(smoothed)
    assert len(edits) == 1
    for model in (plain, smoothed):
        apply(model, graph_pass=QuantizeDynamic())
    fresh = samples(original, 20)[8:]
    assert deviation(smoothed, original, fresh) < 0.6 * deviation(plain, original, fresh)


def test_layers_on_one_activation_share_factors():
    text, arrays, _ = CASES["query, key and value"]
    model = declare(text, arrays)
    edits, _ = apply(model)
    assert list(edits) == ["q"]
    assert edits["q"].startswith("3 layers of 96 channels, alpha 0.")


def test_the_summary_states_alpha_place_and_error():
    model = declare(*CASES["MatMul"][:2])
    edits, _ = apply(model, alpha=0.75)
    assert "1 layer of 96 channels, alpha 0.75, divided in a Mul: estimated error of 8-bit products" in edits["y"]


def test_even_activations_are_left_alone():
    model = declare(CASES["MatMul"][0], {"w": random(K, N)})
    before = ir.to_proto(model).SerializeToString()
    feeds = [{"x": random(6, K, seed=i)} for i in range(8)]
    edits, refusals = apply(model, feeds)
    assert not edits
    assert "no factors make its product" in refusals["y"]
    assert ir.to_proto(model).SerializeToString() == before


def test_each_activation_can_be_left_out_alone():
    text = f"(float[n,{K}] x) => (float y) {{ a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v) }}"
    arrays = {"w": W, "v": np.ascontiguousarray(V * np.geomspace(1, 50, N, dtype=np.float32)[:, None])}
    original = declare(text, arrays)
    for denied in ("a", "y"):
        model = declare(text, arrays)
        edits, _ = apply(model, deny=[denied], alpha=0.7)
        assert len(edits) == 1
        assert deviation(model, original, samples(original)) < 1e-5


def test_dead_channels_and_single_samples():
    text, arrays, _ = CASES["MatMul"]
    original, model = declare(text, arrays), declare(text, arrays)
    feeds = samples(original, 1)
    feeds[0]["x"][:, 5] = 0
    edits, _ = apply(model, feeds)
    assert edits
    assert deviation(model, original, feeds) < 1e-5
    smoothing = next(v for k, v in model.graph.initializers.items() if "smoothing" in k).const_value.numpy()
    assert smoothing[5] == 1


REFUSED = {
    "shared weight": (
        f"(float[n,{K}] x, float[n,{K}] z) => (float y) {{ a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b) }}",
        {"w": W},
        {"a": "something else uses its weight", "b": "something else uses its weight"},
    ),
    "table": (
        f"(float[n,{K}] x, int64[2] i) => (float y, float z) {{ y = MatMul(x, w) z = Gather(w, i) }}",
        {"w": W},
        {"y": "something else uses its weight"},
    ),
    "nested": (
        f"""(float[n,{K}] x, bool c) => (float y) {{
            y = If (c) <then_branch = t () => (float[n,{N}] p) {{ p = MatMul(x, w) }},
                        else_branch = e () => (float[n,{N}] q) {{ q = MatMul(x, u) }}> }}""",
        {"w": W, "u": W},
        {"p": "nested graph", "q": "nested graph"},
    ),
    "small": (
        "(float[n,32] x) => (float y) { y = MatMul(x, w) }",
        {"w": random(32, 128)},
        {"y": "too small"},
    ),
    "NaN in a weight": (
        f"(float[n,{K}] x) => (float y) {{ y = MatMul(x, w) }}",
        {"w": np.where(W > 2, np.float32("nan"), W)},
        {"y": "its weight holds NaN"},
    ),
    "float64": (f"(double[n,{K}] x) => (double y) {{ y = MatMul(x, w) }}", {"w": W.astype("f8")}, {"y": "not float32"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_give_their_reason_and_change_nothing(name):
    text, arrays, reasons = REFUSED[name]
    model = declare(text, arrays)
    before = ir.to_proto(model).SerializeToString()
    feeds = samples(model)
    types = {"i": np.array([0, 1]), "c": np.array(True)}
    for feed in feeds:
        feed.update({k: v for k, v in types.items() if k in feed})
        if name == "float64":
            feed["x"] = feed["x"].astype("f8")
    edits, refusals = apply(model, feeds)
    assert not edits
    assert refusals.keys() == reasons.keys()
    assert all(reasons[k] in refusals[k] for k in reasons)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused(bad):
    model = declare(*CASES["MatMul"][:2])
    feeds = samples(model)
    feeds[3]["x"][0, 0] = bad
    edits, refusals = apply(model, feeds)
    assert not edits
    assert "NaN or infinity" in refusals["y"]


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": "much"}, {"min_elements": 0}])
def test_options_are_checked(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        SmoothActivations(**options)
