"""Piecewise linear activations in a graph, whatever operators an exporter spelled them with.

Clip, Relu, Max and Min with a number, HardSigmoid, and numbers that multiply and add around them, are read as one

    clamp(slope * x + offset, low, high)

Two clamps one after the other are again one, also where their ranges do not overlap.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import onnx_ir as ir

from onnxopt.analysis.algebra import raises_rank
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS
from onnxopt.graph import attribute, constant_scalar, has_references, is_op, only_use

CLAMP_OPS = ("Clip", "Relu", "Max", "Min")
BOUNDS_AS_INPUT = 11
"""From this opset on, Clip takes its bounds as inputs."""
BROADCASTING = 8
"""From this opset on, Max and Min broadcast their inputs, as arithmetic has before."""

_MAX_NODES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Clamp:
    """min(max(x, low), high), with low <= high.

    Attributes:
        x: What is clamped.
        low: The smallest result; -inf when there is no bound.
        high: The largest result.
        nodes: The nodes read, the last one first.
    """

    x: ir.Value
    low: float
    high: float
    nodes: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Ramp:
    """clamp(slope * x + offset, low, high).

    Attributes:
        x: The input.
        slope: What it is multiplied by; not 0.
        offset: What is added.
        low: The smallest result.
        high: The largest result.
        nodes: The nodes read, the last one first.
    """

    x: ir.Value
    slope: float
    offset: float
    low: float
    high: float
    nodes: tuple[ir.Node, ...]

    def times(self, factor: float, shift: float = 0.0) -> Ramp:
        """Return factor * ramp + shift."""
        ends = sorted((self.low * factor + shift, self.high * factor + shift))
        return dataclasses.replace(
            self, slope=self.slope * factor, offset=self.offset * factor + shift, low=ends[0], high=ends[1]
        )


def resolution(dtype: ir.DataType) -> float:
    """Return the distance from 1 to the next number of a floating-point type."""
    return float(ml_dtypes.finfo(dtype.numpy()).eps)  # type: ignore[no-untyped-call]


def largest(dtype: ir.DataType) -> float:
    """Return the largest number of a floating-point type."""
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]


def clamp(node: ir.Node, opset: int, shapes: Shapes) -> Clamp | None:
    """Read one node that clamps floats to constant bounds, or return None. Bounds that cross are not read."""
    if not is_op(node, *CLAMP_OPS) or has_references(node) or not node.inputs or node.inputs[0] is None:
        return None
    dtype = shapes.dtype(node.inputs[0])
    if dtype is None or dtype not in FLOATS:
        return None
    if is_op(node, "Relu"):
        return Clamp(node.inputs[0], 0.0, math.inf, (node,))
    if is_op(node, "Max", "Min"):
        return _extremum(node, shapes) if opset >= BROADCASTING else None
    limit = largest(dtype)
    if opset < BOUNDS_AS_INPUT:
        low, high = (max(-limit, min(limit, attribute(node, name, default))) for name, default in _CLIP)
    else:
        given = [*node.inputs[1:3], None, None]
        bounds = [_bound(v, default * limit) for v, default in zip(given, (-1, 1), strict=False)]
        if bounds[0] is None or bounds[1] is None:
            return None
        low, high = bounds[0], bounds[1]
    return Clamp(node.inputs[0], low, high, (node,)) if low <= high else None


_CLIP = (("min", -math.inf), ("max", math.inf))


def _bound(value: ir.Value | None, default: float) -> float | None:
    """Return a bound; None when it is not constant or not a number."""
    if value is None:
        return default
    number = constant_scalar(value)
    return None if number is None or math.isnan(number) else number


def _extremum(node: ir.Node, shapes: Shapes) -> Clamp | None:
    if len(node.inputs) != 2:
        return None
    for value, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        if value is None or other is None:
            return None
        bound = constant_scalar(other)
        if bound is None or math.isnan(bound) or constant_scalar(value) is not None:
            continue
        if raises_rank(other, value, shapes):
            return None
        low, high = (bound, math.inf) if is_op(node, "Max") else (-math.inf, bound)
        return Clamp(value, low, high, (node,))
    return None


def clamps(node: ir.Node, opset: int, shapes: Shapes) -> Clamp | None:
    """Read a node and the clamps in front of it, looking only through values with a single use, as one."""
    found = clamp(node, opset, shapes)
    while found is not None and len(found.nodes) < _MAX_NODES:
        before = _single_producer(found.x, node)
        inner = clamp(before, opset, shapes) if before is not None else None
        if inner is None:
            break
        low, high = (min(max(end, found.low), found.high) for end in (inner.low, inner.high))
        found = Clamp(inner.x, low, high, (*found.nodes, *inner.nodes))
    return found


def _single_producer(value: ir.Value, user: ir.Node) -> ir.Node | None:
    """Return what computes a value that is used once, in the same graph."""
    node = value.producer()
    return node if node is not None and node.graph is user.graph and only_use(value) is not None else None


def ramp(node: ir.Node, opset: int, shapes: Shapes) -> Ramp | None:
    """Read the ramp that ends in a node, looking only through values with a single use, or return None."""
    x, factor, shift, outer = _affine(node, shapes)
    last: ir.Node | None = node if not outer else _single_producer(x, node)
    if last is None:
        return None
    if is_op(last, "HardSigmoid") and not has_references(last) and last.inputs[0] is not None:
        inner = Clamp(last.inputs[0], 0.0, 1.0, (last,))
        slope, offset = attribute(last, "alpha", 0.2), attribute(last, "beta", 0.5)
    else:
        read = clamps(last, opset, shapes)
        if read is None:
            return None
        inner, slope, offset = read, 1.0, 0.0
    before = _single_producer(inner.x, last)
    x, scale, add, first = (inner.x, 1.0, 0.0, ()) if before is None else _affine(before, shapes)
    if not first:
        x = inner.x
    slope, offset = slope * scale, offset + slope * add
    if factor == 0 or slope == 0:
        return None
    return Ramp(x, slope, offset, inner.low, inner.high, (*outer, *inner.nodes, *first)).times(factor, shift)


def _affine(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, float, float, tuple[ir.Node, ...]]:
    """Read factor * x + shift; return (x, factor, shift, nodes), without any nodes when it is nothing of the kind."""
    x, factor, shift = node.outputs[0], 1.0, 0.0
    nodes: list[ir.Node] = []
    current: ir.Node | None = node
    while current is not None and len(nodes) < _MAX_NODES:
        step = _arithmetic(current, shapes)
        if step is None:
            break
        nodes.append(current)
        x, scale, add = step
        factor, shift = factor * scale, shift + factor * add
        current = _single_producer(x, node)
    return x, factor, shift, tuple(nodes)


def _arithmetic(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, float, float] | None:
    """Read one node as (x, factor, shift)."""
    if has_references(node) or not is_op(node, "Mul", "Div", "Add", "Sub", "Neg") or node.inputs[0] is None:
        return None
    if shapes.dtype(node.outputs[0]) not in FLOATS:
        return None
    if is_op(node, "Neg"):
        return node.inputs[0], -1.0, 0.0
    for index, value in enumerate(node.inputs):
        other = node.inputs[1 - index]
        number = constant_scalar(other)
        if value is None or other is None or number is None or constant_scalar(value) is not None:
            continue
        if not math.isfinite(number) or raises_rank(other, value, shapes):
            return None
        match node.op_type, index:
            case ("Mul", _):
                return value, number, 0.0
            case ("Add", _):
                return value, 1.0, number
            case ("Sub", 0):
                return value, 1.0, -number
            case ("Sub", _):
                return value, -1.0, number
            case ("Div", 0) if number:
                return value, 1 / number, 0.0
    return None
