"""InstanceNorm that is spelled out becomes its operator, and takes in scales, shifts and reshapes around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.algebra import is_product_root, monomial
from onnxopt.analysis.channels import ChannelMap
from onnxopt.analysis.channels import read as read_channels
from onnxopt.analysis.linear import fits
from onnxopt.analysis.normalization import Norm, read
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, constant_array, has_references, is_op, only_use
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

_Array = np.ndarray[Any, Any]

INSTANCE_NORMALIZATION_OPSET = 6
LAYER_NORMALIZATION_OPSET = 17
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""What ONNX Runtime has a kernel for; it computes float16 in float32."""

_OVERFLOW = "the fused scale or bias does not fit into the element type"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseInstanceNorm(GraphPass):
    """Fuse a normalization of each channel over all its positions into InstanceNormalization.

    Spelled out, it is read like layer normalization (`analysis/normalization.py`). Constants per channel behind the
    operator go into its scale and bias, and Reshapes around it that only flatten positions go. Where the normalized
    axis might as well be the last one of a layer normalization, it is left for `fuse-normalization`.

    Ulyanov, Vedaldi and Lempitsky 2016, https://arxiv.org/abs/1607.08022.
    """

    name: ClassVar[str] = "fuse-instance-norm"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per normalization, or per Reshape or constant that an operator takes in."""
        rules = {"Mul": [_spelled], "Div": [_spelled], "Reshape": [_reshaped], "InstanceNormalization": [_followed]}
        yield from rewrite(self.name, model, ctx, rules)


@dataclasses.dataclass(frozen=True, slots=True)
class _Parts:
    """What the product holds besides the normalization: one number per channel, and what is no such constant."""

    scale: _Array
    others: tuple[tuple[ir.Value, float], ...]


def _spelled(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    if not is_product_root(node) or scope.opset < INSTANCE_NORMALIZATION_OPSET:
        return None
    product = monomial(node.outputs[0], ctx.shapes)
    norm = read(product, ctx.shapes)
    if norm is None or isinstance(norm, str) or not norm.centred or norm.axes != len(norm.shape) - 2:
        return None  # whatever the reason, fuse-normalization gives it
    if any(e == 1 and ctx.shapes.same_shape(v, norm.normalized) for v, e in norm.rest):
        return None
    channels, dtype = norm.shape[1], ctx.shapes.dtype(norm.x)
    parts = _parts(norm, product.coefficient)
    if parts is None:
        return Refused("another factor is raised to a power")
    if _is_layer_norm(node, norm, parts, scope):
        return None
    if dtype not in DTYPES:
        return Refused("ONNX Runtime has no InstanceNormalization of this element type")
    if not isinstance(channels, int):
        return Refused("the number of channels is not known")
    behind = ChannelMap(node.outputs[0], np.ones(1), np.zeros(channels), 0)
    if not parts.others:
        behind = read_channels(node.outputs[0], scope, len(norm.shape), channels)
    scale, shift = np.broadcast_to(parts.scale * behind.scale, (channels,)), behind.shift
    if not (fits(scale, dtype) and fits(shift, dtype)):
        return Refused(_OVERFLOW)

    def build(builder: Builder) -> ir.Value:
        value = _operator(builder, norm.x, scale, shift, norm.epsilon, dtype)
        return builder.times(value, parts.others)

    return Found(behind.end, f"InstanceNorm of {norm.x.name}", build)


def _parts(norm: Norm, coefficient: float) -> _Parts | None:
    """Collect the constants per channel among the factors."""
    scale = np.array([coefficient * norm.factor])
    others: list[tuple[ir.Value, float]] = []
    for value, exponent in norm.rest:
        if exponent not in (1, -1):
            return None
        numbers = _per_channel(value, norm)
        if numbers is None or (exponent == -1 and not numbers.all()):
            others.append((value, exponent))
        else:
            scale = scale * numbers**exponent
    return _Parts(scale, tuple(others))


def _per_channel(value: ir.Value, norm: Norm) -> _Array | None:
    array, rank, channels = constant_array(value, max_bytes=1 << 20), len(norm.shape), norm.shape[1]
    if array is None or array.dtype.kind != "f" or array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if shape[1] != channels or array.size != channels:
        return None
    return array.astype(np.float64).reshape(-1)


def _is_layer_norm(node: ir.Node, norm: Norm, parts: _Parts, scope: Scope) -> bool:
    """Whether one normalized axis, without a scale per channel, is better called the last axis than all positions.

    It is not between two Reshapes, which is where group normalization has it.
    """
    if norm.axes > 1 or parts.scale.size > 1 or scope.opset < LAYER_NORMALIZATION_OPSET:
        return False
    return not (is_op(norm.x.producer(), "Reshape") and is_op(only_use(node.outputs[0]), "Reshape"))


def _operator(
    builder: Builder, x: ir.Value, scale: _Array, shift: _Array, epsilon: float, dtype: ir.DataType | None
) -> ir.Value:
    constants = [builder.constant("scale", scale, dtype), builder.constant("bias", shift, dtype)]
    return builder.op("InstanceNormalization", [x, *constants], {"epsilon": epsilon})


def _followed(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Take scales and shifts behind the operator in."""
    parameters = _parameters(node, scope)
    rank = ctx.shapes.rank(node.outputs[0])
    if parameters is None or rank is None:
        return None
    scale, shift = parameters
    behind = read_channels(node.outputs[0], scope, rank, scale.size)
    if not behind.nodes:
        return None
    dtype = ctx.shapes.dtype(node.outputs[0])
    scale, shift = scale * behind.scale, shift * behind.scale + behind.shift
    if dtype is None or not (fits(scale, dtype) and fits(shift, dtype)):
        return Refused(_OVERFLOW)
    x, epsilon = node.inputs[0], attribute(node, "epsilon", 1e-5)
    assert x is not None

    def build(builder: Builder) -> ir.Value:
        return _operator(builder, x, scale, shift, epsilon, dtype)

    return Found(behind.end, "scale and shift into the InstanceNormalization before them", build)


