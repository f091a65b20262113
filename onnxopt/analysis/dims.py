"""Symbolic dimensions: whole numbers that may depend on sizes known only when the model runs.

A `Dim` is an `int` or an `Expr`. An expression is a polynomial with integer coefficients in canonical form, so
that two expressions that compare equal are equal for every input. Its atoms are symbols, which stand for sizes and
are therefore at least 0 (zero-size axes exist), and four operations kept as they are: floor division, the positive
part max(x, 0), the result of broadcasting, and products too large to multiply out. Ceiling division, remainder,
minimum and maximum are written in terms of these.

Results hold for models that run: where a model divides by a size or broadcasts two sizes, the divisor is taken to
be other than 0 and the sizes to fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

_Kind = Literal["symbol", "floordiv", "positive", "broadcast", "product"]

_MAX_TERMS = 64
"""Products with more terms than this are not multiplied out."""
_PROOF_DEPTH = 6
"""How many operations a proof that an expression is not negative may take apart."""


class _Atom:
    """A symbol, or an operation on dims that the polynomial form cannot hold."""

    __slots__ = ("_hash", "args", "key", "kind", "name", "nonneg", "opaque", "size")

    def __init__(self, kind: _Kind, args: tuple[Dim, ...] = (), name: str = "", opaque: bool = False) -> None:
        self.kind: _Kind = kind
        self.args = args
        self.name = name
        self.opaque = opaque or any(is_opaque(a) for a in args)
        # The key orders atoms and tells them apart; symbols of the model and opaque ones never share one.
        self.key = f"{'?' if opaque else '$'}{name}" if kind == "symbol" else f"{kind}({','.join(map(_key, args))})"
        self.size = 1 + sum(size(a) for a in args)
        self._hash = hash(self.key)
        self.nonneg = kind in ("symbol", "positive", "broadcast") or all(provably_nonneg(a) for a in args)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Atom) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        if self.kind == "symbol":
            return f"?{self.name}" if self.opaque else self.name
        if self.kind == "floordiv":
            above, below = self.args
            return f"floor({_grouped(above, products=True)}/{_grouped(below, products=False)})"
        if self.kind == "positive":
            return f"max({self.args[0]}, 0)"
        if self.kind == "product":
            return "*".join(f"({a})" for a in self.args)
        return f"broadcast({', '.join(map(str, self.args))})"


_Monomial: TypeAlias = tuple[_Atom, ...]
_Terms: TypeAlias = dict[_Monomial, int]


class Expr:
    """A dimension that is not one fixed number. Immutable; equal means provably equal.

    Supports `+`, `-`, `*`, `//` and `%` with other dims. `//` rounds towards minus infinity.
    """

    __slots__ = ("_hash", "_terms")

    def __init__(self, terms: tuple[tuple[_Monomial, int], ...]) -> None:
        """Take the canonical terms; use `symbol` and the operators instead."""
        self._terms = terms
        self._hash = hash(terms)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expr) and self._hash == other._hash and self._terms == other._terms)

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Dim) -> Dim:
        return _sum(self, other, 1)

    def __radd__(self, other: int) -> Dim:
        return _sum(self, other, 1)

    def __sub__(self, other: Dim) -> Dim:
        return _sum(self, other, -1)

    def __rsub__(self, other: int) -> Dim:
        return _sum(_scaled(self, -1), other, 1)

    def __neg__(self) -> Dim:
        return _scaled(self, -1)

    def __mul__(self, other: Dim) -> Dim:
        return _scaled(self, other) if isinstance(other, int) else _multiply(self, other)

    def __rmul__(self, other: int) -> Dim:
        return _scaled(self, other)

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: int) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __rmod__(self, other: int) -> Dim:
        return mod(other, self)

    def __str__(self) -> str:
        parts: list[str] = []
        for monomial, coefficient in self._terms:
            names = "*".join(str(atom) for atom in monomial)
            number = abs(coefficient)
            text = names if number == 1 and names else f"{number}*{names}" if names else str(number)
            sign = "-" if coefficient < 0 else "+" if parts else ""
            parts.append(f" {sign} {text}" if parts else f"{sign}{text}")
        return "".join(parts)

    def __repr__(self) -> str:
        return f"Expr({self})"


Dim: TypeAlias = int | Expr


def symbol(name: str, *, opaque: bool = False) -> Expr:
    """Return the dimension with this name.

    Args:
        name: The same name is the same size everywhere.
        opaque: For a size that has no name in the model. Opaque and named symbols never equal each other.
    """
    return Expr((((_Atom("symbol", name=name, opaque=opaque),), 1),))


def floordiv(a: Dim, b: Dim) -> Dim:
    """Return a / b rounded towards minus infinity.

    Raises:
        ZeroDivisionError: If b is the number 0.
    """
    if isinstance(b, int):
        if isinstance(a, int) or b == 1:
            return a // b if isinstance(a, int) else a
        if b == 0:
            raise ZeroDivisionError(f"{a} divided by 0")
        return _floordiv_number(a, b) if b > 0 else _floordiv_number(_scaled(a, -1), -b)
    if a == 0:
        return 0
    quotient, rest = _divide(a, b)
    if rest == 0:
        return quotient
    a, b = _cancel(rest, b)
    if isinstance(b, int):
        return quotient + floordiv(a, b)
    if provably_nonneg(a) and provably_positive(b - a):
        return quotient
    return quotient + _atom("floordiv", (a, b))


def ceildiv(a: Dim, b: Dim) -> Dim:
    """Return a / b rounded towards infinity.

    Raises:
        ZeroDivisionError: If b is the number 0.
    """
    return -floordiv(-a, b)


def mod(a: Dim, b: Dim) -> Dim:
    """Return the remainder of `floordiv`, which has the sign of b.

    Raises:
        ZeroDivisionError: If b is the number 0.
    """
    return a % b if isinstance(a, int) and isinstance(b, int) else a - b * floordiv(a, b)


def exact_div(a: Dim, b: Dim) -> Dim | None:
    """Return a / b where it provably leaves no remainder (b being other than 0), else None."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    quotient, rest = _divide(a, b)
    return quotient if rest == 0 else None


