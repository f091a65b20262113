"""Two linear operators one behind the other become one, where that one is smaller."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.linear import Array, Linear, affine, fits, per_channel, read
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, is_op, only_use
from onnxopt.numeric import deferred
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

_LARGER = "the two weights together are smaller than their product"
_SHARED = "a weight is used elsewhere, too"
_BIAS = "a bias is not one number per channel, or the new one would not fit into its type"
_PADDED = "the second convolution pads with zeros, where the first one adds a bias"
_SHAPED = "neither convolution is one of single pixels that fits the other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConsecutiveLinear(GraphPass):
    """Merge two MatMuls or Gemms, or a Conv and one of single pixels, with nothing but biases in between.

    The product of the weights is computed in float64. It must have fewer elements than the two have together, so that
    both the model and the work get less.
    """

    name: ClassVar[str] = "merge-consecutive-linear"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per pair."""
        yield from rewrite(self.name, model, ctx, {"MatMul": [_matrices], "Gemm": [_matrices], "Conv": [_convolutions]})


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    """Two operators, and what the first one adds per channel."""

    first: Linear
    second: Linear
    bias: Array


def _pair(node: ir.Node, scope: Scope, ctx: Context, *op_types: str) -> _Pair | str | None:
    """Return the operator in front of a node and the node, if both are linear."""
    source = node.inputs[0] if node.inputs else None
    before = _alone(source, node)
    if before is None:
        return None
    added = None
    if is_op(before, "Add"):
        added = affine(before, scope.opset)
        before = _alone(added.x, node) if added is not None else None
    if before is None or not is_op(before, *op_types):
        return None
    first, second = read(before, ctx.shapes), read(node, ctx.shapes)
    if not isinstance(first, Linear) or not isinstance(second, Linear) or first.dtype != second.dtype:
        return None
    if not first.owns_weight or not second.owns_weight:
        return _SHARED
    bias = first.bias_per_channel()
    if added is not None and added.shift is not None and bias is not None:
        shift = per_channel(added, added.shift, first.rank, first.axis, first.channels)
        bias = None if isinstance(shift, str) else bias + shift
    return _BIAS if bias is None else _Pair(first, second, bias)


def _alone(value: ir.Value | None, user: ir.Node) -> ir.Node | None:
    """Return what computes a value that is used once, in the same graph."""
    node = value.producer() if value is not None else None
    return node if node is not None and value is not None and only_use(value) and node.graph is user.graph else None


# Matrices -----------------------------------------------------------------------------------------------------


def _matrices(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    pair = _pair(node, scope, ctx, "MatMul", "Gemm")
    if pair is None or isinstance(pair, str):
        return Refused(pair) if pair else None
    first, second = pair.first, pair.second
    if first.channels != second.input_channels or attribute(node, "transA", 0):
        return None
    if first.input_channels * second.channels >= _size(first) + _size(second):
        return Refused(_LARGER)
    gemm = is_op(node, "Gemm") or is_op(first.node, "Gemm")
    if gemm and (first.rank != 2 or second.rank != 2):
        return None
    last = second.bias_per_channel()
    bias = None if last is None else pair.bias @ _matrix(second) + last
    if bias is None or not fits(bias, first.dtype):
        return Refused(_BIAS)
    shape = (first.input_channels, second.channels)
    dtype = first.dtype

    def build(builder: Builder) -> ir.Value:
        weight = deferred.tensor(
            lambda: (_matrix(first) @ _matrix(second)).astype(dtype.numpy()), dtype, shape, "product"
        )
        inputs = [first.node.inputs[0], builder.tensor("weight", weight)]
        added = builder.constant("bias", bias, dtype) if np.any(bias) else None
        if gemm:
            attributes = {"transA": attribute(first.node, "transA", 0)}
            return builder.op("Gemm", inputs if added is None else [*inputs, added], attributes)
        value = builder.op("MatMul", inputs)
        return value if added is None else builder.op("Add", [value, added])

    return Found(node.outputs[0], _summary(pair, shape), build)


def _matrix(linear: Linear) -> Array:
    """Return the weight as input channels x output channels, in float64, times alpha."""
    weight = linear.weight.numpy().astype(np.float64)
    if not is_op(linear.node, "Gemm"):
        return weight
    turned = weight.T if attribute(linear.node, "transB", 0) else weight
    return np.asarray(turned * attribute(linear.node, "alpha", 1.0))


def _size(linear: Linear) -> int:
    return math.prod(linear.weight.shape.numpy())


def _summary(pair: _Pair, shape: Sequence[int]) -> str:
    return f"{pair.first.node.op_type} and {pair.second.node.op_type} to one with {'x'.join(map(str, shape))} weights"


# Convolutions -------------------------------------------------------------------------------------------------


def _convolutions(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    pair = _pair(node, scope, ctx, "Conv")
    if pair is None or isinstance(pair, str):
        return Refused(pair) if pair else None
    first, second = pair.first, pair.second
    if any(attribute(c.node, "group", 1) != 1 for c in (first, second)):
        return None
    attributes = _attributes(pair)
    if isinstance(attributes, str):
        return Refused(attributes)
    before, after = (c.weight.shape.numpy() for c in (first, second))
    shape = (after[0], before[1], *(a * b for a, b in zip(before[2:], after[2:], strict=True)))
    if math.prod(shape) >= _size(first) + _size(second):
        return Refused(_LARGER)
    last = second.bias_per_channel()
    bias = None if last is None else second.summed_over_input(pair.bias) + last
    if bias is None or not fits(bias, first.dtype):
        return Refused(_BIAS)
    dtype = first.dtype

    def build(builder: Builder) -> ir.Value:
        weight = deferred.tensor(lambda: _kernel(first, second).astype(dtype.numpy()), dtype, shape, "product")
        inputs = [first.node.inputs[0], builder.tensor("weight", weight)]
        if np.any(bias):
            inputs.append(builder.constant("bias", bias, dtype))
        return builder.op("Conv", inputs, attributes)

    return Found(node.outputs[0], _summary(pair, shape), build)


def _kernel(first: Linear, second: Linear) -> Array:
    """Return the weight of both convolutions together; one of them has a kernel of one pixel."""
    one, two = (c.weight.numpy().astype(np.float64) for c in (first, second))
    if math.prod(two.shape[2:]) == 1:
        return np.asarray(np.tensordot(two.reshape(two.shape[:2]), one, axes=(1, 0)))
    return np.moveaxis(np.tensordot(two, one.reshape(one.shape[:2]), axes=(1, 0)), -1, 1)


def _attributes(pair: _Pair) -> dict[str, Any] | str:
    """Return the attributes of the convolution that does what both do, or why there is none."""
    first, second = pair.first, pair.second
    axes = first.rank - 2
    ones = (1,) * axes
    if tuple(second.weight.shape.numpy()[2:]) == ones and not second.pads:
        steps = tuple(attribute(second.node, "strides", ones))
        if steps != ones and attribute(first.node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return "how the first convolution pads depends on how far it steps"
        own = attribute(first.node, "strides", ones)
        return _copied(first) | {"strides": [a * b for a, b in zip(own, steps, strict=True)]}
    if tuple(first.weight.shape.numpy()[2:]) == ones and not first.pads:
        if tuple(attribute(first.node, "strides", ones)) != ones:
            return _SHAPED
        if second.pads and np.any(pair.bias):
            return _PADDED
        return _copied(second)
    return _SHAPED


def _copied(linear: Linear) -> dict[str, Any]:
    given = {name: a.value for name, a in linear.node.attributes.items()}
    return given | {"kernel_shape": list(linear.weight.shape.numpy()[2:])}
