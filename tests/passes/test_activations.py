import math

import numpy as np
import onnx
import pytest

import onnxopt

SPEC = "fuse-activations"


def model(body, *, inputs="float[2,3,4,4] x", outputs="float y", opset=17, **arrays):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def numbers(dtype=np.float32, **given):
    return {name: np.array(value, dtype) for name, value in given.items()}


def same(proto, found, values):
    """Both give the same, also for large numbers, infinities and the bounds themselves."""
    x = np.resize(np.array(values, np.float32), (2, 3, 4, 4))
    verification = onnxopt.verify(proto, found.model, feeds=[{"x": x}])
    assert verification.ok, verification.reason


EDGES = [-1e30, -7, -3.5, -3, -1, -0.0, 0, 1e-3, 0.5, 1, 2.5, 3, 5.9, 6, 7, 1e30, math.inf, -math.inf]


# Clip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        ("a = Clip(x, l, h) y = Clip(a, m, n)", 1.0, 2.0),
        ("a = Clip(x, m, n) y = Clip(a, l, h)", 1.0, 2.0),
        ("a = Relu(x) y = Clip(a, , n)", 0.0, 5.0),
        ("a = Clip(x, , n) y = Relu(a)", 0.0, 5.0),
        ("a = Max(x, m) y = Min(h, a)", 1.0, 2.0),
        ("a = Clip(x, l, h) b = Relu(a) c = Min(b, one) y = Max(c, l)", 0.0, 1.0),
        # Ranges that do not overlap leave one number.
        ("a = Clip(x, l, one) y = Clip(a, h, n)", 2.0, 2.0),
        ("a = Clip(x, h, n) y = Clip(a, l, one)", 1.0, 1.0),
        ("a = Relu(x) y = Min(a, minus)", -3.0, -3.0),
    ],
)
def test_clamps_become_one(rewritten, body, low, high):
    given = numbers(l=-1, h=2, m=1, n=5, one=1, minus=-3)
    proto = model(body, **given)
    found = rewritten(proto, SPEC)
    (node,) = found.nodes
    assert (node.op_type, [float(v.const_value.numpy()) for v in node.inputs[1:]]) == ("Clip", [low, high])
    same(proto, found, EDGES)


@pytest.mark.parametrize(
    ("body", "op_type"),
    [
        ("a = Max(x, m) y = Max(a, h)", "Max"),
        ("a = Min(x, m) y = Min(h, a)", "Min"),
        ("a = Relu(x) y = Relu(a)", "Relu"),
        ("a = Max(x, zero) y = Max(a, l)", "Relu"),
        ("a = Relu(x) y = Clip(a)", "Clip"),
    ],
)
def test_one_sided_clamps(rewritten, body, op_type):
    proto = model(body, **numbers(l=-1, h=2, m=1, zero=0))
    found = rewritten(proto, SPEC)
    assert [n.op_type for n in found.nodes] == [op_type]
    same(proto, found, EDGES)


def test_bounds_as_attributes(rewritten):
    proto = model("a = Clip <min = -1.0> (x) y = Clip <max = 2.0, min = 0.5> (a)", opset=10)
    found = rewritten(proto, SPEC)
    (node,) = found.nodes
    assert {name: a.value for name, a in node.attributes.items()} == {"min": 0.5, "max": 2.0}


def test_what_clamps_nothing_is_left_out(rewritten):
    proto = model("a = Max(x, l) y = Neg(a)", **numbers(l=-math.inf))
    assert rewritten(proto, SPEC).ops == {"Neg": 1}


@pytest.mark.parametrize(
    "body",
    [
        "a = Clip(x, h, l) y = Clip(a, m, n)",
        "a = Clip(x, l, h) y = Clip(a, n, m)",
        "a = Clip(x, v, h) y = Clip(a, m, n)",
    ],
)
def test_bounds_that_cross_or_are_unknown_stay(rewritten, body):
    inputs = "float[2,3,4,4] x, float v"
    found = rewritten(model(body, inputs=inputs, **numbers(l=-1, h=2, m=1, n=5)), SPEC)
    assert found.ops == {"Clip": 2}
    assert "the bounds cross, or are not numbers known in advance" in found.refusals


