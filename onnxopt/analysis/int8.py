"""What ONNX Runtime's CPU provider computes with 8-bit integers when Q/DQ pairs surround it, and what shares a grid.

QuantizeLinear and DequantizeLinear around a node are merged into it when all of its inputs come from
DequantizeLinear and its output goes to nothing but QuantizeLinear. Which operators that holds for, and where it
pays, was measured with ONNX Runtime 1.32; tests/passes/test_quantize_static.py holds the former.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import dtype_name
from onnxopt.contract import Target
from onnxopt.graph import (
    Scope,
    attribute,
    constant_array,
    constant_ints,
    constant_scalar,
    constant_tensor,
    has_references,
    is_op,
    only_use,
    use_count,
)

LAYERS = ("Conv", "Gemm")
"""Operators with a weight that have a faster 8-bit kernel. MatMul is faster with ranges found while it runs."""
PASSING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "Split")
"""Operators that only hand elements on."""
UNARY = ("GlobalAveragePool", "Sigmoid", "LeakyRelu")
BINARY = ("Add", "Mul")
CHANNELS = 3
"""From this rank on, values have channels along their second axis, and places along others."""
POOLS_INTEGERS = 12
"""From this opset on, MaxPool takes integers."""
RESIZES = 11
"""From this opset on, Resize says how it maps places."""
MOVED_THROUGH = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "MaxPool", "Identity")
"""Operators behind which ONNX Runtime finds a QuantizeLinear, which it then puts in front of them."""
FUSED = ("FusedConv", "NhwcFusedConv")
"""Convolutions of com.microsoft that have no 8-bit kernel."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A Conv or Gemm with a constant weight.

    Attributes:
        node: The node.
        weight: Its weight's value.
        channel_axis: The axis of the weight whose indices make the output channels.
        bias: The bias' value, or None.
        source: What the layer is applied to.
        result: What it computes, with the activation that rounding to its grid includes.
    """

    node: ir.Node
    weight: ir.Value
    channel_axis: int
    bias: ir.Value | None
    source: ir.Value
    result: ir.Value


@dataclasses.dataclass(frozen=True, slots=True)
class Between:
    """A node between layers that has an 8-bit kernel.

    Attributes:
        node: The node.
        sources: The inputs that hold activations, as (index, value).
        results: Its outputs, with the activation that rounding to their grid includes.
        tied: Whether sources and results must have the same grid.
        factor: Of a Mul by a positive number: its result is what the integers of its source stand for on a grid that is
            this much coarser. None for any other node.
    """

    node: ir.Node
    sources: tuple[tuple[int, ir.Value], ...]
    results: tuple[ir.Value, ...]
    tied: bool
    factor: float | None = None

    @property
    def source(self) -> ir.Value:
        """The first of its sources that is no constant, or the first."""
        return next((v for _, v in self.sources if constant_tensor(v) is None), self.sources[0][1])


def activated(value: ir.Value) -> ir.Value:
    """Return the output of the Relu, or Clip from 0, behind a value, else the value itself.

    Rounding to a uint8 grid that starts at 0 and ends at the largest value seen does what these do.
    """
    use = only_use(value)
    if use is None or use.graph is not value.graph or has_references(use):
        return value
    bounds = _bounds(use)
    return use.outputs[0] if bounds is not None and bounds[0] == 0.0 else value


def _bounds(node: ir.Node | None) -> tuple[float, float] | None:
    """Return what a Relu or a Clip bounds its input by, or None where that is not known."""
    if node is None or not is_op(node, "Relu", "Clip"):
        return None
    found = [0.0 if node.op_type == "Relu" else -math.inf, math.inf]
    for i, name in enumerate(("min", "max")):
        given = node.inputs[i + 1] if len(node.inputs) > i + 1 else None
        bound = attribute(node, name, None) if given is None else constant_scalar(given)
        if bound is not None:
            found[i] = bound
        elif given is not None:
            return None
    return found[0], found[1]


def leaves_float_weight(value: ir.Value) -> bool:
    """Whether a layer that stays in floating point makes a value, perhaps through activations and what moves elements.

    Where ONNX Runtime finds such a layer between DequantizeLinear and QuantizeLinear, it rounds its weight to int8
    while it loads the model, with one scale for all channels.
    """
    node = value.producer()
    while is_op(node, "Relu", "Clip", *MOVED_THROUGH):
        assert node is not None and node.inputs[0] is not None, "they have an input"
        node = node.inputs[0].producer()
    return (
        node is not None
        and is_op(node, "Conv", "ConvTranspose", "Gemm")
        and constant_tensor(node.inputs[1]) is not None
    )


def layer(node: ir.Node, scope: Scope, shapes: Shapes) -> Layer | str | None:
    """Return a node as a layer, why it is left alone although it looks like one, or None where it is none."""
    if node.domain == "com.microsoft" and node.op_type in FUSED:
        return "it is fused with what follows, and cannot be taken apart"
    if is_op(node, "ConvTranspose"):
        return "ONNX Runtime has no 8-bit kernel for ConvTranspose"
    if not is_op(node, *LAYERS) or has_references(node):
        return None
    source, weight = node.inputs[:2]
    if source is None or weight is None:
        return None
    reason = _unfit(node, scope, weight, shapes.dtype(source))
    if reason is not None:
        return reason
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    channels = 0 if is_op(node, "Conv") or attribute(node, "transB", 0) else 1
    return Layer(node, weight, channels, bias, source, activated(node.outputs[0]))


def _unfit(node: ir.Node, scope: Scope, weight: ir.Value, dtype: ir.DataType | None) -> str | None:
    if scope.path:
        return "it lies in the body of a node or in a function, whose values are not seen on the calibration data"
    tensor = constant_tensor(weight)
    if tensor is None:
        if weight.is_initializer():
            return "its weight is also an input of the graph, so the caller can override it"
        return "its weight is computed while the model runs"
    if tensor.dtype != ir.DataType.FLOAT or dtype != ir.DataType.FLOAT:
        return f"8-bit kernels stand for float32, and this computes with {dtype_name(tensor.dtype)}"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_tensor(bias) is None:
        return "its bias is not constant"
    if is_op(node, "Gemm") and not _is_plain(node):
        return "there is an 8-bit kernel for Gemm only with transA 0, alpha 1 and beta 1"
    return None


def _is_plain(node: ir.Node) -> bool:
    return (attribute(node, "transA", 0), attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) == (0, 1.0, 1.0)


def between(node: ir.Node, scope: Scope, shapes: Shapes, target: Target) -> Between | None:
    """Return a node of the main graph as one that can be computed between layers, or None."""
    if has_references(node) or not node.inputs or node.domain not in ("", "ai.onnx"):
        return None
    several = is_op(node, *BINARY, "Concat")
    given = node.inputs if several else node.inputs[:1]
    sources = tuple((i, v) for i, v in enumerate(given) if v is not None)
    if len(sources) != len(given) or any(shapes.dtype(v) != ir.DataType.FLOAT for _, v in sources):
        return None
    if any(not use_count(v) or v.is_graph_output() for v in node.outputs):
        return None
    outputs = tuple(node.outputs)
    if is_op(node, *PASSING) or _keeps_elements(node, scope, shapes, target):
        return Between(node, sources, outputs, tied=True)
    results = tuple(activated(v) for v in outputs)
    if is_op(node, "Concat"):
        # Equal grids make it a mere copy, but an activation behind it must have a grid of its own.
        return Between(node, sources, results, tied=results == outputs)
    factor = _factor(node, shapes) if results == outputs else None
    if factor is not None:
        return Between(node, sources, results, tied=False, factor=factor)
    known = (
        is_op(node, *BINARY, *UNARY) or is_global_average(node, shapes) or averaged_channels(node, shapes) is not None
    )
    return Between(node, sources, results, tied=False) if known else None


def _factor(node: ir.Node, shapes: Shapes) -> float | None:
    """Return the positive number that a Mul multiplies an activation by, or None for any other node."""
    if not is_op(node, "Mul"):
        return None
    for constant, other in (node.inputs, node.inputs[::-1]):
        number, tensor = constant_scalar(constant), constant_tensor(constant)
        if number is None or tensor is None or other is None or constant_tensor(other) is not None:
            continue
        if math.isfinite(number) and number > 0 and len(tensor.shape) <= (shapes.rank(other) or 0):
            return number
    return None


def _keeps_elements(node: ir.Node, scope: Scope, shapes: Shapes, target: Target) -> bool:
    """Whether the outputs lie within the range of the input, and the 8-bit kernel needs them on its grid."""
    if is_op(node, "MaxPool"):
        if len(node.outputs) > 1:
            return False
        source = node.inputs[0]
        known = source is not None and target == "cpu" and shapes.rank(source) == 4
        return scope.opset >= POOLS_INTEGERS or known
    return is_op(node, "Resize") and attribute(node, "mode", "nearest") == "nearest"


def repeated(node: ir.Node, scope: Scope, shapes: Shapes) -> dict[int, int]:
    """Return how often a Resize repeats elements along which axes; nothing where it does not do just that."""
    if not is_op(node, "Resize") or scope.opset < RESIZES or attribute(node, "mode", "nearest") != "nearest":
        return {}
    way = attribute(node, "coordinate_transformation_mode", "half_pixel")
    rounding = attribute(node, "nearest_mode", "round_prefer_floor")
    # With a whole factor, i / factor is rounded down, or (i + 1/2) / factor - 1/2, which is never halfway, to nearest.
    plain = (way, rounding) == ("asymmetric", "floor")
    if not plain and not (way in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round")):
        return {}
    scales = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    rank = shapes.rank(node.inputs[0]) if node.inputs[0] is not None else None
    if scales is None or rank is None or rank < CHANNELS or not scales.size:
        return {}
    if not (scales == np.rint(scales)).all() or scales.min() < 1:
        return {}
    axes = attribute(node, "axes", None) or range(rank)
    return {axis % rank: int(often) for axis, often in zip(axes, scales, strict=True) if often > 1}


def is_global_average(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a ReduceMean does what GlobalAveragePool does, which unlike it has an 8-bit kernel."""
    if not is_op(node, "ReduceMean") or node.inputs[0] is None or not attribute(node, "keepdims", 1):
        return False
    axes = attribute(node, "axes", None) or (constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None)
    rank = shapes.rank(node.inputs[0])
    if not axes or rank is None or rank < 3:
        return False
    return sorted(a % rank for a in axes) == list(range(2, rank))


