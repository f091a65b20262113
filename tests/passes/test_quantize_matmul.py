"""Products from weights of few bits."""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt
from onnxopt.analysis import matrices
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import NEEDS_DATA, Context, Edit, Guarantee, Refusal
from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes
from onnxopt.numeric import gptq, nbits
from onnxopt.passes.quantize.quantize_matmul import QuantizeMatMul

HEAD = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>'


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def declare(text, arrays):
    proto = onnx.parser.parse_model(text if text.lstrip().startswith("<") else f"{HEAD} {text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    return ir.from_proto(proto)


def context(model, target="cpu", data=None):
    learnt = None if data is None else calibration(data, real=True)
    return Context(
        target=target, seed=0, evaluate=lambda node, inputs, opset: None, shapes=Shapes(model), calibration=learnt
    )


def apply(model, *, target="cpu", data=None, **options):
    """Apply every edit; return the summaries by output, and the reasons of refusals."""
    made = QuantizeMatMul(**options)
    ctx = context(model, target, data)
    assert made.skip_reason(model, ctx) is None
    edits, refusals = {}, {}
    for found in made.run(model, ctx):
        if isinstance(found, Edit):
            found.apply()
            edits[found.site.output] = found.summary
        else:
            assert isinstance(found, Refusal)
            refusals[found.site.output] = found.reason
    onnx.checker.check_model(ir.to_proto(model))
    return edits, refusals


def ops(model):
    return dict(collections.Counter(node.op_type for node in all_nodes(model)))


def run(model, **feed):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feed)


def attributes(node):
    return {name: a.value for name, a in node.attributes.items()}


def dequantized(node):
    """Return the matrix, (outputs, inputs), that a MatMulNBits node holds."""
    a = attributes(node)
    packed, scales = (node.inputs[i].const_value.numpy() for i in (1, 2))
    blocks = scales.shape[1]
    codes = nbits.unpack(packed.reshape(a["N"], -1), a["bits"], blocks * a["block_size"])
    offsets = np.full(scales.shape, 1 << (a["bits"] - 1), np.uint8)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        offsets = nbits.unpack(node.inputs[3].const_value.numpy(), a["bits"], blocks)
    return nbits.decode(codes, nbits.BlockGrid(scales, offsets, a["bits"], a["block_size"]), a["K"])


def plain(inputs=96, outputs=80, rank=2):
    lead = ",".join(f"n{i}" for i in range(rank - 1))
    text = f"g (float[{lead},{inputs}] x) => (float[{lead},{outputs}] y) {{ y = MatMul(x, w) }}"
    return declare(text, {"w": random(inputs, outputs)})


def close(got, expected, tolerance):
    return np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


ROUNDED_INPUTS = 0.012
"""What rounding the inputs to 8 bits may cost, as a part of the output's norm."""


def test_promises_what_it_keeps():
    assert QuantizeMatMul.guarantee is Guarantee.APPROXIMATE
    assert not QuantizeMatMul().wants_data()
    assert QuantizeMatMul(method="gptq").wants_data()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.booleans(),
    st.sampled_from(["rtn", "mse"]),
    st.integers(64, 300),
    st.integers(32, 100),
    st.integers(1, 9),
)
def test_the_runtime_computes_what_the_codes_stand_for(bits, block, symmetric, method, inputs, outputs, rows):
    model = plain(inputs, outputs)
    options = {"bits": bits, "block": block, "symmetric": symmetric, "method": method}
    edits, _ = apply(model, min_elements=1, **options)
    assert list(edits) == ["y"]
    node = model.graph.node(0)
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert edits["y"].endswith(f"to {stored:,} bytes")
    assert attributes(node)["accuracy_level"] == 4
    x = random(rows, inputs, seed=1)
    assert close(run(model, x=x)[0], x @ dequantized(node).T, ROUNDED_INPUTS)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.15), (2, 0.6)])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_the_result_is_near_the_original(bits, error, rank):
    model, original = plain(rank=rank), plain(rank=rank)
    apply(model, bits=bits, block=32, min_elements=1)
    x = random(*range(2, rank + 1), 96, seed=1)
    assert close(run(model, x=x)[0], run(original, x=x)[0], error)