def _parameters(node: ir.Node, scope: Scope) -> tuple[_Array, _Array] | None:
    """Return scale and bias in float64 when both are constant."""
    if scope.opset < INSTANCE_NORMALIZATION_OPSET or has_references(node) or len(node.inputs) != 3:
        return None
    scale, bias = (constant_array(v) for v in node.inputs[1:])
    if node.inputs[0] is None or scale is None or bias is None or scale.shape != bias.shape:
        return None
    return scale.astype(np.float64), bias.astype(np.float64)


def _reshaped(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Drop Reshapes around the operator that only flatten positions."""
    norm = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if not is_op(norm, "InstanceNormalization") or norm is None or has_references(norm):
        return None
    before = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if scope.opset < INSTANCE_NORMALIZATION_OPSET or norm.graph is not node.graph or only_use(norm.outputs[0]) is None:
        return None
    if before is None or not is_op(before, "Reshape") or before.inputs[0] is None:
        return None
    x = before.inputs[0]
    if not _keeps_channels(x, norm.inputs[0], ctx.shapes) or not ctx.shapes.same_shape(x, node.outputs[0]):
        return None
    attributes = {name: a.value for name, a in norm.attributes.items()}

    def build(builder: Builder) -> ir.Value:
        return builder.op("InstanceNormalization", [x, *norm.inputs[1:]], attributes)

    return Found(node.outputs[0], "InstanceNormalization without the Reshapes around it", build)


def _keeps_channels(x: ir.Value, reshaped: ir.Value | None, shapes: Shapes) -> bool:
    before, after = shapes.of(x), shapes.of(reshaped) if reshaped is not None else None
    if before is None or after is None or len(before) < 3 or len(after) < 3:
        return False
    return before[:2] == after[:2]