def positive_part(a: Dim) -> Dim:
    """Return max(a, 0)."""
    if isinstance(a, int):
        return max(a, 0)
    if provably_nonneg(a):
        return a
    if provably_nonneg(-a):
        return 0
    number, common = _common_factor(a._terms)
    if number > 1 or common:
        inner = _canonical({_without(m, common): c // number for m, c in a._terms})
        return positive_part(inner) * _canonical({common: number})
    if _leading(a) < 0:
        return a + _atom("positive", (_scaled(a, -1),))
    return _atom("positive", (a,))


def maximum(a: Dim, b: Dim) -> Dim:
    """Return the larger of the two."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else b + positive_part(a - b)


def minimum(a: Dim, b: Dim) -> Dim:
    """Return the smaller of the two."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else a - positive_part(a - b)


def broadcast(*dims: Dim) -> Dim | None:
    """Return the size of an axis that operands with these sizes broadcast to, or None if they cannot.

    A size other than 1 wins over one that is not known to be 1: the model would not run if they did not fit.
    """
    distinct: dict[Dim, None] = {}
    for dim in dims:
        for part in _broadcast_parts(dim):
            if part != 1:
                distinct[part] = None
    if len(distinct) <= 1:
        return next(iter(distinct), 1)
    numbers = [d for d in distinct if isinstance(d, int)]
    if numbers:
        return numbers[0] if len(numbers) == 1 else None
    for dim in distinct:
        if provably_nonneg(dim - 2):
            return dim
    distinct = {d: None for d in distinct if not any(_clamps(d, other) for other in distinct if other is not d)}
    if len(distinct) == 1:
        return next(iter(distinct))
    return _atom("broadcast", tuple(sorted(distinct, key=_key)))


def _clamps(small: Dim, large: Dim) -> bool:
    """Whether `small` is min(large, k) for a number k of at least 1, so that both fit only if `large` wins."""
    gap = large - small
    if isinstance(gap, int) or len(gap._terms) != 1:
        return False
    monomial, coefficient = gap._terms[0]
    if coefficient != 1 or len(monomial) != 1 or monomial[0].kind != "positive":
        return False
    k = large - monomial[0].args[0]
    return isinstance(k, int) and k >= 1


def product(dims: Iterable[Dim]) -> Dim:
    """Return the product of the dims, 1 for none."""
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def known_int(dim: Dim | None) -> int | None:
    """Return the dimension if it is one fixed number, else None."""
    return dim if isinstance(dim, int) else None


def provably_different(a: Dim, b: Dim) -> bool:
    """Whether they are never the same number."""
    difference = a - b
    return provably_positive(difference) or provably_positive(-difference)


def provably_positive(dim: Dim) -> bool:
    """Whether the dimension is at least 1 in every run."""
    return dim > 0 if isinstance(dim, int) else provably_nonneg(dim - 1)


def provably_nonneg(dim: Dim) -> bool:
    """Whether the dimension is at least 0 in every run."""
    return dim >= 0 if isinstance(dim, int) else _nonneg(dim, _PROOF_DEPTH)


def size(dim: Dim) -> int:
    """Return how large the expression is: symbols, operations, terms, 64-bit words of coefficients."""
    if isinstance(dim, int):
        return 1
    return sum(1 + (c.bit_length() >> 6) + sum(atom.size for atom in m) for m, c in dim._terms)


def is_opaque(dim: Dim) -> bool:
    """Whether the dimension depends on a size that has no name in the model."""
    return not isinstance(dim, int) and any(atom.opaque for monomial, _ in dim._terms for atom in monomial)


def symbols(dim: Dim) -> Iterator[tuple[str, bool]]:
    """Yield (name, opaque) of each symbol in the expression, possibly more than once."""
    if isinstance(dim, Expr):
        for monomial, _ in dim._terms:
            for atom in monomial:
                if atom.kind == "symbol":
                    yield atom.name, atom.opaque
                for argument in atom.args:
                    yield from symbols(argument)


def symbol_name(dim: Dim) -> str | None:
    """Return the name if the dimension is nothing but one symbol of the model."""
    if isinstance(dim, Expr) and len(dim._terms) == 1:
        monomial, coefficient = dim._terms[0]
        if coefficient == 1 and len(monomial) == 1 and monomial[0].kind == "symbol" and not monomial[0].opaque:
            return monomial[0].name
    return None


def evaluate(dim: Dim, sizes: Mapping[tuple[str, bool], int]) -> int:
    """Return the number the dimension is for these sizes, keyed by (name, opaque).

    Raises:
        KeyError: If a symbol has no size.
        ZeroDivisionError: If the expression divides by a size that is 0.
    """
    if isinstance(dim, int):
        return dim
    return sum(c * math.prod(_evaluate_atom(atom, sizes) for atom in m) for m, c in dim._terms)


def _evaluate_atom(atom: _Atom, sizes: Mapping[tuple[str, bool], int]) -> int:
    if atom.kind == "symbol":
        return sizes[atom.name, atom.opaque]
    values = [evaluate(a, sizes) for a in atom.args]
    if atom.kind == "floordiv":
        return values[0] // values[1]
    if atom.kind == "positive":
        return max(values[0], 0)
    if atom.kind == "product":
        return math.prod(values)
    return next((v for v in values if v != 1), 1)


# Canonical form ----------------------------------------------------------------------------------------


def _key(dim: Dim) -> str:
    if isinstance(dim, int):
        return str(dim)
    return "+".join(f"{c}*{'*'.join(a.key for a in m)}" for m, c in dim._terms)


def _grouped(dim: Dim, *, products: bool) -> str:
    """Return the text of a dim, in brackets unless it is one name or, where allowed, a product."""
    plain = isinstance(dim, int) or (len(dim._terms) == 1 and (products or _is_name(dim._terms[0])))
    return str(dim) if plain else f"({dim})"


def _is_name(term: tuple[_Monomial, int]) -> bool:
    return term[1] == 1 and len(term[0]) == 1


def _atom(kind: _Kind, args: tuple[Dim, ...]) -> Expr:
    return Expr((((_Atom(kind, args),), 1),))


def _order(term: tuple[_Monomial, int]) -> tuple[int, list[str]]:
    # Graded lexicographic, highest degree first: compatible with multiplication, as long division needs.
    return -len(term[0]), [atom.key for atom in term[0]]


def _canonical(terms: _Terms) -> Dim:
    items = [item for item in terms.items() if item[1]]
    if not items:
        return 0
    if len(items) == 1:
        if not items[0][0]:
            return items[0][1]
    else:
        items.sort(key=_order)
    return Expr(tuple(items))


def _terms_of(dim: Dim) -> tuple[tuple[_Monomial, int], ...]:
    return (((), dim),) if isinstance(dim, int) else dim._terms


def _sum(a: Dim, b: Dim, factor: int) -> Dim:
    """Return a + factor * b."""
    if b == 0:
        return a
    terms = dict(_terms_of(a))
    for monomial, coefficient in _terms_of(b):
        terms[monomial] = terms.get(monomial, 0) + factor * coefficient
    return _canonical(terms)


def _scaled(a: Dim, factor: int) -> Dim:
    if isinstance(a, int):
        return a * factor
    if factor == 0:
        return 0
    return a if factor == 1 else Expr(tuple((m, c * factor) for m, c in a._terms))


def _multiply(a: Expr, b: Expr) -> Dim:
    if len(a._terms) * len(b._terms) > _MAX_TERMS:
        return _atom("product", tuple(sorted((a, b), key=_key)))
    terms: _Terms = {}
    for left, x in a._terms:
        for right, y in b._terms:
            monomial = _merged(left, right)
            terms[monomial] = terms.get(monomial, 0) + x * y
    return _canonical(terms)


def _merged(left: _Monomial, right: _Monomial) -> _Monomial:
    if not left or not right:
        return left or right
    return tuple(sorted(left + right, key=_atom_key))


def _atom_key(atom: _Atom) -> str:
    return atom.key


def _without(monomial: _Monomial, factor: _Monomial) -> _Monomial:
    """Return monomial / factor, which must divide it."""
    rest = list(monomial)
    for atom in factor:
        rest.remove(atom)
    return tuple(rest)


def _divides(factor: _Monomial, monomial: _Monomial) -> bool:
    rest = list(monomial)
    for atom in factor:
        if atom not in rest:
            return False
        rest.remove(atom)
    return True


def _leading(a: Expr) -> int:
    """Return the first coefficient that does not belong to the constant term."""
    return a._terms[0][1]


def _common_factor(*groups: tuple[tuple[_Monomial, int], ...]) -> tuple[int, _Monomial]:
    """Return the greatest number and monomial that divide every term."""
    terms = [term for group in groups for term in group]
    number = math.gcd(*(c for _, c in terms))
    common = list(terms[0][0])
    for monomial, _ in terms[1:]:
        rest = list(monomial)
        kept = []
        for atom in common:
            if atom in rest:
                rest.remove(atom)
                kept.append(atom)
        common = kept
    # Only factors that are never negative may move out of max(x, 0) and change no sign of a divisor.
    return number, tuple(atom for atom in common if atom.nonneg)


# Division ----------------------------------------------------------------------------------------------


def _floordiv_number(a: Dim, k: int) -> Dim:
    """Return floor(a / k) for a number k > 0: whole multiples leave, nested divisions join, signs are settled."""
    quotient: Dim = 0
    while True:
        if isinstance(a, int):
            return quotient + a // k
        whole, a = _split_multiples(a, k)
        quotient = quotient + whole
        if isinstance(a, int):
            return quotient + a // k
        common = math.gcd(k, *(c for m, c in a._terms if m))
        if common > 1:  # floor((g*x + c) / (g*k)) = floor((x + floor(c/g)) / k), where x holds whole numbers
            a, k = _canonical({m: c // common for m, c in a._terms}), k // common
            continue
        nested = _nested_division(a, k)
        if nested is None:
            break
        a, k = nested
    if _leading(a) < 0:  # floor(x / k) = -ceil(-x / k) = -floor((-x + k - 1) / k)
        return quotient - _floordiv_number(_scaled(a, -1) + (k - 1), k)
    if provably_nonneg(a) and provably_nonneg(k - 1 - a):
        return quotient
    return quotient + _atom("floordiv", (a, k))


def _split_multiples(a: Dim, k: int) -> tuple[Dim, Dim]:
    """Return (q, r) with a = k*q + r, the constant of r in [0, k), its other coefficients in (-k/2, k/2]."""
    whole: _Terms = {}
    rest: _Terms = {}
    for monomial, coefficient in _terms_of(a):
        remainder = coefficient % k
        if monomial and 2 * remainder > k:
            remainder -= k
        rest[monomial] = remainder
        whole[monomial] = (coefficient - remainder) // k
    return _canonical(whole), _canonical(rest)


def _nested_division(a: Expr, k: int) -> tuple[Dim, int] | None:
    """Return (x, k') with floor(a / k) = floor(x / k') when a is one floor division plus a number."""
    monomial, coefficient = a._terms[0]
    if coefficient != 1 or len(monomial) != 1 or len(a._terms) > 2 or (len(a._terms) == 2 and a._terms[1][0]):
        return None
    atom = monomial[0]
    if atom.kind != "floordiv" or not isinstance(atom.args[1], int):
        return None
    number = a._terms[1][1] if len(a._terms) == 2 else 0
    inner = atom.args[1]
    return atom.args[0] + number * inner, k * inner


def _divide(a: Dim, b: Dim) -> tuple[Dim, Dim]:
    """Return (q, r) with a = b*q + r by long division; r is 0 where b divides a."""
    if isinstance(b, int):
        return _split_multiples(a, b) if b > 0 else (0, a)
    head, factor = b._terms[0]
    quotient: Dim = 0
    rest: Dim = 0
    for _ in range(_MAX_TERMS):
        if isinstance(a, int):
            return quotient, rest + a
        monomial, coefficient = a._terms[0]
        if coefficient % factor == 0 and _divides(head, monomial):
            step = _canonical({_without(monomial, head): coefficient // factor})
            quotient, a = quotient + step, a - step * b
        else:
            term = _canonical({monomial: coefficient})
            rest, a = rest + term, a - term
    return quotient, rest + a


def _cancel(a: Dim, b: Expr) -> tuple[Dim, Dim]:
    """Take common factors out of a fraction."""
    number, common = _common_factor(_terms_of(a), b._terms)
    if number == 1 and not common:
        return a, b
    return (
        _canonical({_without(m, common): c // number for m, c in _terms_of(a)}),
        _canonical({_without(m, common): c // number for m, c in b._terms}),
    )


def _broadcast_parts(dim: Dim) -> tuple[Dim, ...]:
    if isinstance(dim, Expr) and len(dim._terms) == 1:
        monomial, coefficient = dim._terms[0]
        if coefficient == 1 and len(monomial) == 1 and monomial[0].kind == "broadcast":
            return monomial[0].args
    return (dim,)


# Proofs ------------------------------------------------------------------------------------------------


def _nonneg(dim: Dim, depth: int) -> bool:
    """Whether no term can be negative, or none is once operations are replaced by their bounds."""
    if isinstance(dim, int):
        return dim >= 0
    if all(c > 0 and all(atom.nonneg for atom in m) for m, c in dim._terms):
        return True
    atom = _operation_to_bound(dim)
    if depth == 0 or atom is None:
        return False
    if atom.kind == "positive":  # max(x, 0) is one of the two
        return all(_nonneg(_substitute(dim, atom, case), depth - 1) for case in (0, atom.args[0]))
    return _nonneg(_with_division_bounded(dim, atom), depth - 1)


def _operation_to_bound(dim: Expr) -> _Atom | None:
    """Return an operation with known bounds, one that lowers the expression first."""
    for lowering in (True, False):
        for monomial, coefficient in dim._terms:
            if (coefficient < 0) != lowering:
                continue
            for position, atom in enumerate(monomial):
                if atom.kind == "positive":
                    return atom
                others = monomial[:position] + monomial[position + 1 :]
                if _divides_by_number(atom) and all(o.nonneg and o != atom for o in others):
                    return atom
    return None


def _divides_by_number(atom: _Atom) -> bool:
    return atom.kind == "floordiv" and isinstance(atom.args[1], int)


def _with_division_bounded(dim: Expr, atom: _Atom) -> Dim:
    """Return k times a lower bound of the expression, taking floor(x/k) to be between (x-k+1)/k and x/k."""
    inner, k = atom.args
    assert isinstance(k, int)
    bounded: Dim = 0
    for monomial, coefficient in dim._terms:
        others = _without(monomial, (atom,)) if atom in monomial else monomial
        if len(others) == len(monomial) or not all(o.nonneg and o != atom for o in others):
            bounded = bounded + _canonical({monomial: coefficient * k})
        else:
            bound = inner if coefficient < 0 else inner - (k - 1)
            bounded = bounded + _canonical({others: coefficient}) * bound
    return bounded


def _substitute(dim: Expr, atom: _Atom, replacement: Dim) -> Dim:
    result: Dim = 0
    for monomial, coefficient in dim._terms:
        term = _canonical({tuple(a for a in monomial if a != atom): coefficient})
        for _ in range(monomial.count(atom)):
            term = term * replacement
        result = result + term
    return result
