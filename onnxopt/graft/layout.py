"""Which axis of a value holds channels, told by what computes it and what reads it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxopt.graph import attribute, is_op

_CHANNELS_FIRST = (
    "Conv",
    "ConvTranspose",
    "ConvInteger",
    "QLinearConv",
    "MaxPool",
    "AveragePool",
    "LpPool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "BatchNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "LRN",
    "DepthToSpace",
    "SpaceToDepth",
)
"""Operators whose first input and first output have channels along axis 1."""

_UNARY = frozenset(
    {
        *("Abs", "Cast", "CastLike", "Ceil", "Celu", "Clip", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp"),
        *("Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Pad", "Pow"),
        *("QuantizeLinear", "QuickGelu", "Reciprocal", "Relu", "Resize", "Selu", "Sigmoid", "Slice", "Softplus"),
        *("Softsign", "Sqrt", "Tanh", "ThresholdedRelu"),
    }
)
"""Operators whose output has the axes of their first input."""

_JOINING = frozenset({"Add", "Concat", "Div", "Max", "Min", "Mul", "Sub", "Sum"})
"""Operators whose output has the axes of all inputs that have as many."""

_MOST_VALUES = 60
"""So many values around one are looked at."""

Order = tuple[int, ...]
"""For each axis of the value that is asked about, which axis of another it is."""


def channel_axis(value: ir.Value, rank: int) -> int | None:
    """Return the axis of a value along which channels lie; None where nothing tells it, or not in one way.

    Args:
        value: Of a main graph.
        rank: How many axes it has.
    """
    seen: dict[ir.Value, Order] = {value: tuple(range(rank))}
    found: set[int] = set()
    waiting = [value]
    while waiting and len(seen) < _MOST_VALUES:
        here = waiting.pop(0)
        order = seen[here]
        found.update(order.index(axis) for axis in _told(here, rank))
        for other, theirs in _neighbours(here, order):
            if other not in seen:
                seen[other] = theirs
                waiting.append(other)
    return found.pop() if len(found) == 1 else None


def _told(value: ir.Value, rank: int) -> Iterator[int]:
    """Yield what the nodes at a value say about its axes."""
    around = [use.node for use in value.uses() if use.idx == 0]
    producer = value.producer()
    if producer is not None and producer.outputs[0] is value:
        around.append(producer)
    for node in around:
        if is_op(node, *_CHANNELS_FIRST):
            yield 1
        elif is_op(node, "LayerNormalization") and attribute(node, "axis", -1) in (-1, rank - 1):
            yield rank - 1


def _neighbours(value: ir.Value, order: Order) -> Iterator[tuple[ir.Value, Order]]:
    """Yield values that hold the same axes, and in which order."""
    rank = len(order)
    for use in value.uses():
        node = use.node
        passes = node.op_type in _JOINING or (node.op_type in _UNARY and use.idx == 0)
        if passes and _rank(node.outputs[0], rank) == rank:
            yield node.outputs[0], order
        elif is_op(node, "Transpose") and len(perm := attribute(node, "perm", ())) == rank:
            yield node.outputs[0], tuple(perm.index(axis) for axis in order)
    maker = value.producer()
    if maker is None:
        return
    if maker.op_type in _UNARY | _JOINING:
        alone = maker.op_type in _UNARY
        for other in maker.inputs[:1] if alone else maker.inputs:
            # Of several inputs some may have fewer axes, and be broadcast.
            if other is not None and other.const_value is None and _rank(other, rank if alone else -1) == rank:
                yield other, order
    elif is_op(maker, "Transpose") and len(perm := attribute(maker, "perm", ())) == rank:
        source = maker.inputs[0]
        if source is not None:
            yield source, tuple(perm[axis] for axis in order)


def _rank(value: ir.Value, unknown: int) -> int:
    return unknown if value.shape is None else len(value.shape)