def test_integers_vectors_and_other_uses_stay(rewritten):
    proto = model("a = Max(x, l) y = Min(a, h)", inputs="int32[4] x", outputs="int32 y", **numbers(np.int32, l=0, h=2))
    assert rewritten(proto, SPEC).edits == 0
    proto = model("a = Max(x, l) y = Min(a, h)", l=np.zeros(4, np.float32), h=np.float32(2))
    assert rewritten(proto, SPEC).edits == 0
    proto = model("a = Clip(x, l, h) y = Relu(a)", outputs="float y, float a", **numbers(l=-1, h=2))
    assert rewritten(proto, SPEC).edits == 0
    proto = model("a = Max(x, l) y = Min(a, h)", inputs="float[4] x", **numbers(l=[[0]], h=[[2]]))
    assert rewritten(proto, SPEC).edits == 0


@pytest.mark.parametrize(("producer", "edits"), [("Conv(x, w)", 1), ("Neg(x)", 0)])
def test_max_with_zero_is_a_relu_where_the_runtime_fuses_it(rewritten, producer, edits):
    proto = model(f"a = {producer} y = Max(zero, a)", w=np.ones((2, 3, 1, 1), np.float32), zero=np.float32([0]))
    found = rewritten(proto, SPEC)
    assert found.edits == edits
    assert ("Relu" in found.ops) == bool(edits)


# HardSigmoid --------------------------------------------------------------------------------------------------

RAMPS = {
    "divided": "a = Add(x, three) b = Clip(a, zero, six) y = Div(b, six)",
    "multiplied": "a = Add(three, x) b = Clip(a, zero, six) y = Mul(sixth, b)",
    "scaled first": "a = Mul(x, sixth) b = Add(a, half) y = Clip(b, zero, one)",
    "subtracted": "a = Sub(x, minus) b = Max(a, zero) c = Min(b, six) y = Div(c, six)",
    "relu": "a = Add(x, three) b = Relu(a) c = Min(b, six) y = Div(c, six)",
    "turned": "a = Neg(x) b = Sub(a, three) c = Clip(b, minussix, zero) y = Div(c, minussix)",
    "from above": "a = Sub(half, d) y = Clip(a, zero, one) ",
}
NUMBERS = {"three": 3, "zero": 0, "six": 6, "half": 0.5, "one": 1, "minus": -3, "minussix": -6, "sixth": 1 / 6}


@pytest.mark.parametrize("name", RAMPS)
def test_hard_sigmoid(rewritten, name):
    body = ("d = Mul(x, minussix) " if "d)" in RAMPS[name] else "") + RAMPS[name]
    proto = model(body, **numbers(**NUMBERS))
    found = rewritten(proto, SPEC)
    (node,) = found.nodes
    assert node.op_type == "HardSigmoid"
    expected = (6, 0.5) if name == "from above" else (1 / 6, 0.5)
    assert (node.attributes["alpha"].value, node.attributes["beta"].value) == pytest.approx(expected)
    same(proto, found, [v for v in EDGES if math.isfinite(v)])


def test_numbers_around_a_clip(rewritten):
    proto = model("a = Add(x, three) b = Clip(a, zero, six) y = Sub(b, three)", **numbers(**NUMBERS))
    (node,) = rewritten(proto, SPEC).nodes
    assert (node.op_type, [float(v.const_value.numpy()) for v in node.inputs[1:]]) == ("Clip", [-3, 3])


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) b = Clip(a, zero, six) y = Div(b, three)",
        "a = Add(x, three) y = Clip(a, zero, six)",
        "a = Add(x, three) b = Clip(a, one, six) y = Div(b, six)",
        "a = Add(x, x) b = Clip(a, zero, six) y = Pow(b, six)",
    ],
)
def test_what_is_no_hard_sigmoid(rewritten, body):
    assert rewritten(model(body, **numbers(**NUMBERS)), SPEC).edits == 0


def test_hard_sigmoid_is_too_coarse_for_double(rewritten):
    proto = model(RAMPS["divided"], inputs="double[4] x", outputs="double y", **numbers(np.float64, **NUMBERS))
    found = rewritten(proto, SPEC)
    assert found.edits == 0
    assert found.refusals == {"HardSigmoid holds its parameters as float32, which is too coarse for this type"}


def test_half_precision(rewritten):
    proto = model(RAMPS["multiplied"], inputs="float16[8] x", outputs="float16 y", **numbers(np.float16, **NUMBERS))
    assert rewritten(proto, SPEC).ops == {"HardSigmoid": 1}


# HardSwish ----------------------------------------------------------------------------------------------------

SWISHES = {
    "divided last": "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",
    "divided first": "a = Add(x, three) b = Clip(a, zero, six) c = Div(b, six) y = Mul(c, x)",
    "gated": "a = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul(x, a)",
    "halves": "a = Mul(x, sixth) b = Add(a, half) c = Clip(b, zero, one) y = Mul(x, c)",
}


