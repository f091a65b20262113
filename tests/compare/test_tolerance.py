"""Tolerances follow from types and depth."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest

from onnxopt.compare.tolerance import ITERATIONS, SAFETY, TERMS, Rounding, roundings

HALF, SINGLE, DOUBLE = 2.0**-10, 2.0**-23, 2.0**-52


def of(body: str, inputs: str = "float[2] x", outputs: str = "float[2] y", functions: str = "") -> Rounding:
    domain = ', "my" : 1' if functions else ""
    text = f'<ir_version: 8, opset_import: ["" : 17{domain}]> g ({inputs}) => ({outputs}) {{ {body} }} {functions}'
    return roundings(ir.from_onnx_text(text))["y"]


def test_depth_is_the_longest_path() -> None:
    assert of("a = Relu(x) b = Relu(a) c = Neg(x) y = Add(b, c)") == Rounding(depth=3, epsilon=SINGLE)


def test_the_formula() -> None:
    single = Rounding(depth=100, epsilon=SINGLE)
    assert single.tolerance == pytest.approx(SAFETY * 10 * (SINGLE / 2 + math.sqrt(TERMS) / 2 * SINGLE))
    half = Rounding(depth=4, epsilon=HALF)
    assert half.tolerance == pytest.approx(SAFETY * 2 * (HALF / 2 + math.sqrt(TERMS) / 2 * SINGLE))
    double = Rounding(depth=1, epsilon=DOUBLE)
    assert double.tolerance == pytest.approx(SAFETY * (DOUBLE / 2 + math.sqrt(TERMS) / 2 * DOUBLE))


def test_deeper_and_coarser_allow_more() -> None:
    assert Rounding(100, SINGLE).tolerance == pytest.approx(10 * Rounding(1, SINGLE).tolerance)
    assert Rounding(10, DOUBLE).tolerance < Rounding(10, SINGLE).tolerance < Rounding(10, HALF).tolerance


def test_the_coarsest_type_on_the_way_counts() -> None:
    assert of("h = Cast <to = 10> (x) a = Exp(h) y = Cast <to = 1> (a)").epsilon == HALF
    assert of("a = Exp(x) y = Cast <to = 11> (a)", outputs="double[2] y").epsilon == SINGLE


def test_weights_that_are_only_stored_in_half_precision_do_not_count() -> None:
    stored = """w = Constant <value = float16[2] {1, 2}> () t = Identity(w) f = Cast <to = 1> (t) y = Mul(x, f)"""
    assert of(stored).epsilon == SINGLE
    table = """w = Constant <value = float16[2] {1, 2}> () r = Gather(w, i) f = Cast <to = 1> (r) y = Exp(f)"""
    assert of(table, inputs="int64[2] i").epsilon == SINGLE


def test_types_without_declarations_follow_the_inputs() -> None:
    assert of("a = Exp(x) b = Neg(a) y = Cast <to = 1> (b)", inputs="float16[2] x").epsilon == HALF


def test_integers_round_nothing_but_have_a_tolerance() -> None:
    found = of("y = Neg(x)", inputs="int64[2] x", outputs="int64[2] y")
    assert found.epsilon == 0.0
    assert found.tolerance > 0.0


def test_bodies_and_functions_count() -> None:
    branches = """y = If <then_branch = t () => (float[2] p) { a = Relu(x) b = Relu(a) p = Relu(b) },
                           else_branch = e () => (float[2] q) { q = Neg(x) }> (c)"""
    assert of(branches, inputs="float[2] x, bool c").depth == 3
    function = """<domain: "my", opset_import: ["" : 17]> F (a) => (b) { c = Exp(a) b = Log(c) }"""
    assert of("z = my.F(x) y = my.F(z)", functions=function).depth == 4


def test_recurrences_count_as_many_nodes() -> None:
    found = of(
        "y, h = RNN <hidden_size = 4> (x, w, r)",
        inputs="float[3,1,2] x, float[1,4,2] w, float[1,4,4] r",
        outputs="float[3,1,1,4] y",
    )
    assert found.depth == ITERATIONS


@pytest.mark.parametrize(
    ("body", "random"),
    [
        ("n = RandomNormalLike(x) y = Add(x, n)", True),
        ("n = RandomNormalLike(x) s = Shape(n) y = Reshape(x, s)", False),
        ("y = Add(x, x)", False),
        ("k = Constant <value = float {0.5}> () t = Constant <value = bool {1}> () y = Dropout(x, k, t)", True),
        ("y = Dropout(x)", False),
    ],
)
def test_random_operators_are_followed_to_the_outputs(body: str, random: bool) -> None:
    assert of(body).random is random