FORMS = {
    "MatMul": ("y = MatMul(x, w)", {}, False),
    "MatMul and Add": ("p = MatMul(x, w) y = Add(p, b)", {"b": 80}, False),
    "Add and MatMul": ("p = MatMul(x, w) y = Add(b, p)", {"b": (1, 80)}, False),
    "Gemm": ("y = Gemm(x, w)", {}, False),
    "Gemm with bias": ("y = Gemm(x, w, b)", {"b": 80}, False),
    "Gemm with a row": ("y = Gemm(x, w, b)", {"b": (1, 80)}, False),
    "Gemm transB": ("y = Gemm<transB = 1>(x, w, b)", {"b": 80}, True),
    "Transpose and MatMul": ("t = Transpose(w) y = MatMul(x, t)", {}, True),
    "Transpose and Gemm transB": ("t = Transpose<perm = [1, 0]>(w) y = Gemm<transB = 1>(x, t, b)", {"b": 80}, False),
    "Identity and MatMul": ("t = Identity(w) y = MatMul(x, t)", {}, False),
}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_one_node(form, target):
    body, biases, transposed = FORMS[form]
    arrays = {"w": random(80, 96) if transposed else random(96, 80)}
    arrays |= {name: random(*np.atleast_1d(shape), seed=3) for name, shape in biases.items()}

    def build():
        return declare(f"g (float[n,96] x) => (float[n,80] y) {{ {body} }}", arrays)

    model, original = build(), build()
    edits, refusals = apply(model, target=target, block=32, bits=8, min_elements=1)
    assert len(edits) == 1
    assert not refusals
    assert ops(model) == {"MatMulNBits": 1}
    assert not {"w"} & set(model.graph.initializers)
    assert [o.name for o in model.graph.outputs] == ["y"]
    x = random(5, 96, seed=1)
    assert close(run(model, x=x)[0], run(original, x=x)[0], 0.02)


def test_a_second_run_changes_nothing():
    model = plain()
    apply(model, min_elements=1)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert apply(model, min_elements=1) == ({}, {})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_what_is_added_but_not_per_channel_stays():
    body = "p = MatMul(x, w) y = Add(p, b)"
    model = declare(f"g (float[5,96] x) => (float[5,80] y) {{ {body} }}", {"w": random(96, 80), "b": random(5, 80)})
    apply(model, min_elements=1)
    assert ops(model) == {"MatMulNBits": 1, "Add": 1}


@pytest.mark.parametrize(
    ("body", "bias", "left"),
    [
        ("y = Gemm<beta = 0.5>(x, w, b)", random(80), {}),
        ("y = Gemm(x, w, b)", random(1), {}),
        ("m = MatMul(x, w) y = Sum(b, m)", random(1, 80), {}),
        ("m = MatMul(x, w) y = Sum(m, b, z)", random(80), {"Sum": 1}),
        ("y = com.microsoft.FusedMatMul<transB = 1>(x, t)", random(80), {}),
    ],
)
def test_biases_and_products_of_any_form_are_taken_over(body, bias, left):
    text = f"g (float[n,96] x, float[n,80] z) => (float[n,80] y) {{ {body} }}"
    arrays = {"w": random(96, 80), "b": bias, "t": random(80, 96)}
    arrays = {name: a for name, a in arrays.items() if re.search(rf"[(, ]{name}[,)]", body)}
    model = declare(text, arrays)
    feed = {"x": random(5, 96, seed=2), "z": random(5, 80, seed=3)}
    expected = run(model, **feed)[0]
    edits, refusals = apply(model, bits=8, block=32, min_elements=1)
    assert len(edits) == 1
    assert not refusals
    assert ops(model) == {"MatMulNBits": 1, **left}
    assert close(run(model, **feed)[0], expected, 0.02)


def test_a_product_with_two_uses_keeps_its_value():
    body = "p = MatMul(x, w) y = Add(p, b) z = Neg(p)"
    model = declare(
        f"g (float[5,96] x) => (float[5,80] y, float[5,80] z) {{ {body} }}", {"w": random(96, 80), "b": random(80)}
    )
    apply(model, min_elements=1)
    assert ops(model) == {"MatMulNBits": 1, "Add": 1, "Neg": 1}