def averaged_channels(node: ir.Node, shapes: Shapes) -> int | None:
    """Return how many channels an AveragePool has whose outputs are all means of equally many elements, or None.

    Such a one is a depthwise convolution with equal weights. The 8-bit kernel of AveragePool itself takes 3 to 5 times
    as long as the one in floating point.
    """
    if not is_op(node, "AveragePool") or node.inputs[0] is None or has_references(node):
        return None
    shape = shapes.of(node.inputs[0])
    padded = any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    uneven = padded and not attribute(node, "count_include_pad", 0)
    dilated = any(d != 1 for d in attribute(node, "dilations", ()))
    if shape is None or uneven or dilated or attribute(node, "ceil_mode", 0):
        return None
    return shape[1] if isinstance(shape[1], int) else None


class Ties:
    """Which values share a grid: sets that are merged, each known by one of its values."""

    def __init__(self, nodes: Iterable[Between]) -> None:
        """Merge what nodes hand on, and the parts of a Concat unless only some have an activation in front.

        An activation is included in rounding only to a grid that starts where it does.
        """
        self._parents: dict[ir.Value, ir.Value] = {}
        self._bounds: dict[ir.Value, tuple[float, float] | None] = {}
        for found in nodes:
            if not found.tied:
                continue
            values = [*(v for _, v in found.sources), *found.results]
            first = values[0]
            if is_op(found.node, "Concat") and len({self._activation(v) for _, v in found.sources}) > 1:
                continue
            for other in values[1:]:
                self._merge(first, other)

    def of(self, value: ir.Value) -> ir.Value:
        """Return the value that stands for all those with the same grid."""
        while value in self._parents:
            value = self._parents[value]
        return value

    def alone(self, value: ir.Value) -> bool:
        """Return whether no other value shares the grid of this one."""
        return value not in self._parents and value not in self._parents.values()

    def _merge(self, a: ir.Value, b: ir.Value) -> None:
        a, b = self.of(a), self.of(b)
        if a is not b:
            self._parents[b] = a

    def _activation(self, value: ir.Value) -> tuple[float, float] | None:
        """Return the bounds that a Relu or Clip puts on the values of a set, or None."""
        root = self.of(value)
        if root not in self._bounds:
            self._bounds[root] = _bounds(root.producer())
        return self._bounds[root]