@pytest.mark.parametrize("name", SWISHES)
def test_hard_swish(rewritten, name):
    proto = model(SWISHES[name], **numbers(**NUMBERS))
    found = rewritten(proto, SPEC)
    assert found.ops == {"HardSwish": 1}
    same(proto, found, [v for v in EDGES if abs(v) < 1e3])


@pytest.mark.parametrize("name", SWISHES)
def test_hard_swish_before_it_was_an_operator(rewritten, name):
    proto = model(SWISHES[name], opset=13, **numbers(**NUMBERS))
    found = rewritten(proto, SPEC)
    assert found.ops == {"HardSigmoid": 1, "Mul": 1}
    assert found.edits == (name != "gated")


def test_other_factors_and_slopes(rewritten):
    body = "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) d = Mul(c, z) y = Div(d, six)"
    proto = model(body, inputs="float[2,3,4,4] x, float[2,3,4,4] z", **numbers(**NUMBERS))
    assert rewritten(proto, SPEC).ops == {"HardSwish": 1, "Mul": 1}
    body = "a = Mul(x, half) b = Add(a, half) c = Clip(b, zero, one) y = Mul(x, c)"
    assert rewritten(model(body, **numbers(**NUMBERS)), SPEC).ops == {"HardSigmoid": 1, "Mul": 1}


def test_a_product_that_is_none(rewritten):
    body = "a = Add(x, three) b = Clip(a, one, six) c = Mul(x, b) y = Div(c, six)"
    found = rewritten(model(body, **numbers(**NUMBERS)), SPEC)
    assert found.edits == 0
    assert found.refusals == {"the product of x and a clamp of it is none that has an operator"}


# Gated residuals ----------------------------------------------------------------------------------------------


def squeeze(tail, gate="HardSigmoid <alpha = 0.2, beta = 0.5> (z)", *, first="Conv(p, w, b)", **more):
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((3, 3, 1, 1), np.float32), "b": rng.standard_normal(3, np.float32)} | more
    body = f"p = GlobalAveragePool(x) z = {first} g = {gate} m = Mul(x, g) {tail}"
    return model(body, **arrays)


@pytest.mark.parametrize("tail", ["y = Add(x, m)", "y = Add(m, x)"])
def test_a_gated_residual(rewritten, tail):
    found = rewritten(squeeze(tail), SPEC)
    assert found.ops == {"GlobalAveragePool": 1, "Conv": 1, "Clip": 1, "Mul": 1}
    clip = next(n for n in found.nodes if n.op_type == "Clip")
    assert [float(v.const_value.numpy()) for v in clip.inputs[1:]] == [1, 2]


def test_a_gate_without_bias(rewritten):
    found = rewritten(squeeze("y = Add(x, m)", first="Conv(p, w)"), SPEC)
    assert found.ops == {"GlobalAveragePool": 1, "Conv": 1, "Clip": 1, "Mul": 1}


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (squeeze("a = Add(x, m) y = Add(a, z)"), "is used elsewhere, too"),
        (squeeze("n = Conv(x, w) a = Add(x, m) y = Add(a, n)"), "is used elsewhere, too"),
    ],
)
def test_a_gated_residual_that_stays(rewritten, proto, reason):
    found = rewritten(proto, SPEC)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals


@pytest.mark.parametrize(
    "proto",
    [
        squeeze("y = Add(x, m)", "Sigmoid(z)"),
        squeeze("y = Add(x, m)", first="Neg(p)"),
        squeeze("n = Neg(m) a = Add(x, m) y = Add(a, n)"),
        squeeze("n = Neg(x) y = Add(n, m)"),
    ],
)
def test_what_is_no_gated_residual(rewritten, proto):
    assert rewritten(proto, SPEC).edits == 0


def test_nested_graphs_and_functions(rewritten):
    body = f"""y = If (c) <then_branch = t () => (float[2,3,4,4] a) {{ {RAMPS["divided"].replace("a =", "u =").replace("(a", "(u").replace("y =", "a =")} }},
        else_branch = e () => (float[2,3,4,4] b) {{ b = Relu(x) }}>"""
    found = rewritten(model(body, inputs="float[2,3,4,4] x, bool c", **numbers(**NUMBERS)), SPEC)
    assert found.ops == {"If": 1, "HardSigmoid": 1, "Relu": 1}
    text = """<ir_version: 9, opset_import: ["" : 17, "my" : 1]> g (float[n] x) => (float[n] y) { y = my.F (x) }
        <domain: "my", opset_import: ["" : 17]> F (x) => (y) { a = Relu(x) y = Relu(a) }"""
    assert rewritten(text, SPEC).edits == 0
