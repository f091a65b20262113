import numpy as np
import onnx
import pytest

import onnxopt

SPEC = "simplify-algebra"


def graph(body, *, inputs="float[n,3] x, float[n,3] z", outputs="float[a,b] y", opset=17, constants=""):
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({outputs})
    <{constants}>
    {{ {body} }}
    """


# One operand ------------------------------------------------------------------------------------------------


def test_inverses_cancel(rewritten):
    assert rewritten(graph("a = Neg(x) b = Neg(a) y = Exp(b)"), SPEC).ops == {"Exp": 1}
    text = graph("a = Not(x) b = Not(a) y = Cast <to = 1> (b)", inputs="bool[2,3] x")
    assert rewritten(text, SPEC).ops == {"Cast": 1}


@pytest.mark.parametrize("op", ["Abs", "Relu", "Ceil", "Floor", "Round", "Sign"])
def test_doing_it_twice_is_doing_it_once(rewritten, op):
    assert rewritten(graph(f"a = {op}(x) b = {op}(a) y = Exp(b)"), SPEC).ops == {op: 1, "Exp": 1}


def test_abs_of_relu(rewritten):
    assert rewritten(graph("a = Relu(x) y = Abs(a)"), SPEC).ops == {"Relu": 1}
    assert rewritten(graph("a = Abs(x) y = Relu(a)"), SPEC).ops == {"Abs": 1, "Relu": 1}


@pytest.mark.parametrize("op", ["Exp", "Sigmoid", "Sqrt", "Reciprocal", "Tanh"])
def test_other_functions_stay(rewritten, op):
    assert not rewritten(graph(f"a = {op}(x) y = {op}(a)"), SPEC).edits


# Adding a Neg -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Neg(z) y = Add(x, a)", {"Sub": 1}),
        ("a = Neg(x) y = Add(a, z)", {"Sub": 1}),
        ("a = Neg(z) y = Sub(x, a)", {"Add": 1}),
        ("a = Neg(x) y = Sub(a, z)", {"Neg": 1, "Sub": 1}),
        ("a = Neg(z) b = Add(x, a) y = Mul(b, a)", {"Neg": 1, "Add": 1, "Mul": 1}),
    ],
)
def test_adding_a_neg(rewritten, body, left):
    assert rewritten(graph(body), SPEC).ops == left


# Neutral operands -------------------------------------------------------------------------------------------

FILLED = "s = Shape(x) f = ConstantOfShape <value = float[1] {{{}}}> (s)"


@pytest.mark.parametrize(
    ("number", "body", "goes"),
    [
        (0, "y = Add(a, f)", True),
        (0, "y = Add(f, a)", True),
        (0, "y = Sub(a, f)", True),
        (0, "y = Sub(f, a)", False),
        (1, "y = Mul(f, a)", True),
        (1, "y = Div(a, f)", True),
        (1, "y = Div(f, a)", False),
        (0, "y = Mul(a, f)", False),
        (1, "y = Add(a, f)", False),
    ],
)
def test_neutral_operands_of_any_size(rewritten, number, body, goes):
    found = rewritten(graph(f"a = Exp(x) {FILLED.format(number)} {body}"), f"{SPEC},remove-dead-code")
    assert (found.ops == {"Exp": 1}) == goes


def test_a_neutral_operand_that_is_stretched(rewritten):
    body = """s = Shape(x) e = Expand(one, s) u = Unsqueeze(e, zero) q = Squeeze(u, zero)
              a = Exp(x) b = Mul(a, q) y = Neg(b)"""
    found = rewritten(graph(body, constants="float[1] one = {1}, int64[1] zero = {0}"), f"{SPEC},remove-dead-code")
    assert found.ops == {"Exp": 1, "Neg": 1}


def test_a_neutral_operand_that_may_stretch_the_other_stays(rewritten):
    text = graph(
        "s = Shape(z) f = ConstantOfShape <value = float[1] {0}> (s) a = Exp(x) y = Add(a, f)",
        inputs="float[1,3] x, float[n,3] z",
    )
    assert not rewritten(text, SPEC).edits


def test_times_zero_and_minus_itself_stay(rewritten):
    body = f"a = Log(x) {FILLED.format(0)} b = Mul(a, f) c = Sub(a, a) y = Add(b, c)"
    text = graph(body)
    found = rewritten(text, SPEC)
    assert {"Mul", "Sub"} <= set(found.ops)
    feed = {"x": np.array([[0, -1, 1]], np.float32), "z": np.zeros((1, 3), np.float32)}
    verification = onnxopt.verify(onnx.parser.parse_model(text), found.model, feeds=[feed])
    assert verification.ok, verification.reason


@pytest.mark.parametrize(
    ("op", "constant", "goes"),
    [("And", 1, True), ("And", 0, False), ("Or", 0, True), ("Or", 1, False), ("Xor", 0, True), ("Xor", 1, False)],
)
def test_logic(rewritten, op, constant, goes):
    text = graph(f"p = Less(x, z) q = {op}(p, c) y = Cast <to = 1> (q)", constants=f"bool[1] c = {{{constant}}}")
    assert (op not in rewritten(text, SPEC).ops) == goes


# Constants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "op", "number"),
    [
        ("a = Mul(x, c2) y = Mul(a, c3)", "Mul", 6.0),
        ("a = Mul(c2, x) y = Div(a, c4)", "Mul", 0.5),
        ("a = Div(x, c2) y = Div(a, c4)", "Div", 8.0),
        ("a = Div(x, c4) y = Mul(c2, a)", "Mul", 0.5),
        ("a = Add(x, c2) y = Add(c3, a)", "Add", 5.0),
        ("a = Sub(x, c2) y = Sub(a, c3)", "Sub", 5.0),
        ("a = Add(x, c2) y = Sub(a, c8)", "Add", -6.0),
        ("a = Sub(x, c8) y = Add(a, c2)", "Add", -6.0),
    ],
)
def test_two_constants_become_one(rewritten, body, op, number):
    constants = ", ".join(f"float c{k} = {{{k}}}" for k in (2, 3, 4, 8))
    found = rewritten(graph(body, constants=constants), SPEC)
    assert [n.op_type for n in found.nodes] == [op]
    assert found.nodes[0].inputs[1].const_value.numpy() == np.float32(number)


def test_integers_wrap_around(rewritten):
    text = graph(
        "a = Add(x, c) b = Add(a, c) p = Mul(b, d) y = Mul(p, d)",
        inputs="int32[n,3] x",
        outputs="int32[a,b] y",
        constants="int32 c = {2000000000}, int32 d = {100000}",
    )
    assert rewritten(text, SPEC).ops == {"Add": 1, "Mul": 1}


def test_integer_divisions_stay(rewritten):
    text = graph(
        "a = Mul(x, c) y = Div(a, d)",
        inputs="int64[n,3] x",
        outputs="int64[a,b] y",
        constants="int64 c = {3}, int64 d = {2}",
    )
    assert not rewritten(text, SPEC).edits


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        (
            "a = Add(x, c) y = Sub(a, c)",
            "float c = {8388608}",
            "the two constants nearly cancel, and what that rounds away may be meant to go",
        ),
        (
            "a = Mul(x, c) y = Mul(a, d)",
            "float c = {1e30}, float d = {1e-30}",
            "a factor is so large or small that the product might leave the range of its type",
        ),
        (
            "a = Mul(x, c) y = Div(a, d)",
            "float c = {0.001}, float d = {5000}",
            "a factor is so large or small that the product might leave the range of its type",
        ),
    ],
)
def test_constants_that_are_not_merged(rewritten, body, constants, reason):
    found = rewritten(graph(body, constants=constants), SPEC)
    assert len(found.nodes) == 2
    assert found.refusals == {reason}


def test_constants_are_not_merged_into_something_bigger(rewritten):
    text = graph(
        "a = Mul(x, c) y = Mul(a, d)",
        inputs="float[100,100] x",
        constants=f"float[100,1] c = {{{','.join(['2'] * 100)}}}, float[100] d = {{{','.join(['3'] * 100)}}}",
    )
    found = rewritten(text, SPEC)
    assert found.ops == {"Mul": 2}
    assert found.refusals == {"the two constants together would take more room than each"}


def test_a_subtraction_from_a_constant_and_other_uses_stay(rewritten):
    constants = "float c = {2}, float d = {3}"
    assert not rewritten(graph("a = Sub(c, x) y = Add(a, d)", constants=constants), SPEC).edits
    assert not rewritten(graph("a = Add(x, c) y = Sub(d, a)", constants=constants), SPEC).edits
    text = graph("a = Mul(x, c) y = Mul(a, d)", outputs="float[i,j] a, float[k,l] y", constants=constants)
    assert not rewritten(text, SPEC).edits


# Where ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("truth", "kept"), [(1, "Exp"), (0, "Neg")])
def test_a_known_condition(rewritten, truth, kept):
    text = graph("a = Exp(x) b = Neg(x) y = Where(c, a, b)", constants=f"bool[1,3] c = {{{truth}, {truth}, {truth}}}")
    assert rewritten(text, f"{SPEC},remove-dead-code").ops == {kept: 1}


def test_a_condition_filled_in_when_the_model_runs(rewritten):
    body = """s = Shape(x) t = ConstantOfShape <value = bool[1] {1}> (s) a = Exp(x) b = Neg(x) y = Where(t, a, b)"""
    assert rewritten(graph(body), f"{SPEC},remove-dead-code").ops == {"Exp": 1}


def test_two_equal_sides(rewritten):
    assert rewritten(graph("c = Less(x, z) a = Exp(x) y = Where(c, a, a)"), f"{SPEC},remove-dead-code").ops == {
        "Exp": 1
    }


def test_a_side_of_another_shape_stays(rewritten):
    text = graph("a = Exp(x) y = Where(c, a, z)", inputs="float[1,3] x, float[n,3] z", constants="bool c = {1}")
    found = rewritten(text, SPEC)
    assert found.ops == {"Exp": 1, "Where": 1}
    assert found.refusals == {"the side that is always taken may have another shape"}


def test_an_inverted_condition(rewritten):
    text = graph("c = Less(x, z) d = Not(c) y = Where(d, x, z)")
    found = rewritten(text, SPEC)
    assert found.ops == {"Less": 1, "Where": 1}
    assert [v.name for v in found.nodes[1].inputs[1:]] == ["z", "x"]


# Expand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"])
def test_an_expand_that_is_broadcast_anyway(rewritten, op):
    text = graph(f"s = Shape(z) e = Expand(x, s) y = {op}(z, e)", inputs="float[1,3] x, float[n,3] z")
    found = rewritten(text, f"{SPEC},remove-dead-code")
    assert found.ops == {op: 1}
    assert [v.name for v in found.nodes[0].inputs] == ["z", "x"]


def test_an_expand_of_a_condition(rewritten):
    text = graph("s = Shape(z) e = Expand(c, s) y = Where(e, z, w)", inputs="bool[1,3] c, float[n,3] z, float[n,3] w")
    assert rewritten(text, f"{SPEC},remove-dead-code").ops == {"Where": 1}


@pytest.mark.parametrize(
    ("inputs", "target"),
    [
        ("float[1,3] x, float[1,3] z", "two"),
        ("float[3] x, float[3] z", "two"),
        ("float[1,3] x, float[n,3] z", "two"),
        ("float[1,3] x, float[3] z", "two"),
    ],
    ids=["nothing else stretches", "adds an axis", "another size", "others have fewer axes"],
)
def test_an_expand_that_matters_stays(rewritten, inputs, target):
    text = graph(f"e = Expand(x, {target}) y = Add(e, z)", inputs=inputs, constants="int64[2] two = {2, 3}")
    assert not rewritten(text, SPEC, verify=False).edits


def test_two_expands_of_the_same(rewritten):
    text = graph("e = Expand(x, two) y = Add(e, e)", inputs="float[1,3] x", constants="int64[2] two = {2, 3}")
    assert rewritten(text, SPEC).ops == {"Expand": 1, "Add": 1}
