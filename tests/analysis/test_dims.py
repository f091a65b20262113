"""Symbolic dimensions: canonical forms, and that nothing is claimed that some sizes refute."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim, Expr, symbol

B, S, H = symbol("b"), symbol("s"), symbol("h")


def sizes(**values: int) -> dict[tuple[str, bool], int]:
    return {(name, False): value for name, value in values.items()}


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (B * S * 768, "768*b*s"),
        (S + B - 1, "b + s - 1"),
        (B - B, "0"),
        ((B * S * 768) // (B * 12), "64*s"),
        ((H + 2 - 3) // 2 + 1, "floor((h + 1)/2)"),
        (((H - 1) // 2 + 2) // 2, "floor((h + 3)/4)"),
        (dims.ceildiv(H, 8) * 8, "8*floor((h + 7)/8)"),
        (H + (8 - H % 8) % 8, "8*floor((h + 7)/8)"),
        ((2 * B * S + 4 * B) // (S + 2), "2*b"),
        ((6 * H + 5) // 15, "floor((2*h + 1)/5)"),
        ((6 * H + 5) // 9, "h - floor((h + 1)/3)"),
        (7 // S, "floor(7/s)"),
        (H // (2 * S), "floor(h/(2*s))"),
        (dims.maximum(H - 1, 0), "max(h - 1, 0)"),
        (dims.minimum(H, S) + dims.maximum(H, S), "h + s"),
        (dims.maximum(2 * B * H, 4 * B), "2*b*max(h - 2, 0) + 4*b"),
        (dims.minimum(H // 2, H), "floor(h/2)"),
        (dims.product([B, 3, S]), "3*b*s"),
        (symbol("x", opaque=True) + 1, "?x + 1"),
    ],
)
def test_canonical_form(expression: Dim, text: str) -> None:
    assert str(expression) == text


def test_numbers_stay_numbers() -> None:
    assert isinstance(B - B + 3, int)
    assert dims.known_int(B * 0 + 4) == 4
    assert dims.known_int(B) is None
    assert dims.known_int(None) is None
    assert dims.floordiv(-7, 2) == -4
    assert dims.floordiv(7, -2) == -4
    assert dims.ceildiv(7, 2) == 4
    assert dims.mod(-7, 4) == 1
    assert -(B - 3) == 3 - B
    assert dims.mod(5, B) == 5 - B * dims.floordiv(5, B)


def test_division_by_zero_is_an_error() -> None:
    divisions: tuple[Callable[[Dim, Dim], Dim], ...] = (dims.floordiv, dims.ceildiv, dims.mod)
    for divide in divisions:
        with pytest.raises(ZeroDivisionError):
            divide(B, 0)
    assert dims.exact_div(B, 0) is None


def test_exact_division() -> None:
    assert dims.exact_div(B * B - S * S, B + S) == B - S
    assert dims.exact_div(12 * B, 4) == 3 * B
    assert dims.exact_div(B + 1, 2) is None
    assert dims.exact_div(7, 2) is None
    assert dims.exact_div(B, S) is None


def test_equal_is_hashable_and_order_does_not_matter() -> None:
    assert B * S + H == H + S * B
    assert len({B + S, S + B, B}) == 2
    assert 2 * (B + S) == 2 * B + 2 * S
    assert B != S


def test_named_and_opaque_symbols_differ() -> None:
    assert symbol("x") != symbol("x", opaque=True)
    assert symbol("floordiv($b,2)") != B // 2
    assert dims.is_opaque(B + symbol("x", opaque=True) // 2)
    assert not dims.is_opaque(B // 2)
    assert dims.symbol_name(B) == "b"
    assert dims.symbol_name(B + 1) is None
    assert dims.symbol_name(2 * B) is None
    assert dims.symbol_name(symbol("x", opaque=True)) is None
    assert set(dims.symbols((B + S) // 2 * H)) == {("b", False), ("s", False), ("h", False)}


def test_broadcast() -> None:
    assert dims.broadcast(B, 1) == B
    assert dims.broadcast(B, 4) == 4
    assert dims.broadcast(B, 0) == 0
    assert dims.broadcast(B, B) == B
    assert dims.broadcast(1, 1) == 1
    assert dims.broadcast() == 1
    assert dims.broadcast(2, 3) is None
    assert dims.broadcast(B, S + 2) == S + 2
    both = dims.broadcast(B, S)
    assert both == dims.broadcast(S, B)
    assert both not in (B, S)
    assert both is not None
    assert dims.broadcast(both, B) == both
    for b, s, result in ((1, 5, 5), (5, 1, 5), (1, 0, 0), (4, 4, 4), (1, 1, 1)):
        assert dims.evaluate(both, sizes(b=b, s=s)) == result


def test_broadcasting_with_a_clamped_size() -> None:
    """Positions cut out of a table of 512 rows fit a sequence only when it is no longer than the table."""
    assert dims.broadcast(dims.minimum(S, 512), S) == S
    assert dims.broadcast(S, dims.minimum(S, 512), B) == dims.broadcast(S, B)
    assert dims.broadcast(dims.minimum(S, B), S) != S, "a clamp to 0 or 1 would fit anything"


def test_nothing_is_positive_without_a_reason() -> None:
    assert dims.provably_nonneg(B)
    assert not dims.provably_positive(B), "a batch may be empty"
    assert dims.provably_positive(B + 1)
    assert not dims.provably_nonneg(B - 1)
    assert not dims.provably_nonneg(B - S)
    assert dims.provably_different(B, -1)
    assert not dims.provably_different(B, 1)


@pytest.mark.parametrize(
    "expression",
    [
        H - H // 2,
        H - 3 * (H // 3),
        (H + 1) // 2 - H // 2,
        H - dims.minimum(3, H),
        dims.minimum(3, H),
        dims.maximum(H - S, 0),
        dims.maximum(B, S) - S,
        8 * dims.ceildiv(H, 8) - H,
        B * H - B * (H // 2),
        (H - S) + dims.maximum(S - H, 0),
    ],
)
def test_proofs_of_not_negative(expression: Dim) -> None:
    assert dims.provably_nonneg(expression)


def test_large_products_are_kept_as_they_are() -> None:
    left = sum((symbol(f"a{i}") for i in range(20)), start=0)
    right = sum((symbol(f"b{i}") for i in range(20)), start=0)
    once = left * right
    assert once == right * left
    values = sizes(**{f"{c}{i}": i for c in "ab" for i in range(20)})
    assert dims.evaluate(once, values) == 190 * 190


def test_evaluate_needs_every_size() -> None:
    with pytest.raises(KeyError):
        dims.evaluate(B + S, sizes(b=1))


def test_size_grows_with_the_expression() -> None:
    assert dims.size(5) == 1
    assert dims.size(B) < dims.size(B + S) < dims.size((B + S) // 3)
    assert dims.size(B * 2**1000) > 10


# Random expressions, each together with the plain Python function it stands for.

NAMES = "xyz"
POINTS = [dict(zip(NAMES, point, strict=True)) for point in itertools.product((0, 1, 2, 3, 7), repeat=3)]


PYTHON: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "max": max,
    "min": min,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
SYMBOLIC: dict[str, Callable[[Dim, Dim], Dim]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": dims.maximum,
    "min": dims.minimum,
    "floordiv": dims.floordiv,
    "mod": dims.mod,
}


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[Dim, list[int | None]]:
    """Draw a dim, and what it is at each of `POINTS` (None where a division by 0 makes it nothing)."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        if draw(st.booleans()):
            number = draw(st.integers(-6, 6))
            return number, [number] * len(POINTS)
        name = draw(st.sampled_from(NAMES))
        return symbol(name), [point[name] for point in POINTS]
    a, left = draw(expressions(depth=depth - 1))
    b, right = draw(expressions(depth=depth - 1))
    name = draw(st.sampled_from(sorted(PYTHON)))
    pairs = [(x, y) for x, y in zip(left, right, strict=True)]
    if name in ("floordiv", "mod") and b == 0:
        return a, left
    if name in ("floordiv", "mod"):
        pairs = [(x, y or None) for x, y in pairs]
    python: Callable[[int, int], int] = PYTHON[name]
    return SYMBOLIC[name](a, b), [None if x is None or y is None else python(x, y) for x, y in pairs]


