"""Sigmoid and Softmax that are spelled out with Exp become their operator."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.algebra import is_product_root, monomial, summands
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, constant_ints, has_references, is_op, only_use, use_count
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

SIGMOID_OPSET = 6
"""Before this opset, operators carry a hint for reuse."""
ANY_AXIS = 13
"""From this opset on, Softmax goes along one axis; before, along that one and all behind it."""
SUM_AXES_AS_INPUT = 13
"""From this opset on, ReduceSum takes its axes as an input."""

_MOST_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseExponentials(GraphPass):
    """Fuse 1 / (1 + exp(-x)) into Sigmoid, and exp(x - m) / sum(exp(x - m)) into Softmax.

    In the latter, m is whatever does not vary along the axis: it makes no difference but for overflow.
    """

    name: ClassVar[str] = "fuse-exponentials"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per function."""
        rules = {"Div": [_softmax, _sigmoid], "Mul": [_softmax, _sigmoid], "Reciprocal": [_sigmoid]}
        yield from rewrite(self.name, model, ctx, rules)


# Sigmoid ------------------------------------------------------------------------------------------------------


def _sigmoid(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """A product with the factor 1 / (1 + exp(-x))."""
    if scope.opset < SIGMOID_OPSET or not is_product_root(node):
        return None
    product = monomial(node.outputs[0], ctx.shapes)
    for gate, exponent in product.factors:
        found = _negated_exponent(gate, ctx.shapes) if exponent == -1 else None
        if found is None:
            continue
        if isinstance(found, Refused):
            return found
        x, slope = found
        rest = product.without(gate)
        if any(e not in (1, -1) for _, e in rest):
            return Refused("another factor is raised to a power")
        build = functools.partial(_emit_sigmoid, x, slope, rest, product.coefficient, ctx.shapes.dtype(x))
        return Found(node.outputs[0], f"Sigmoid of {x.name}", build)
    return None


def _emit_sigmoid(
    x: ir.Value,
    slope: float,
    rest: tuple[tuple[ir.Value, float], ...],
    factor: float,
    dtype: ir.DataType | None,
    builder: Builder,
) -> ir.Value:
    """Build factor * sigmoid(slope * x) times what else the product holds."""
    scaled = x if slope == 1 else builder.op("Mul", [x, builder.constant("slope", slope, dtype)])
    value = builder.op("Sigmoid", [scaled])
    for other, exponent in rest:
        value = builder.op("Mul", [other, value]) if exponent == 1 else builder.op("Div", [value, other])
    return value if factor == 1 else builder.op("Mul", [value, builder.constant("factor", factor, dtype)])


def _negated_exponent(gate: ir.Value, shapes: Shapes) -> tuple[ir.Value, float] | Refused | None:
    """Read 1 + exp(-slope * x) as (x, slope)."""
    if not is_op(gate.producer(), "Add") or only_use(gate) is None:
        return None
    total = summands(gate, shapes)
    if len(total.terms) != 1 or total.terms[0].sign != 1:
        return None
    exp = total.terms[0].value.producer()
    if exp is None or not is_op(exp, "Exp") or exp.inputs[0] is None or only_use(exp.outputs[0]) is None:
        return None
    if not math.isclose(total.constant, 1, rel_tol=1e-6):
        return Refused("what is added to the exponential is not 1")
    source = exp.inputs[0].producer()
    if source is not None and is_op(source, "Neg") and only_use(exp.inputs[0]) is exp and source.inputs[0] is not None:
        return source.inputs[0], 1.0
    inner = monomial(exp.inputs[0], shapes)
    if len(inner.factors) != 1 or inner.factors[0][1] != 1 or inner.coefficient >= 0:
        return Refused("the exponent is not a negative multiple of a value")
    return inner.factors[0][0], -inner.coefficient


# Softmax ------------------------------------------------------------------------------------------------------


def _softmax(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Read e / sum(e) or e * (1 / sum(e)), where e is an Exp that nothing else uses."""
    for value, divisor in _quotients(node):
        exp = value.producer()
        if exp is None or not is_op(exp, "Exp") or exp.graph is not node.graph or exp.inputs[0] is None:
            continue
        axis = _summed_axis(divisor, value, scope, ctx.shapes)
        rank = ctx.shapes.rank(value)
        if axis is None or rank is None:
            continue
        if use_count(value) != 2 or value.is_graph_output():
            return Refused("the exponential is used elsewhere, too")
        if scope.opset < ANY_AXIS and axis != rank - 1:
            return Refused(f"before opset {ANY_AXIS}, Softmax takes the last axes only; raise it with --opset")
        source = _without_shift(exp.inputs[0], axis, exp, ctx.shapes)
        return Found(
            node.outputs[0],
            f"Softmax of {source.name}",
            lambda b: b.op("Softmax", [source], {"axis": axis}),  # noqa: B023
        )
    return None


def _quotients(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Return the ways to read a node as (dividend, divisor)."""
    left, right = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if left is None or right is None:
        return []
    if is_op(node, "Div"):
        return [(left, right)]
    found = []
    for value, other in ((left, right), (right, left)):
        inverse = other.producer()
        if inverse is not None and is_op(inverse, "Reciprocal") and inverse.inputs[0] is not None:
            found.append((value, inverse.inputs[0]))
    return found


def _summed_axis(divisor: ir.Value, value: ir.Value, scope: Scope, shapes: Shapes) -> int | None:
    """Return the axis when the divisor is the sum of a value over it, of size 1 there."""
    shape, kept = shapes.of(value), shapes.of(divisor)
    current: ir.Value | None = divisor
    for _ in range(_MOST_STEPS):
        node = current.producer() if current is not None else None
        if node is None or has_references(node):
            return None
        # These keep the order of elements, so that the shape tells which axis has which place.
        if is_op(node, "Reshape", "Unsqueeze", "Squeeze"):
            current = node.inputs[0]
            continue
        if not is_op(node, "ReduceSum") or node.inputs[0] is not value or shape is None or kept is None:
            return None
        axes = attribute(node, "axes")
        if scope.opset >= SUM_AXES_AS_INPUT:
            axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or len(axes) != 1:
            return None
        axis: int = axes[0] % len(shape)
        return axis if kept == (*shape[:axis], 1, *shape[axis + 1 :]) else None
    return None


def _without_shift(value: ir.Value, axis: int, user: ir.Node, shapes: Shapes) -> ir.Value:
    """Return x when the value is x minus something that does not vary along the axis."""
    node = value.producer()
    if node is None or not is_op(node, "Sub") or only_use(value) is not user or node.graph is not user.graph:
        return value
    x, shift = node.inputs
    if x is None or shift is None or not shapes.same_shape(x, value):
        return value
    shape, whole = shapes.of(shift), shapes.of(x)
    if shape is None or whole is None:
        return value
    position = axis - len(whole)
    return x if len(shape) < -position or shape[position] == 1 else value
