"""Group normalization is written in the form that ONNX Runtime executes fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import kernels
from onnxopt.analysis.channels import read as read_channels
from onnxopt.analysis.dims import exact_div, product
from onnxopt.analysis.layout import target_constant
from onnxopt.analysis.linear import fits
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, constant_array, is_op
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

_Array = np.ndarray[Any, Any]

SPATIAL = 9
"""From this opset on, a BatchNormalization has one set of parameters per channel."""
PER_CHANNEL = 21
"""From this opset on, GroupNormalization has a scale and a bias per channel, before that per group."""
CPU = "CPUExecutionProvider"
EPSILON = 1e-5
UNIT_VARIANCE = np.float32(1) - np.float32(EPSILON)
"""With EPSILON added this is 1 in float32, so that BatchNormalization only scales and shifts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseGroupNorm(GraphPass):
    """Write group normalization as Reshape, InstanceNormalization, Reshape and BatchNormalization.

    Exporters write all but the last, which is a Mul and an Add per channel. A BatchNormalization of mean 0 and
    variance 1 does both in one go. The operator GroupNormalization is a function that the runtime expands into 29
    nodes on CPU, so it is never written, and replaced for "cpu" (`analysis/kernels.py` has the figure).

    Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """

    name: ClassVar[str] = "fuse-group-norm"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per group normalization."""
        yield from rewrite(self.name, model, ctx, {"Reshape": [_written], "GroupNormalization": [_operator]})


def _written(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Make the Mul and the Add behind a normalization of groups one node."""
    shape = _ungrouped(node, ctx.shapes)
    if shape is None or not isinstance(shape[1], int):
        return None
    behind = read_channels(node.outputs[0], scope, len(shape), shape[1])
    if behind.nodes < 2:
        return Refused(_not_emitted(scope)) if scope.opset >= PER_CHANNEL else None
    if reason := _no_affine(node.outputs[0], scope, ctx):
        return Refused(reason)
    scale, shift = behind.scale, behind.shift
    if not (fits(scale, ir.DataType.FLOAT) and fits(shift, ir.DataType.FLOAT)):
        return Refused("the fused scale or shift does not fit into the element type")
    summary = f"scale and shift of the group normalization of {shape[1]} channels in one node"
    return Found(behind.end, summary, lambda builder: _affine(builder, node.outputs[0], scale, shift))


def _ungrouped(node: ir.Node, shapes: Shapes) -> tuple[Any, ...] | None:
    """Return the shape of x when the node undoes the Reshape in Reshape(InstanceNormalization(Reshape(x)))."""
    norm = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if norm is None or not is_op(norm, "InstanceNormalization") or norm.inputs[0] is None:
        return None
    before = norm.inputs[0].producer()
    if before is None or not is_op(before, "Reshape") or before.inputs[0] is None:
        return None
    shape, grouped = shapes.of(before.inputs[0]), shapes.of(norm.inputs[0])
    if shape is None or grouped is None or len(shape) < 3 or not shapes.same_shape(shape, node.outputs[0]):
        return None
    return shape if grouped[0] == shape[0] and grouped[1] != shape[1] else None


def _not_emitted(scope: Scope) -> str:
    slower = kernels.ratio("GroupNormalization", CPU)
    return f"GroupNormalization would be one node, but ONNX Runtime takes {slower} times as long for it on CPU"


def _no_affine(value: ir.Value, scope: Scope, ctx: Context) -> str | None:
    """Return why a BatchNormalization is not written behind a value, or None."""
    if scope.opset < SPATIAL:
        return f"a BatchNormalization per channel needs opset {SPATIAL}; raise it with --opset"
    if ctx.target == "cuda":
        return "whether BatchNormalization is faster than Mul and Add on CUDA was not measured"
    if ctx.shapes.dtype(value) != ir.DataType.FLOAT:
        return "the numbers are not float32"
    return None


def _affine(builder: Builder, value: ir.Value, scale: _Array, shift: _Array) -> ir.Value:
    channels = scale.size
    parameters = {
        "scale": scale.astype(np.float32),
        "shift": shift.astype(np.float32),
        "mean": np.zeros(channels, np.float32),
        "variance": np.full(channels, UNIT_VARIANCE, np.float32),
    }
    constants = [builder.constant(name, array) for name, array in parameters.items()]
    return builder.op("BatchNormalization", [value, *constants], {"epsilon": EPSILON})


def _operator(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Replace the operator."""
    if ctx.target != "cpu":
        return Refused("ONNX Runtime expands GroupNormalization into 29 nodes on CPU; --target cpu writes 4 or 5")
    x = node.inputs[0]
    shape = ctx.shapes.of(x) if x is not None else None
    groups = attribute(node, "num_groups")
    scale, bias = (constant_array(v) for v in node.inputs[1:3])
    if x is None or shape is None or len(shape) < 3 or not isinstance(shape[1], int):
        return Refused("the number of axes or of channels is not known")
    if ctx.shapes.dtype(x) != ir.DataType.FLOAT or attribute(node, "stash_type", 1) != 1:
        return Refused("the numbers are not float32")
    if scale is None or bias is None:
        return Refused("its scale or bias is computed")
    positions = product(shape[1:])
    # The runtime, too, starts with a Reshape to [0, groups, -1], which it refuses for empty tensors.
    back = target_constant((shape[0], groups, exact_div(positions, groups) or positions), shape, inferred=True)
    per_channel = scope.opset >= PER_CHANNEL
    epsilon = attribute(node, "epsilon", 1e-5)

    def build(builder: Builder) -> ir.Value:
        target = builder.op("Shape", [x]) if back is None else builder.ints("shape", back)
        grouped = builder.op("Reshape", [x, builder.ints("groups", [0, groups, -1])])
        inner = (np.ones(groups), np.zeros(groups)) if per_channel else (scale, bias)
        constants = [builder.constant(n, a, ir.DataType.FLOAT) for n, a in zip(("ones", "zeros"), inner, strict=True)]
        value = builder.op("InstanceNormalization", [grouped, *constants], {"epsilon": epsilon})
        value = builder.op("Reshape", [value, target])
        if not per_channel or (np.all(scale == 1) and not np.any(bias)):
            return value
        return _affine(builder, value, scale, bias)

    return Found(node.outputs[0], f"GroupNormalization of {groups} groups in nodes that run faster", build)
