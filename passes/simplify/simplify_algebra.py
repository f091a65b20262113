"""Laws of arithmetic and logic, as far as they hold in floating point."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import (
    Scope,
    attribute,
    constant_array,
    constant_tensor,
    has_references,
    is_op,
    only_use,
    use_count,
)
from onnxopt.rewrite import Answer, Builder, Found, Refused, Rule, Same, rewrite

_Array = np.ndarray[Any, Any]

_MAX_BYTES = 1 << 20
"""Larger constants are not read."""
_MAX_COPIES = 8
"""Nodes looked through to see that all elements of a value are alike."""
_SMALL_BYTES = 256
"""A constant of this size may be stored besides the ones it is computed from."""
_FACTORS = (1e-4, 1e4)
"""Factors are merged when their magnitudes lie in here, so that no product leaves the range of its type."""
BROADCASTING = 7
"""From this opset on, operands of arithmetic and logic are broadcast."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimplifyAlgebra(GraphPass):
    """Apply laws of arithmetic and logic, as far as they hold in floating point.

    Not of Not, Neg of Neg, and Abs, Relu, Ceil, Floor, Round and Sign done twice; adding a Neg; operands that are
    neutral, also where their size is only known when the model runs; Where whose condition is known, inverted or
    makes no difference; two constants that are added, or multiplied, one after the other; an Expand whose result
    is broadcast anyway. x * 0 and x - x stay: for infinities and NaN they are not 0.
    """

    name: ClassVar[str] = "simplify-algebra"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node."""
        yield from rewrite(self.name, model, ctx, _RULES)


def _inputs(node: ir.Node) -> list[ir.Value] | None:
    """Return the inputs of a node, None when one is missing."""
    found = [v for v in node.inputs if v is not None]
    return found if len(found) == len(node.inputs) else None


def _producer(value: ir.Value | None, user: ir.Node, *op_types: str) -> ir.Node | None:
    """Return what computes a value in the same graph, if it is one of these operators."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, *op_types) or node.graph is not user.graph or has_references(node):
        return None
    return node


# One operand --------------------------------------------------------------------------------------------------