TIED = "g (int64[n] i) => (float[n,60] y) { h = Gather(w, i) t = Transpose(w) y = MatMul(h, t) }"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_tied_table_is_stored_once(bits, symmetric):
    model, original = declare(TIED, {"w": random(60, 96)}), declare(TIED, {"w": random(60, 96)})
    edits, _ = apply(model, bits=bits, block=32, symmetric=symmetric, min_elements=1)
    assert "shared with a lookup" in edits["y"]
    assert ops(model) == {"GatherBlockQuantized": 1, "Reshape": 1, "MatMulNBits": 1}
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values()) - 3 * 8
    assert edits["y"].endswith(f"to {stored:,} bytes")
    i = np.array([0, 3, 59, -1])
    error = {8: 0.02, 4: 0.2, 2: 0.8}[bits]
    assert close(run(model, i=i)[0], run(original, i=i)[0], error)


def test_lookups_give_what_the_product_multiplies_with():
    text = "g (int64[n] i, float[m,96] x) => (float[n,96] h, float[m,60] y) { h = Gather(w, i) t = Transpose(w) y = MatMul(x, t) }"
    model = declare(text, {"w": random(60, 96)})
    apply(model, block=32, min_elements=1)
    rows, _ = run(model, i=np.arange(60), x=random(1, 96))
    _, product = run(model, i=np.arange(1), x=np.eye(96, dtype=np.float32))
    assert close(product.T, rows, 0.02)


def test_a_weight_of_two_products_is_stored_once():
    body = "a = MatMul(x, w) b = Relu(a) y = MatMul(b, w)"
    model = declare(f"g (float[n,96] x) => (float[n,96] y) {{ {body} }}", {"w": random(96, 96)})
    edits, _ = apply(model, min_elements=1)
    assert list(edits) == ["a"]
    assert ops(model) == {"MatMulNBits": 2, "Relu": 1}
    assert len(model.graph.initializers) == 3


ATTENTION = """g (float[1,7,96] x, int32[1,7] m, float[1,1,7,7] a) => (float[1,7,96] y) {
    y = com.microsoft.Attention<num_heads = 4, ATTRIBUTES>(x, w, b, MASK, , ADDED)
}"""


@pytest.mark.parametrize(
    ("given", "mask", "added"),
    [
        ("unidirectional = 1", "m", ""),
        ("scale = 0.3", "", "a"),
        ("mask_filter_value = -100.0", "m", "a"),
        ("scale = 0.1", "", ""),
    ],
)
def test_attention_is_taken_apart(given, mask, added):
    text = ATTENTION.replace("ATTRIBUTES", given).replace("MASK", mask).replace("ADDED", added)
    text = text.replace(", , )", ")").replace(", )", ")")
    arrays = {"w": random(96, 288) * 0.1, "b": random(288, seed=2)}
    model, original = declare(text, arrays), declare(text, arrays)
    edits, refusals = apply(model, bits=8, block=32)
    assert list(edits) == ["y"]
    assert not refusals
    assert ops(model) == {"MatMulNBits": 1, "Split": 1, "MultiHeadAttention": 1}
    mask_values = np.array([[1, 1, 1, 1, 1, 0, 0]], np.int32)
    feed = {"x": random(1, 7, 96, seed=1), "m": mask_values, "a": random(1, 1, 7, 7, seed=4)}
    assert close(run(model, **feed)[0], run(original, **feed)[0], 0.02)


def test_attention_with_values_of_another_width():
    text = """g (float[1,7,96] x) => (float[1,7,64] y) {
        y = com.microsoft.Attention<num_heads = 4, qkv_hidden_sizes = [96, 96, 64]>(x, w, b)
    }"""
    arrays = {"w": random(96, 256) * 0.1, "b": random(256, seed=2)}
    model, original = declare(text, arrays), declare(text, arrays)
    apply(model, bits=8, block=32)
    x = random(1, 7, 96, seed=1)
    assert close(run(model, x=x)[0], run(original, x=x)[0], 0.02)