def values_of(dim: Dim) -> list[int | None]:
    found: list[int | None] = []
    for point in POINTS:
        try:
            found.append(dims.evaluate(dim, sizes(**point)))
        except ZeroDivisionError:
            found.append(None)
    return found


@settings(max_examples=400, deadline=None)
@given(expressions())
def test_expressions_mean_what_python_computes(drawn: tuple[Dim, list[int | None]]) -> None:
    dim, expected = drawn
    for found, wanted in zip(values_of(dim), expected, strict=True):
        assert wanted is None or found is None or found == wanted
    if dims.provably_nonneg(dim):
        assert all(v is None or v >= 0 for v in expected)
    if dims.provably_positive(dim):
        assert all(v is None or v > 0 for v in expected)


@settings(max_examples=200, deadline=None)
@given(expressions(), expressions())
def test_claims_about_pairs_hold(first: tuple[Dim, list[int | None]], second: tuple[Dim, list[int | None]]) -> None:
    (a, left), (b, right) = first, second
    pairs = [(x, y) for x, y in zip(left, right, strict=True) if x is not None and y is not None]
    if a == b:
        assert all(x == y for x, y in pairs)
    if dims.provably_different(a, b):
        assert all(x != y for x, y in pairs)
    quotient = dims.exact_div(a, b)
    if quotient is not None:
        for found, (x, y) in zip(values_of(quotient), zip(left, right, strict=True), strict=True):
            assert found is None or x is None or not y or found * y == x


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
def test_linear_divisions_have_one_form(steps: list[tuple[int, int]]) -> None:
    """A chain of strided layers is one division, however it is written."""
    chained: Dim = H
    total, offset = 1, 0
    for stride, shift in steps:
        chained = (chained + shift) // stride
        offset += shift * total
        total *= stride
    assert chained == (H + offset) // total


def test_expressions_cannot_be_confused_with_numbers() -> None:
    assert 1 not in (B, B + 1)
    assert isinstance(B, Expr)
    assert repr(B + 1) == "Expr(b + 1)"
