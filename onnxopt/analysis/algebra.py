"""Products and sums in a graph, whatever operators an exporter spelled them with.

Exporters write x * (0.5 * (1 + erf(x / sqrt(2)))) in a dozen ways. Instead of a pattern per exporter, a maximal
tree of Mul, Div, Sqrt, Reciprocal and Pow is read as one monomial


    coefficient * v1 ** e1 * v2 ** e2 * ...

and a tree of Add and Sub as a list of signed terms. Rules then look for factors and terms, in any order.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import constant_scalar, constant_tensor, has_references, is_op, only_use

PRODUCT_OPS = ("Mul", "Div", "Sqrt", "Reciprocal", "Pow", "Identity")
MAX_NODES = 64
"""Trees larger than this are cut: what lies deeper counts as a factor."""


@dataclasses.dataclass(frozen=True, slots=True)
class Monomial:
    """coefficient * product of value ** exponent.

    Attributes:
        coefficient: Product of all scalar constants.
        factors: (value, exponent) in the order met, each value once. Constants with more than one element count as
            values.
        nodes: The nodes looked through, the root first; their outputs, but for the root's, have no other use.
    """

    coefficient: float
    factors: tuple[tuple[ir.Value, float], ...]
    nodes: tuple[ir.Node, ...]

    def exponent(self, value: ir.Value) -> float:
        """Return the exponent of a value; 0 when it is no factor."""
        return next((e for v, e in self.factors if v is value), 0.0)

    def without(self, *values: ir.Value) -> tuple[tuple[ir.Value, float], ...]:
        """Return the factors that are none of the values."""
        return tuple((v, e) for v, e in self.factors if all(v is not other for other in values))


def monomial(value: ir.Value, shapes: Shapes) -> Monomial:
    """Read the product that ends in `value`.

    Only values with a single use are looked through, so that a rewrite of the whole tree leaves nothing behind
    that is still needed. Fractional powers are not distributed over a product: sqrt(x * x) is not x.
    """
    coefficient = 1.0
    factors: dict[int, tuple[ir.Value, float]] = {}
    nodes: list[ir.Node] = []
    pending: list[tuple[ir.Value, float, bool]] = [(value, 1.0, True)]
    while pending:
        current, exponent, is_root = pending.pop()
        scalar = constant_scalar(current)
        if scalar is not None and not is_root and (scalar > 0 or (scalar != 0 and exponent.is_integer())):
            coefficient *= scalar**exponent
            continue
        node = current.producer()
        inner = _expand(node, exponent, shapes) if node is not None and len(nodes) < MAX_NODES else None
        if node is None or inner is None or not (is_root or only_use(current) is not None):
            _, before = factors.get(id(current), (current, 0.0))
            factors[id(current)] = (current, before + exponent)
            continue
        nodes.append(node)
        # reversed, so that factors come out left to right
        pending.extend((v, e, False) for v, e in reversed(inner))
    return Monomial(coefficient, tuple(factors.values()), tuple(nodes))


def _expand(node: ir.Node, exponent: float, shapes: Shapes) -> list[tuple[ir.Value, float]] | None:
    """Return the factors of a product node raised to `exponent`, or None when it is not looked through."""
    if not is_op(node, *PRODUCT_OPS) or has_references(node) or not exponent.is_integer():
        return None
    inputs = [v for v in node.inputs if v is not None]
    if len(inputs) != len(node.inputs) or not is_float(node.outputs[0], shapes):
        return None
    match node.op_type:
        case "Mul" | "Div":
            if raises_rank(inputs[0], inputs[1], shapes) or raises_rank(inputs[1], inputs[0], shapes):
                return None
            return [(inputs[0], exponent), (inputs[1], exponent if node.op_type == "Mul" else -exponent)]
        case "Identity":
            return [(inputs[0], exponent)]
        case "Reciprocal":
            return [(inputs[0], -exponent)]
        case "Sqrt":
            return [(inputs[0], exponent * 0.5)]
        case "Pow":
            power = constant_scalar(inputs[1])
            if power is None or raises_rank(inputs[1], inputs[0], shapes):
                return None
            return [(inputs[0], exponent * power)]
    return None


def is_float(value: ir.Value, shapes: Shapes) -> bool:
    """Whether a value is known to hold floats; dividing and raising integers follows other laws."""
    dtype = shapes.dtype(value)
    return dtype is not None and dtype.is_floating_point()


def raises_rank(constant: ir.Value, other: ir.Value, shapes: Shapes) -> bool:
    """Whether a one-element constant may give the result more axes than the other operand has."""
    tensor = constant_tensor(constant)
    if tensor is None or tensor.size != 1 or len(tensor.shape) == 0:
        return False
    rank = shapes.rank(other)
    return rank is None or rank < len(tensor.shape)


def is_product_root(node: ir.Node) -> bool:
    """Whether a product tree ends at this node: what uses it is no product, or there is more than one use."""
    user = only_use(node.outputs[0])
    return user is None or not is_op(user, *PRODUCT_OPS) or user.graph is not node.graph


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """One term of a sum; `sign` is +1 or -1."""

    sign: int
    value: ir.Value


@dataclasses.dataclass(frozen=True, slots=True)
class Sum:
    """constant + signed terms.

    Attributes:
        constant: Sum of all scalar constants.
        terms: The others, in the order met.
        nodes: The nodes looked through, the root first.
    """

    constant: float
    terms: tuple[Term, ...]
    nodes: tuple[ir.Node, ...]


def summands(value: ir.Value, shapes: Shapes) -> Sum:
    """Read the sum that ends in `value`, looking only through values with a single use."""
    constant = 0.0
    terms: list[Term] = []
    nodes: list[ir.Node] = []
    pending: list[tuple[ir.Value, int, bool]] = [(value, 1, True)]
    while pending:
        current, sign, is_root = pending.pop()
        scalar = None if is_root else constant_scalar(current)
        if scalar is not None:
            constant += sign * scalar
            continue
        node = current.producer()
        if (
            node is None
            or not is_op(node, "Add", "Sub")
            or len(nodes) >= MAX_NODES
            or not (is_root or only_use(current) is not None)
            or not _is_sum(node, shapes)
        ):
            terms.append(Term(sign, current))
            continue
        nodes.append(node)
        left, right = node.inputs
        assert left is not None and right is not None
        second = sign if node.op_type == "Add" else -sign
        pending += [(right, second, False), (left, sign, False)]
    return Sum(constant, tuple(terms), tuple(nodes))


def _is_sum(node: ir.Node, shapes: Shapes) -> bool:
    """Whether both operands are there and no one-element constant raises the rank."""
    left, right = node.inputs
    if left is None or right is None:
        return False
    return not (raises_rank(left, right, shapes) or raises_rank(right, left, shapes))
