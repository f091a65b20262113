"""What the nodes that use a graph input ask of it: which tables its integers index, which sizes its axes need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute, constant_array, constant_ints, is_op

_REARRANGES = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose output holds elements of their first input (Concat: of all), unchanged."""

_ELEMENTWISE = frozenset(
    {"Add", "Cast", "Div", "DynamicQuantizeLinear", "Identity", "Mul", "Neg", "QuantizeLinear", "Relu", "Sub"}
)
"""Operators that leave the axes of their first input where they are."""

_RECURRENT = ("LSTM", "GRU", "RNN")
_MOST_STEPS = 2000
"""Values looked at per input; what lies farther away is not searched."""


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """A node that uses the elements of an input.

    Attributes:
        node: The node.
        index: At which of its inputs.
        scale: The element there is scale * element + offset.
        offset: See scale.
        arguments: Input of a function -> what it was called with, where the node is inside of functions.
    """

    node: ir.Node
    index: int
    scale: int
    offset: int
    arguments: Mapping[ir.Value, ir.Value | None]

    def shape(self, index: int) -> tuple[int | str | None, ...] | None:
        """Return the shape of one of the node's inputs, None where it is not known."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        while value is not None and value in self.arguments:
            value = self.arguments[value]
        return shape_of(value)


def uses(value: ir.Value, functions: dict[ir.OperatorIdentifier, ir.Function]) -> Iterator[Use]:
    """Yield the uses of a value and of whatever holds its elements, in nested graphs and functions as well.

    Args:
        value: Where to start.
        functions: The model's functions.
    """
    pending = [(value, 1, 0)]
    arguments: dict[ir.Value, ir.Value | None] = {}
    seen: set[ir.Value] = set()
    while pending and len(seen) < _MOST_STEPS:
        current, scale, offset = pending.pop(0)
        if current in seen:
            continue
        seen.add(current)
        for usage in current.uses():
            yield Use(usage.node, usage.idx, scale, offset, arguments)
            function = functions.get(usage.node.op_identifier())
            if function is not None:
                arguments.update(zip(function.inputs, usage.node.inputs, strict=False))
            pending += [(v, s * scale, s * offset + o) for v, s, o in _onward(usage.node, usage.idx, functions)]


def _onward(
    node: ir.Node, index: int, functions: dict[ir.OperatorIdentifier, ir.Function]
) -> list[tuple[ir.Value, int, int]]:
    """Return the values that hold the elements of a node's input, each with scale and offset."""
    function = functions.get(node.op_identifier())
    if function is not None:
        return [(function.inputs[index], 1, 0)] if index < len(function.inputs) else []
    if is_op(node, "Loop", "Scan"):
        body = node.attributes["body"].as_graph()
        return [(body.inputs[index], 1, 0)] if index < len(body.inputs) else []
    if is_op(node, *_REARRANGES) and (index == 0 or node.op_type == "Concat"):
        return [(output, 1, 0) for output in node.outputs]
    if is_op(node, "Where") and index > 0:
        return [(node.outputs[0], 1, 0)]
    if is_op(node, "Add", "Sub", "Mul"):
        return _shifted(node, index)
    return []


def _shifted(node: ir.Node, index: int) -> list[tuple[ir.Value, int, int]]:
    """Return the output of an arithmetic node when its other input is one constant integer."""
    constant = constant_array(node.inputs[1 - index], max_bytes=8)
    if constant is None or constant.size != 1 or constant.dtype.kind not in "iu":
        return []
    number, output = int(constant.reshape(())), node.outputs[0]
    if node.op_type == "Mul":
        return [(output, number, 0)] if number > 0 else []
    if node.op_type == "Add":
        return [(output, 1, number)]
    return [(output, 1, -number)] if index == 0 else []


def index_bounds(
    value: ir.Value, functions: dict[ir.OperatorIdentifier, ir.Function]
) -> list[tuple[int, int, int | str | None]]:
    """Return what the integers of a value index.

    Returns:
        (scale, offset, rows): scale * element + offset must lie in [0, rows). Rows are a size, the name of an
        axis, or None where they are not known.
    """
    found = []
    for use in uses(value, functions):
        table = _indexed(use.node, use.index)
        if table is not None:
            found.append((use.scale, use.offset, _dim(use.shape(table[0]), table[1])))
        categories = _categories(use.node, use.index)
        if categories is not None:
            found.append((use.scale, use.offset, categories))
    return found


def _categories(node: ir.Node, index: int) -> int | None:
    """Return how many categories a node tells apart: OneHot, or Equal with all of 0, 1, 2 ..."""
    if is_op(node, "OneHot") and index == 0:
        depth = constant_ints(node.inputs[1])
        return depth[0] if depth else None
    if is_op(node, "Equal"):
        other = constant_ints(node.inputs[1 - index])
        return len(other) if other and len(other) > 2 and other == tuple(range(len(other))) else None
    return None