def worthwhile(nodes: Sequence[Between], is_integer: Callable[[ir.Value], bool]) -> list[Between]:
    """Return the nodes on a way from one integer value to another, through such nodes alone.

    Between layers that stay in floating point there is nothing to gain, and rounding would only cost accuracy.

    Args:
        nodes: In graph order.
        is_integer: Whether a value is rounded to 8 bits anyway.
    """
    makers = {r: n for n in nodes for r in n.results}
    chosen = set(range(len(nodes)))
    index = {id(n): i for i, n in enumerate(nodes)}
    users: dict[ir.Value, list[int]] = {}
    for i, found in enumerate(nodes):
        for _, source in found.sources:
            users.setdefault(source, []).append(i)

    def fed(found: Between) -> bool:
        return any(is_integer(v) or (v in makers and index[id(makers[v])] in chosen) for _, v in found.sources)

    def used(found: Between) -> bool:
        return any(is_integer(v) or any(u in chosen for u in users.get(v, ())) for v in found.results)

    while True:
        # In both directions, so that chains take few rounds.
        before = len(chosen)
        for i in range(len(nodes)):
            if i in chosen and not fed(nodes[i]):
                chosen.discard(i)
        for i in reversed(range(len(nodes))):
            if i in chosen and not used(nodes[i]):
                chosen.discard(i)
        if len(chosen) == before:
            return [nodes[i] for i in sorted(chosen)]