BIG = {"w": random(96, 80)}
REFUSALS = {
    "overridable": (
        "g (float[n,96] x, float[96,80] w) => (float[n,80] y) { y = MatMul(x, w) }",
        BIG,
        "also an input of the graph",
    ),
    "an output": (
        "g (float[n,96] x) => (float[n,80] y, float[96,80] w) { y = MatMul(x, w) }",
        BIG,
        "the weight is an output of the graph",
    ),
    "double": (
        "g (double[n,96] x) => (double[n,80] y) { y = MatMul(x, w) }",
        {"w": random(96, 80, dtype=np.float64)},
        "of float64 is not used for target cpu",
    ),
    "float16": (
        "g (float16[n,96] x) => (float16[n,80] y) { y = MatMul(x, w) }",
        {"w": random(96, 80, dtype=np.float16)},
        "of float16 is not used for target cpu",
    ),
    "transA": (
        "g (float[96,n] x) => (float[n,80] y) { y = Gemm<transA = 1>(x, w) }",
        BIG,
        "it transposes its activation",
    ),
    "alpha": (
        "g (float[n,96] x) => (float[n,80] y) { y = Gemm<alpha = 0.5>(x, w) }",
        BIG,
        "the Gemm scales its result",
    ),
    "computed bias": (
        "g (float[n,96] x, float[80] b) => (float[n,80] y) { y = Gemm(x, w, b) }",
        BIG,
        "its bias is not one constant per column",
    ),
    "a vector": (
        "g (float[96] x) => (float[80] y) { y = MatMul(x, w) }",
        BIG,
        "its activation is a vector",
    ),
    "another use": (
        "g (float[n,96] x) => (float[n,80] y, float[96,80] z) { y = MatMul(x, w) z = Neg(w) }",
        BIG,
        "another node uses the weight in a way that needs floating-point numbers",
    ),
    "both ways round": (
        "g (float[n,96] x) => (float[n,96] y) { t = Transpose(w) a = MatMul(x, w) y = MatMul(a, t) }",
        BIG,
        "the weight is multiplied with both ways round",
    ),
    "square, both ways round": (
        "g (float[n,96] x) => (float[n,96] y) { a = MatMul(x, w) y = Gemm<transB = 1>(a, w) }",
        {"w": random(96, 96)},
        "the weight is multiplied with both ways round",
    ),
    "a view that is an output": (
        "g (float[n,80] x) => (float[n,96] y, float[80,96] t) { t = Transpose(w) y = MatMul(x, t) }",
        BIG,
        "another node uses the weight",
    ),
    "few inputs": (
        "g (float[n,32] x) => (float[n,800] y) { y = MatMul(x, w) }",
        {"w": random(32, 800)},
        "a product of 32 inputs and 800 outputs is faster as it is",
    ),
    "few outputs": (
        "g (float[n,800] x) => (float[n,4] y) { y = MatMul(x, w) }",
        {"w": random(800, 4)},
        "a product of 800 inputs and 4 outputs is faster as it is",
    ),
    "a table of odd rows": (
        TIED.replace("60", "70"),
        {"w": random(70, 100)},
        "a lookup table whose rows are not a whole number of blocks",
    ),
    "a table of columns": (
        "g (int64[n] i) => (float[n,96] y) { h = Gather(w, i) y = MatMul(h, w) }",
        {"w": random(96, 96)},
        "a lookup table whose rows are not a whole number of blocks",
    ),
    "columns looked up": (
        "g (int64[3] i, float[n,96] x) => (float[96,3] h, float[n,80] y) { h = Gather<axis = 1>(w, i) y = MatMul(x, w) }",
        BIG,
        "another node uses the weight",
    ),
    "NaN": (
        "g (float[n,96] x) => (float[n,80] y) { y = MatMul(x, w) }",
        {"w": np.full((96, 80), np.nan, np.float32)},
        "the weight holds NaN or infinity",
    ),
    "past": (
        """g (float[1,7,96] x, float[2,1,4,3,24] p) => (float[1,7,96] y, float[2,1,4,10,24] q) {
            y, q = com.microsoft.Attention<num_heads = 4>(x, w, b, , p)
        }""",
        {"w": random(96, 288), "b": random(288)},
        "the Attention keeps past keys and values",
    ),
    "rotary": (
        "g (float[1,7,96] x) => (float[1,7,96] y) { y = com.microsoft.Attention<num_heads = 4, do_rotary = 1>(x, w, b) }",
        {"w": random(96, 288), "b": random(288)},
        "the Attention rotates its queries and keys",
    ),
    "computed bias of attention": (
        "g (float[1,7,96] x, float[288] b) => (float[1,7,96] y) { y = com.microsoft.Attention<num_heads = 4>(x, w, b) }",
        {"w": random(96, 288)},
        "its bias is not constant",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    text, arrays, reason = REFUSALS[case]
    model = declare(text, arrays)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    edits, refusals = apply(model, block=32, min_elements=1)
    assert not edits
    assert len(refusals) == 1
    assert reason in next(iter(refusals.values()))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_unknown_axes_are_refused():
    text = "g (float[n] x, int64[k] s) => (float[m,80] y) { r = Reshape(x, s) y = MatMul(r, w) }"
    _, refusals = apply(declare(text, {"w": random(96, 80)}), min_elements=1)
    assert refusals == {"y": "the number of axes of the input is not known"}


def test_constants_computed_or_on_the_left_are_no_sites():
    body = "v = Neg(x) a = MatMul(x, v) y = MatMul(w, a)"
    model = declare(f"g (float[96,96] x) => (float[80,96] y) {{ {body} }}", {"w": random(80, 96)})
    assert apply(model, min_elements=1) == ({}, {})


def test_small_matrices_stay():
    assert apply(plain(), min_elements=96 * 80 + 1) == ({}, {})
    assert apply(plain(), min_elements=96 * 80)[0]


def test_cuda_takes_float16_and_whole_blocks():
    text = "g (float16[n,96] x) => (float16[n,80] y) { y = MatMul(x, w) }"
    model = declare(text, {"w": random(96, 80, dtype=np.float16)})
    assert apply(model, target="cuda", block=32, min_elements=1)[0]
    node = model.graph.node(0)
    assert node.inputs[2].dtype == ir.DataType.FLOAT16
    assert "accuracy_level" not in node.attributes
    _, refusals = apply(plain(), target="cuda", block=64, min_elements=1)
    assert refusals == {"y": "96 inputs are not a whole number of blocks of 64"}


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        ("portable", {}, "use quantize-weights"),
        ("cuda", {"bits": 2}, "MatMulNBits has no 2 bits on CUDA"),
        ("cpu", {"method": "gptq"}, NEEDS_DATA),
    ],
)
def test_when_it_does_not_apply(target, options, reason):
    model = plain()
    assert reason in (QuantizeMatMul(**options).skip_reason(model, context(model, target)) or "")