def _indexed(node: ir.Node, index: int) -> tuple[int, int] | None:
    """Return which input of a node another one indexes, and along which axis, if it does."""
    if is_op(node, "Gather", "GatherElements", "ScatterElements", "Scatter") and index == 1:
        return 0, int(attribute(node, "axis", 0))
    if is_op(node, "ArrayFeatureExtractor", domain="ai.onnx.ml") and index == 1:
        return 0, -1
    if is_op(node, "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss") and index == 1:
        return 0, 1
    if is_op(node, "GatherBlockQuantized", domain="com.microsoft") and index == 1:
        return 0, int(attribute(node, "gather_axis", 0))
    if is_op(node, "EmbedLayerNormalization", domain="com.microsoft") and index in (0, 1):
        return (2, 0) if index == 0 else (4, 0)
    if is_op(node, "RotaryEmbedding", domain="com.microsoft") and index == 1:
        return 2, 0
    if is_op(node, "RotaryEmbedding") and index == 3:
        return 1, 0
    return None


def _dim(dims: tuple[int | str | None, ...] | None, axis: int) -> int | str | None:
    if dims is None or not -len(dims) <= axis < len(dims):
        return None
    return dims[axis]


def shape_of(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """Return the declared shape of a value (of an initializer, its own), None when it has none."""
    if value is None:
        return None
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None:
        node = value.producer()
        # Tables are often stored smaller and converted where they are used.
        return shape_of(node.inputs[0]) if node and is_op(node, "Cast", "DequantizeLinear", "Identity") else None
    return tuple(d if isinstance(d, int) else d.value for d in shape)


def required_sizes(value: ir.Value, rank: int | None) -> dict[int, int]:
    """Return the sizes that the axes of a value need, as far as the weights it meets tell.

    Args:
        value: A graph input.
        rank: Its rank; None when it is not known, and then axes counted from the end are left out.
    """
    found: dict[int, int] = {}
    pending = [value]
    seen: set[ir.Value] = set()
    while pending and len(seen) < _MOST_STEPS:
        current = pending.pop(0)
        seen.add(current)
        for usage in current.uses():
            node = usage.node
            for axis, size in _required(node, usage.idx):
                position = axis if axis >= 0 else axis + rank if rank is not None else -1
                if position >= 0 and (rank is None or position < rank):
                    found.setdefault(position, size)
            if is_op(node, *_ELEMENTWISE) and node.outputs[0] not in seen and usage.idx == 0:
                pending.append(node.outputs[0])
    return found


def _required(node: ir.Node, index: int) -> Iterator[tuple[int, int]]:
    """Yield (axis, size) for an input of a node; axes may count from the end."""
    others = [shape_of(v) for v in node.inputs]
    other = others[1] if len(others) > 1 and index == 0 else None
    if other is None:
        return
    wanted: list[tuple[int, int | str | None]] = []
    if is_op(node, "Conv"):
        group = int(attribute(node, "group", 1))
        wanted = [(1, other[1] * group if isinstance(other[1], int) else None)]
    elif is_op(node, "ConvTranspose"):
        wanted = [(1, other[0])]
    elif is_op(node, "MatMul", "MatMulInteger") and len(other) >= 2:
        wanted = [(-1, other[-2])]
    elif is_op(node, "Gemm"):
        wanted = [(0 if attribute(node, "transA", 0) else 1, other[1 if attribute(node, "transB", 0) else 0])]
    elif is_op(node, *_RECURRENT):
        wanted = [(2, other[2])]
    elif is_op(node, "BatchNormalization", "InstanceNormalization"):
        wanted = [(1, other[0])]
    elif is_op(node, "LayerNormalization", "RMSNormalization") and other:
        wanted = [(-1, other[-1])]
    elif is_op(node, "Add", "Sub", "Mul", "Div") and constant_array(node.inputs[1], max_bytes=1 << 16) is not None:
        wanted = [(axis - len(other), size) for axis, size in enumerate(other) if size != 1]
    yield from ((axis, size) for axis, size in wanted if isinstance(size, int))


def first_uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the nodes that take a value as it is, behind casts and copies, each with the index of its input."""
    for usage in value.uses():
        if is_op(usage.node, "Cast", "Identity"):
            yield from first_uses(usage.node.outputs[0])
        else:
            yield usage.node, usage.idx


def bounded(bounds: list[tuple[int, int, int | None]]) -> tuple[int, int] | None:
    """Return the half-open range of elements that stay inside all tables, or None when there are no tables."""
    if not bounds:
        return None
    low, high = 0, np.iinfo(np.int32).max
    for scale, offset, rows in bounds:
        low = max(low, -(offset // scale))
        high = min(high, -(-((rows or 1) - offset) // scale))
    return low, max(high, low + 1)
