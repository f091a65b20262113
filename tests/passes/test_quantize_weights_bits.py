"""Weights stored with few bits, in blocks, or fitted to data."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxopt
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import NEEDS_DATA, Context, Edit
from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def declare(text, arrays, opset=21, ir_version=None):
    version = ir_version or (13 if opset > 23 else 10)
    proto = onnx.parser.parse_model(f'<ir_version: {version}, opset_import: ["" : {opset}]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    return ir.from_proto(proto)


def apply(model, data=None, **options):
    made = QuantizeWeights(**options)
    learnt = None if data is None else calibration(data, real=True)
    ctx = Context("portable", 0, lambda node, inputs, opset: None, Shapes(model), learnt)
    assert made.skip_reason(model, ctx) is None
    edits, refusals = {}, {}
    for found in made.run(model, ctx):
        if isinstance(found, Edit):
            found.apply()
            edits[found.site.output] = found.summary
        else:
            refusals[found.site.output] = found.reason
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return edits, refusals


def session(model, path=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    # Otherwise DequantizeLinear merges with MatMul, which then rounds its inputs.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def run(model, **feed):
    return session(model).run(None, feed)[0].astype(np.float64)


def relative(got, expected):
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


CONSUMERS = {
    "MatMul": ("float[5,64] x", "y = MatMul(x, w)", (64, 48)),
    "left MatMul": ("float[64,5] x", "y = MatMul(w, x)", (48, 64)),
    "Gemm transB": ("float[5,64] x", "y = Gemm<transB = 1>(x, w)", (48, 64)),
    "Transpose and MatMul": ("float[5,64] x", "t = Transpose(w) y = MatMul(x, t)", (48, 64)),
    "Gather": ("int64[6] x", "y = Gather(w, x)", (50, 64)),
    "Conv": ("float[1,16,8,8] x", "y = Conv(x, w)", (32, 16, 3, 3)),
    "stacked MatMul": ("float[3,5,64] x", "y = MatMul(x, w)", (3, 64, 48)),
}
FEEDS = {"Gather": np.arange(4, 50, 9), "Conv": random(1, 16, 8, 8, seed=2), "left MatMul": random(64, 5, seed=2)}


def build(case, opset=21, dtype="float"):
    x, body, shape = CONSUMERS[case]
    numpy_type = {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]
    text = f"g ({x}) => (float y) {{ {body} }}".replace("float", dtype)
    proto = ir.to_proto(declare(text, {"w": random(*shape, dtype=numpy_type)}, opset))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def feed(case, dtype=np.float32):
    array = FEEDS.get(case, random(3, 5, 64, seed=2) if case.startswith("stacked") else random(5, 64, seed=2))
    return array if case == "Gather" else array.astype(dtype)


@pytest.mark.parametrize("mode", ["symmetric", "minmax"])
@pytest.mark.parametrize("form", ["fold", "dequantize"])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.012), (4, 0.17), (2, 0.75)])
@pytest.mark.parametrize("case", CONSUMERS)
def test_every_consumer(case, bits, error, block, form, mode):
    opset = 25 if bits == 2 else 21
    model, original = build(case, opset), build(case, opset)
    edits, refusals = apply(model, bits=bits, block=block, form=form, mode=mode, method="mse")
    assert list(edits) == ["w"]
    assert not refusals
    assert 0 < relative(run(model, x=feed(case)), run(original, x=feed(case))) < error
    dtype = f"{'int' if mode == 'symmetric' else 'uint'}{bits}"
    assert model.graph.initializers[f"w_{dtype}"].const_value.dtype.name.lower() == dtype
    stored = sum(
        v.const_value.nbytes for name, v in model.graph.initializers.items() if not name.endswith(("blocks", "shape"))
    )
    assert f"to {stored:,} bytes" in edits["w"]
    assert ("blocks of 16" in edits["w"]) == bool(block and len(CONSUMERS[case][2]) == 2)
    again = ir.to_proto(model).SerializeToString(deterministic=True)
    assert apply(model, bits=bits, block=block, form=form, mode=mode, method="mse") == ({}, {})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == again


@pytest.mark.parametrize("form", ["fold", "dequantize"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("case", CONSUMERS)
def test_float8(case, dtype, granularity, form):
    model, original = build(case, 19, dtype), build(case, 19, dtype)
    edits, refusals = apply(model, mode="float8", granularity=granularity, form=form)
    assert list(edits) == ["w"]
    assert not refusals
    stored = {v.const_value.dtype.name for v in model.graph.initializers.values()}
    assert stored == {"FLOAT8E4M3FN", "FLOAT16" if dtype == "float16" and form == "dequantize" else "FLOAT"}
    x = feed(case)
    x = x.astype(np.float16) if dtype == "float16" and x.dtype == np.float32 else x
    assert 0 < relative(run(model, x=x), run(original, x=x)) < 0.05, "three bits of mantissa"
    again = ir.to_proto(model).SerializeToString(deterministic=True)
    assert apply(model, mode="float8") == ({}, {})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == again


def test_the_runtime_folds_float8_away(tmp_path):
    model = build("MatMul", 19)
    apply(model, mode="float8")
    session(model, tmp_path / "m.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node] == ["MatMul"]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("block", [0, 16])
def test_the_runtime_folds_the_default_form_away(bits, block, tmp_path):
    model = build("MatMul", 25)
    apply(model, bits=bits, block=block, method="mse", mode="minmax")
    session(model, tmp_path / "m.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node] == ["MatMul"]


def test_the_runtime_merges_blocks_with_the_product(tmp_path):
    model = build("MatMul")
    apply(model, bits=4, block=16, form="dequantize")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node] == ["MatMulNBits"]


@pytest.mark.parametrize("form", ["fold", "dequantize"])
@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_float_types(dtype, form):
    if (dtype, form) == ("double", "dequantize"):
        return
    model, original = build("MatMul", dtype=dtype), build("MatMul", dtype=dtype)
    assert apply(model, bits=4, block=16, method="mse", form=form)[0]
    x = feed("MatMul", {"float16": np.float16, "double": np.float64}[dtype])
    assert relative(run(model, x=x), run(original, x=x)) < 0.15


def test_better_methods_make_smaller_errors():
    original = build("MatMul")
    mixing = random(16, 64, seed=9)
    data = [{"x": random(5, 16, seed=i) @ mixing} for i in range(30)]
    errors = {}
    for method in ("rtn", "mse", "gptq"):
        model = build("MatMul")
        edits, _ = apply(model, data, bits=4, block=32, method=method)
        assert f"by {method}" in edits["w"]
        fresh = random(5, 16, seed=99) @ mixing
        errors[method] = relative(run(model, x=fresh), run(original, x=fresh))
    assert errors["gptq"] < 0.7 * errors["mse"] < 0.7 * errors["rtn"]


def test_gptq_reaches_tied_weights_and_leaves_others_to_mse():
    text = """g (int64[6] i, float[6,64] x) => (float[6,48] y, float[6,48] z) {
        h = Gather(w, i) a = Add(h, x) t = Transpose(w) y = MatMul(a, t) z = MatMul(x, v) }"""

    def make():
        return declare(text, {"w": random(48, 64), "v": random(64, 48, seed=1)})

    model = make()
    data = [{"i": np.arange(6), "x": random(6, 64, seed=i)} for i in range(4)]
    edits, _ = apply(model, data, bits=4, block=16, method="gptq")
    assert {name: summary.split(" by ")[1][:4] for name, summary in edits.items()} == {"w": "gptq", "v": "gptq"}
    conv = build("Conv")
    edits, _ = apply(conv, [{"x": feed("Conv")}], bits=4, method="gptq")
    assert "by mse" in edits["w"]


def test_a_square_weight_is_compensated_along_its_inputs():
    """The lookup comes first and has rows, which are not what the product sums up."""
    text = "g (int64[6] i) => (float[6,64] y) { h = Gather(w, i) y = MatMul(h, w) }"
    model = declare(text, {"w": random(64, 64)})
    edits, _ = apply(model, [{"i": np.arange(6)}], bits=4, block=16, method="gptq")
    assert "by mse" in edits["w"]


@pytest.mark.parametrize(
    ("case", "opset", "options", "reason"),
    [
        ("MatMul", 20, {"bits": 4}, "integers of 4 bits need opset 21, and this graph has 20"),
        ("MatMul", 18, {"mode": "float8"}, "float8e4m3fn needs opset 19, and this graph has 18"),
        ("MatMul", 24, {"bits": 2}, "integers of 2 bits need opset 25, and this graph has 24"),
        (
            "MatMul",
            20,
            {"block": 16, "form": "dequantize"},
            'in blocks needs opset 21, and this graph has 20; use form="fold" or a higher opset',
        ),
        ("MatMul", 21, {"block": 24}, 'its 64 weights are not whole blocks of 24; use form="dequantize"'),
        ("MatMul", 21, {"block": 2, "mode": "minmax"}, "its integers and scales would not take less room than it does"),
    ],
)
def test_refusals(case, opset, options, reason):
    model = build(case, opset)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    edits, refusals = apply(model, **options)
    assert not edits
    assert reason in refusals["w"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_nan_is_refused():
    model = declare(
        "g (float[5,64] x) => (float[5,48] y) { y = MatMul(x, w) }", {"w": np.full((64, 48), np.inf, np.float32)}
    )
    assert apply(model, bits=4) == ({}, {"w": "it holds NaN or infinity"})


def test_blocks_that_are_not_whole_with_dequantize():
    model, original = build("MatMul"), build("MatMul")
    apply(model, bits=4, block=24, form="dequantize")
    assert model.graph.initializers["w_scale"].const_value.shape == (3, 48)
    assert relative(run(model, x=feed("MatMul")), run(original, x=feed("MatMul"))) < 0.2


def test_without_data_gptq_is_skipped():
    model = build("MatMul")
    ctx = Context("portable", 0, lambda node, inputs, opset: None, Shapes(model), None)
    assert QuantizeWeights(method="gptq").wants_data()
    assert QuantizeWeights(method="gptq").skip_reason(model, ctx) == NEEDS_DATA
    assert not QuantizeWeights().wants_data()


def test_files_with_few_bits_are_read_again(tmp_path):
    for bits, opset in ((4, 21), (2, 25)):
        model = build("MatMul", opset)
        apply(model, bits=bits, block=16)
        expected = run(model, x=feed("MatMul"))
        onnxopt.save(model, tmp_path / "m.onnx")
        np.testing.assert_array_equal(run(onnxopt.load(tmp_path / "m.onnx"), x=feed("MatMul")), expected)


def test_scales_of_quantized_products_are_no_weights():
    text = "g (float[n,256] x) => (float[n,256] y) { y = MatMul(x, w) }"
    made = onnxopt.optimize(
        ir.to_proto(declare(text, {"w": random(256, 256)})),
        passes="quantize-matmul{block=32},quantize-weights",
        target="cpu",
        max_error=0.5,
        measure=False,
    )
    assert [p.status for p in made.report.passes] == ["kept", "unchanged"]
    assert not made.report.passes[1].refusals
    assert collections.Counter(n.op_type for n in all_nodes(made.model)) == {"MatMulNBits": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "float8", "block": 16}, "quantize-weights: mode=float8 goes with bits=8, block=0 and method=rtn."),
        ({"bits": 3}, 'quantize-weights: bits is "3"; use 8 or 4 or 2.'),
        ({"method": "awq"}, 'quantize-weights: method is "awq"; use rtn or mse or gptq.'),
        ({"block": 1}, "quantize-weights: block is 1; use 0 for none, or 2 or more."),
        ({"block": 32, "granularity": "tensor"}, "quantize-weights: blocks and gptq need granularity=channel."),
        ({"method": "gptq", "granularity": "tensor"}, "quantize-weights: blocks and gptq need granularity=channel."),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(UsageError) as error:
        QuantizeWeights(**options)
    assert str(error.value) == message