def _involution(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    inner = _producer(node.inputs[0], node, node.op_type)
    if inner is None or inner.inputs[0] is None:
        return None
    return Same(node.outputs[0], inner.inputs[0], f"{node.op_type} of {node.op_type}")


def _idempotent(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    inner = _producer(node.inputs[0], node, node.op_type, *(("Relu",) if node.op_type == "Abs" else ()))
    if inner is None:
        return None
    return Same(node.outputs[0], inner.outputs[0], f"{node.op_type} of {inner.op_type}")


# Two operands -------------------------------------------------------------------------------------------------


def _negated(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Adding -b is subtracting b, and the other way round."""
    values = _inputs(node)
    if values is None or len(values) != 2 or scope.opset < BROADCASTING:
        return None
    for index in (1, 0) if node.op_type == "Add" else (1,):
        negation = _producer(values[index], node, "Neg")
        other = values[1 - index]
        if negation is None or only_use(values[index]) is None or negation.inputs[0] is None:
            continue
        op_type, operands = "Sub" if node.op_type == "Add" else "Add", [other, negation.inputs[0]]
        build = functools.partial(_build, op_type=op_type, operands=operands)
        return Found(node.outputs[0], f"{node.op_type} of Neg", build)
    return None


_COPIES = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Tile", "Transpose", "Identity")


def _copied(value: ir.Value | None) -> ir.Node | None:
    """Return the node that makes a value of copies of one number, or of elements of another value."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "ConstantOfShape", *_COPIES) or has_references(node):
        return None
    return node


def uniform(value: ir.Value | None) -> float | None:
    """Return the number that every element of a value is, whatever its shape, or None."""
    for _ in range(_MAX_COPIES):
        tensor = constant_tensor(value)
        if tensor is not None:
            return _uniform_tensor(tensor)
        node = _copied(value)
        if node is None:
            return None
        if is_op(node, "ConstantOfShape"):
            filling = attribute(node, "value")
            return 0.0 if filling is None else _uniform_tensor(filling)
        value = node.inputs[0]
    return None


def _uniform_tensor(tensor: ir.TensorProtocol) -> float | None:
    if tensor.dtype == ir.DataType.STRING or not tensor.size or tensor.nbytes > _MAX_BYTES:
        return None
    array = tensor.numpy()
    first = array.reshape(-1)[0]
    return float(first) if array.dtype.kind in "biuf" and bool(np.all(array == first)) else None


def _neutral(number: float, *, either_side: bool) -> Rule:
    """Make a rule for an operator that returns one operand when all elements of the other are this number."""

    def rule(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
        values = _inputs(node)
        if values is None or len(values) != 2 or scope.opset < BROADCASTING:
            return None
        for index in (1, 0) if either_side else (1,):
            # What is constant and numeric, remove-identities looks at, which knows the exceptions.
            if _copied(values[index]) is None and ctx.shapes.dtype(values[index]) != ir.DataType.BOOL:
                continue
            if uniform(values[index]) == number and ctx.shapes.broadcasts_to(values[index], values[1 - index]):
                return Same(node.outputs[0], values[1 - index], f"{node.op_type} with {number:g}")
        return None

    return rule


# Constants ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A node that adds a constant to a value, or multiplies it by one.

    Attributes:
        value: The operand that is not constant.
        constant: The other one.
        inverse: Whether the constant is subtracted, or divided by.
        flipped: Whether the constant comes first in a subtraction: c - x.
        node: The node.
        source: The constant's value in the graph.
    """

    value: ir.Value
    constant: _Array
    inverse: bool
    flipped: bool
    node: ir.Node
    source: ir.Value


def _step(node: ir.Node) -> _Step | None:
    values = _inputs(node)
    if values is None or len(values) != 2:
        return None
    for index in (1, 0):
        constant = constant_array(values[index], _MAX_BYTES)
        if constant is None or constant.dtype.kind not in "iuf" or constant_tensor(values[1 - index]) is not None:
            continue
        if node.op_type == "Div" and (index == 0 or constant.dtype.kind != "f"):
            return None
        inverse = node.op_type in ("Sub", "Div") and index == 1
        flipped = node.op_type == "Sub" and index == 0
        return _Step(values[1 - index], constant, inverse, flipped, node, values[index])
    return None


def _merge_constants(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """(x + a) + b is x + (a + b), and (x * a) * b is x * (a * b)."""
    additive = node.op_type in ("Add", "Sub")
    family = ("Add", "Sub") if additive else ("Mul", "Div")
    # This question is the cheapest, and the answer mostly no.
    if scope.opset < BROADCASTING or not any(_producer(v, node, *family) for v in node.inputs):
        return None
    last = _step(node)
    inner = _producer(last.value, node, *family) if last else None
    if last is None or inner is None or only_use(last.value) is None:
        return None
    first = _step(inner)
    if first is None or first.flipped or last.flipped or first.constant.dtype != last.constant.dtype:
        return None
    merged = _added(first, last) if additive else _multiplied(first, last)
    if isinstance(merged, Refused):
        return merged
    freed = sum(s.constant.nbytes for s in (first, last) if use_count(s.source) == 1)
    if merged.nbytes > max(freed, _SMALL_BYTES):
        return Refused("the two constants together would take more room than each")
    op_type = ("Add" if additive else "Mul") if not (first.inverse and last.inverse) else node.op_type

    def build(builder: Builder) -> ir.Value:
        return builder.op(op_type, [first.value, builder.constant("merged", merged)])

    return Found(node.outputs[0], f"merged the constants of {inner.op_type} and {node.op_type}", build)


def _added(first: _Step, last: _Step) -> _Array | Refused:
    """Return the sum of two constants; where both are subtracted, of what is subtracted."""
    a, b = first.constant, last.constant
    if a.dtype.kind != "f":
        with np.errstate(over="ignore"):
            both = first.inverse and last.inverse
            return np.asarray((a if both or not first.inverse else -a) + (b if both or not last.inverse else -b))
    signs = (1.0, 1.0) if first.inverse and last.inverse else (-1.0 if s.inverse else 1.0 for s in (first, last))
    one, two = (sign * c.astype(np.float64) for sign, c in zip(signs, (a, b), strict=True))
    total = one + two
    largest = np.maximum(np.abs(one), np.abs(two))
    if not np.all(np.isfinite(total)) or np.any(np.abs(total) < largest / 2):
        return Refused("the two constants nearly cancel, and what that rounds away may be meant to go")
    return total.astype(a.dtype)


def _multiplied(first: _Step, last: _Step) -> _Array | Refused:
    """Return the product of two constants; where both are divided by, of the divisors."""
    a, b = first.constant, last.constant
    if a.dtype.kind != "f":
        with np.errstate(over="ignore"):
            return np.asarray(a * b)
    both = first.inverse and last.inverse
    one, two = (c.astype(np.float64) for c in (a, b))
    low, high = _FACTORS
    for magnitude in (np.abs(one), np.abs(two)):
        if np.any(magnitude < low) or np.any(magnitude > high) or not np.all(np.isfinite(magnitude)):
            return Refused("a factor is so large or small that the product might leave the range of its type")
    product = (one if both or not first.inverse else 1 / one) * (two if both or not last.inverse else 1 / two)
    if np.any(np.abs(product) < low) or np.any(np.abs(product) > high):
        return Refused("a factor is so large or small that the product might leave the range of its type")
    return product.astype(a.dtype)


# Where and Expand ---------------------------------------------------------------------------------------------


def _where(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Where that always takes the same side, or whose condition is a Not."""
    values = _inputs(node)
    if values is None or len(values) != 3:
        return None
    condition, first, second = values
    side = uniform(condition)
    chosen = first if first is second else None if side is None else first if side else second
    if chosen is not None:
        if ctx.shapes.same_shape(chosen, node.outputs[0]):
            return Same(node.outputs[0], chosen, f"always {chosen.name}")
        return Refused("the side that is always taken may have another shape")
    inverted = _producer(condition, node, "Not")
    if inverted is None or only_use(condition) is None or inverted.inputs[0] is None:
        return None
    operands = [inverted.inputs[0], second, first]
    return Found(node.outputs[0], "Where of Not", lambda b: b.op("Where", operands))


def _expanded(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """An Expand of an operand that the other operands stretch as far."""
    values = _inputs(node)
    if values is None or scope.opset < BROADCASTING:
        return None
    for index, value in enumerate(values):
        expand = _producer(value, node, "Expand")
        if expand is None or expand.inputs[0] is None:
            continue
        others = values[:index] + values[index + 1 :]
        if not _stretched_anyway(value, expand.inputs[0], others, ctx.shapes):
            continue
        operands = [*values[:index], expand.inputs[0], *values[index + 1 :]]
        attributes = {name: a.value for name, a in node.attributes.items()}
        build = functools.partial(_build, op_type=node.op_type, operands=operands, attributes=attributes)
        return Found(node.outputs[0], f"{node.op_type} broadcasts {expand.inputs[0].name} itself", build)
    return None


def _build(
    builder: Builder, *, op_type: str, operands: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None
) -> ir.Value:
    return builder.op(op_type, operands, attributes)


def _stretched_anyway(expanded: ir.Value, source: ir.Value, others: Sequence[ir.Value], shapes: Shapes) -> bool:
    full, small = shapes.of(expanded), shapes.of(source)
    beside = [shape for v in others if (shape := shapes.of(v)) is not None]
    if full is None or small is None:
        return False
    for position in range(1, len(full) + 1):
        size = full[-position]
        if position <= len(small) and small[-position] == size:
            continue
        if not any(position <= len(shape) and shape[-position] == size for shape in beside):
            return False
    return True


_BROADCASTING = (
    "And",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Min",
    "Mod",
    "Or",
    "Pow",
    "Xor",
)

_RULES: dict[str, list[Rule]] = {
    "Not": [_involution],
    "Neg": [_involution],
    **{op_type: [_idempotent] for op_type in ("Abs", "Relu", "Ceil", "Floor", "Round", "Sign")},
    **{op_type: [_expanded] for op_type in _BROADCASTING},
    "Add": [_negated, _neutral(0, either_side=True), _merge_constants, _expanded],
    "Sub": [_negated, _neutral(0, either_side=False), _merge_constants, _expanded],
    "Mul": [_neutral(1, either_side=True), _merge_constants, _expanded],
    "Div": [_neutral(1, either_side=False), _merge_constants, _expanded],
    "And": [_neutral(1, either_side=True), _expanded],
    "Or": [_neutral(0, either_side=True), _expanded],
    "Xor": [_neutral(0, either_side=True), _expanded],
    "Where": [_where, _expanded],
}