def samples(count, inputs=96):
    mixing = random(24, inputs, seed=5)
    return [{"x": random(20, 24, seed=i) @ mixing} for i in range(count)]


def test_gptq_halves_the_error():
    text = "g (float[n,96] x) => (float[n,80] y) { h = Relu(x) y = MatMul(h, w) }"
    original = declare(text, {"w": random(96, 80)})
    errors = {}
    for method in ("rtn", "mse", "gptq"):
        model = declare(text, {"w": random(96, 80)})
        edits, _ = apply(model, block=32, method=method, min_elements=1, data=samples(30))
        assert f"by {method}" in edits["y"]
        fresh = {"x": samples(31)[-1]["x"]}
        errors[method] = np.linalg.norm(run(model, **fresh)[0] - run(original, **fresh)[0])
    assert errors["gptq"] < 0.6 * errors["rtn"]
    assert errors["gptq"] < 0.7 * errors["mse"]


def test_data_goes_through_in_portions(monkeypatch):
    monkeypatch.setattr(matrices, "GRAM_BYTES", 1)
    text = "g (float[n,96] x) => (float[n,96] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
    model = declare(text, {"w": random(96, 96), "v": random(96, 96, seed=1)})
    seen = []
    ctx = context(model, data=samples(2))

    def observe(given, observers):
        seen.append(sorted(observers))
        ctx.calibration.observe(given, observers)

    watched = dataclasses.replace(ctx, calibration=dataclasses.replace(ctx.calibration, observe=observe))
    for edit in QuantizeMatMul(method="gptq", min_elements=1).run(model, watched):
        edit.apply()
    assert [len(names) for names in seen] == [1, 1]
    assert ops(model) == {"MatMulNBits": 2, "Relu": 1}


