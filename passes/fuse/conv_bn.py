"""Fold BatchNormalization into the convolution before it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.fills import constant_or_fill, fill, is_uniform, store
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    attribute,
    cannot_replace,
    constant_tensor,
    drop_unused_constants,
    first_output,
    has_references,
    is_op,
    only_use,
    remove_node,
    replace_value,
    scopes,
    use_count,
)
from onnxopt.rewrite import Builder

_Array = np.ndarray[Any, Any]

_OLD = "before opset 7 the node may be in training mode"
_TRAINING = "the normalization is in training mode"
_PER_ELEMENT = "the normalization is per element (spatial=0)"
_REFERS = "an attribute refers to the function's caller"
_OTHER_GRAPH = "the convolution is in an outer graph"
_USED = "the convolution's output is used elsewhere, too"
_PARAMETERS = "a parameter of the normalization is not constant"
_WEIGHT = "the weight is not constant"
_SHARED = "the weight is used elsewhere, too"
_BIAS = "the bias is not constant"
_SHAPES = "weight, bias and normalization do not fit together"
_VARIANCE = "variance + epsilon is not positive"
_FILLED = "the weight is filled in with one number, and the fused weight would have to be stored"
_OVERFLOW = "the fused weight or bias does not fit into the element type"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseConvBatchNorm(GraphPass):
    """Fold BatchNormalization into the convolution before it.

    Takes Conv and ConvTranspose, grouped ones too, and Gemm, when weights and statistics are constant and only the
    normalization uses the output. New weights are computed in float64 and rounded once.
    """

    name: ClassVar[str] = "fuse-conv-bn"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per convolution that is followed by a BatchNormalization."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for node in scope.graph:
                conv = node.inputs[0].producer() if is_op(node, "BatchNormalization") and node.inputs[0] else None
                if conv is None or not is_op(conv, "Conv", "ConvTranspose", "Gemm"):
                    continue
                site = Site(self.name, scope.path, first_output(conv))
                fused = _fused(scope, conv, node)
                if isinstance(fused, str):
                    yield Refusal(site, fused)
                    continue
                apply = functools.partial(_fuse, scope, names, conv, node, fused)
                yield Edit(site, f"folded {node.name or first_output(node)} into {conv.op_type}", apply)


@dataclasses.dataclass(frozen=True, slots=True)
class _Fused:
    """The constants of the fused node."""

    weight: _Array
    bias: _Array


def _fused(scope: Scope, conv: ir.Node, norm: ir.Node) -> _Fused | str:
    """Return the fused weight and bias, or why there are none."""
    reason = _unfit(scope, conv, norm)
    if reason:
        return reason
    weight = constant_or_fill(conv.inputs[1])
    parameters = [constant_or_fill(v) for v in norm.inputs[1:5]]
    bias = constant_or_fill(conv.inputs[2]) if _has_bias(conv) else None
    if weight is None or any(p is None for p in parameters):
        return _PARAMETERS
    scale, shift, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
    spread = variance + attribute(norm, "epsilon", 1e-5)
    if not (spread > 0).all():
        return _VARIANCE
    factor = scale / np.sqrt(spread)
    before = _bias_before(conv, bias, factor.size)
    scaled = None if before is None else _scaled(conv, weight, factor)
    if scaled is None or before is None or not shift.shape == mean.shape == factor.shape:
        return _SHAPES
    if fill(conv.inputs[1]) is not None and not is_uniform(scaled):
        return _FILLED
    with np.errstate(over="ignore"):
        fused = _Fused(scaled.astype(weight.dtype), ((before - mean) * factor + shift).astype(weight.dtype))
    finite = all(np.isfinite(a.astype(np.float64)).all() for a in (fused.weight, fused.bias))
    return fused if finite else _OVERFLOW


def _unfit(scope: Scope, conv: ir.Node, norm: ir.Node) -> str | None:
    """Return why the two nodes cannot be fused, going by the graph alone."""
    if has_references(conv) or has_references(norm):
        return _REFERS
    if scope.opset < 7:
        return _OLD
    if scope.opset < 9 and not attribute(norm, "spatial", 1):
        return _PER_ELEMENT
    # Before opset 14 further outputs are what puts it into training mode.
    if attribute(norm, "training_mode", 0) or any(o.name for o in norm.outputs[1:]):
        return _TRAINING
    if conv.graph is not norm.graph:
        return _OTHER_GRAPH
    if only_use(conv.outputs[0]) is not norm:
        return _USED
    if len(norm.inputs) != 5 or any(_is_variable(v) for v in norm.inputs[1:]):
        return _PARAMETERS
    weight = conv.inputs[1] if len(conv.inputs) > 1 else None
    if weight is None or _is_variable(weight):
        return _WEIGHT
    if fill(weight) is None and (use_count(weight) != 1 or weight.is_graph_output()):
        return _SHARED
    if _has_bias(conv) and _is_variable(conv.inputs[2]):
        return _BIAS
    return cannot_replace(norm.outputs[0], conv.outputs[0])


def _is_variable(value: ir.Value | None) -> bool:
    return constant_tensor(value) is None and fill(value) is None


def _has_bias(conv: ir.Node) -> bool:
    return len(conv.inputs) > 2 and conv.inputs[2] is not None


def _bias_before(conv: ir.Node, bias: _Array | None, channels: int) -> _Array | None:
    """Return what the node adds per channel, or None when that is not one number per channel."""
    if bias is None:
        return np.zeros(channels)
    if is_op(conv, "Gemm"):
        # A bias of shape (1, channels), (1,) or () broadcasts; one per row does not fit.
        if bias.size not in (1, channels) or (bias.ndim and bias.shape[-1] not in (1, channels)):
            return None
        if bias.ndim == 2 and bias.shape[0] != 1:
            return None
        beta = attribute(conv, "beta", 1.0)
        return np.broadcast_to(bias.astype(np.float64).reshape(-1) * beta, (channels,))
    return bias.astype(np.float64) if bias.shape == (channels,) else None


def _scaled(conv: ir.Node, weight: _Array, factor: _Array) -> _Array | None:
    """Return the weight with every output channel multiplied by its factor, in float64."""
    if is_op(conv, "Gemm"):
        axis = 0 if attribute(conv, "transB", 0) else 1
        if weight.ndim != 2 or weight.shape[axis] != factor.size:
            return None
        return np.asarray(weight * np.expand_dims(factor, 1 - axis))
    if weight.ndim < 3:
        return None
    if is_op(conv, "Conv"):
        if weight.shape[0] != factor.size:
            return None
        return np.asarray(weight * factor.reshape(-1, *[1] * (weight.ndim - 1)))
    # ConvTranspose: (input channels, output channels of a group, ...); groups split the input channels.
    groups = attribute(conv, "group", 1)
    if weight.shape[0] % groups or weight.shape[1] * groups != factor.size:
        return None
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    scaled = grouped * factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return np.asarray(scaled).reshape(weight.shape)


def _fuse(scope: Scope, names: Any, conv: ir.Node, norm: ir.Node, fused: _Fused) -> None:
    unused = [*conv.inputs[1:], *norm.inputs[1:]]
    if fill(conv.inputs[1]) is None:
        weight = add_constant(scope, names(), f"{_name(conv.inputs[1], conv)}_bn", fused.weight, conv)
    else:
        weight = store(Builder(scope, names(), conv, first_output(conv)), "weight", fused.weight)
    base = conv.inputs[2] if _has_bias(conv) else norm.inputs[2]
    bias = add_constant(scope, names(), f"{_name(base, conv)}_bn", fused.bias, conv)
    if len(conv.inputs) < 3:
        conv.resize_inputs(3)
    conv.replace_input_with(1, weight)
    conv.replace_input_with(2, bias)
    if "beta" in conv.attributes:
        del conv.attributes["beta"]
    replace_value(norm.outputs[0], conv.outputs[0])
    remove_node(norm)
    drop_unused_constants(unused)


def _name(value: ir.Value | None, node: ir.Node) -> str:
    return (value.name if value is not None else None) or first_output(node)