NESTED = f"""{HEAD[:-2]}, "local" : 1]>
    g (float[5,96] x, bool c) => (float[5,80] y) {{
        h = local.layer(x)
        z = If (c) <
            then_branch = thens () => (float[5,80] a) {{ a = MatMul(x, w) }},
            else_branch = elses () => (float[5,80] b) {{ b = Identity(h) }}
        >
        y = Add(h, z)
    }}
    <domain: "local", opset_import: ["" : 18]>
    layer (x) => (y) {{ k = Constant<value = float[96,80] {{VALUES}}>() y = MatMul(x, k) }}
"""


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_nested_graphs_and_functions(method):
    values = ",".join(f"{v:.6f}" for v in random(96, 80, seed=7).reshape(-1))
    text = NESTED.replace("VALUES", values)

    def build():
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random(96, 80), "w"))
        return ir.from_proto(proto)

    model, original = build(), build()
    edits, refusals = apply(
        model,
        bits=8,
        block=32,
        method=method,
        min_elements=1,
        data=[{"x": random(5, 96), "c": np.array(True)}],
    )
    assert set(edits) == {"a"}
    assert "by mse" in edits["a"]
    assert refusals == {"y": "the number of axes of the input is not known"}
    assert "w" not in model.graph.initializers
    for c in (True, False):
        feed = {"x": random(5, 96), "c": np.array(c)}
        assert close(run(model, **feed)[0], run(original, **feed)[0], 0.02)


def test_a_clone_is_not_touched_and_results_repeat():
    model = plain()
    clone, twin = model.clone(), model.clone()
    before = ir.to_proto(clone).SerializeToString(deterministic=True)
    apply(model, min_elements=1)
    assert ir.to_proto(clone).SerializeToString(deterministic=True) == before
    apply(twin, min_elements=1)
    serialized = [ir.to_proto(m).SerializeToString(deterministic=True) for m in (model, twin)]
    assert serialized[0] == serialized[1]


def test_the_whole_way_with_data(tmp_path):
    rows = np.concatenate([s["x"] for s in samples(8)])[:, None]
    np.savez(tmp_path / "data.npz", **{f"{i:03d}/x": r for i, r in enumerate(rows)})
    text = "g (float[n,96] x) => (float[n,80] y) { y = MatMul(x, w) }"
    passes = "quantize-matmul{method=gptq,block=32,min_elements=1}"
    made = onnxopt.optimize(
        ir.to_proto(declare(text, {"w": random(96, 80)})),
        passes=passes,
        target="cpu",
        data=str(tmp_path / "data.npz"),
        max_error=0.5,
        measure=False,
    )
    assert [p.status for p in made.report.passes] == ["kept"]
    assert "by gptq" in made.report.passes[0].applied[0].summary
    skipped = onnxopt.optimize(plain_proto(), passes=passes, target="cpu", max_error=0.5, measure=False)
    assert skipped.report.passes[0].reason == NEEDS_DATA


def plain_proto():
    return ir.to_proto(plain())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, 'quantize-matmul: bits is "3"; use 2, 4 or 8.'),
        ({"block": 48}, 'quantize-matmul: block is "48"; use 16, 32, 64, 128 or 256.'),
        ({"method": "awq"}, 'quantize-matmul: method is "awq"; use rtn, mse or gptq.'),
        ({"min_elements": 0}, "quantize-matmul: min_elements is 0; use 1 or more."),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(UsageError) as error:
        QuantizeMatMul(**options)
    assert str(error.value) == message


def test_options_are_documented():
    for field in dataclasses.fields(QuantizeMatMul):
        assert f"        {field.name}: " in f"    {QuantizeMatMul.__doc__}"


def test_losses_are_what_the_outputs_lose():
    x, w = random(50, 96), random(80, 96)
    error = w - np.round(w)
    expected = np.sum((x @ error.T) ** 2, axis=0)
    np.testing.assert_allclose(gptq.losses(error, x.T @ x), expected, rtol=1e-3)
