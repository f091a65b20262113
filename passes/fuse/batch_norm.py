"""What scales or shifts the channels behind a BatchNormalization becomes part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.fills import constant_or_fill, store
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, has_references, is_op, only_use
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

_Array = np.ndarray[Any, Any]

SPATIAL = 9
"""From this opset on, a BatchNormalization has one set of parameters per channel."""
TRAINING_ATTRIBUTE = 14
"""Before this opset, further outputs are what puts a BatchNormalization into training mode."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseBatchNorm(GraphPass):
    """Fuse multiplications and additions per channel into the BatchNormalization before them.

    Frameworks that keep statistics and scale in two layers leave them as BatchNormalization, Mul and Add.
    """

    name: ClassVar[str] = "fuse-batch-norm"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node behind a BatchNormalization."""
        yield from rewrite(self.name, model, ctx, dict.fromkeys(("Mul", "Div", "Add", "Sub"), (_rule,)))


def _rule(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    values = [v for v in node.inputs if v is not None]
    if len(values) != 2 or scope.opset < SPATIAL:
        return None
    index = next((i for i, v in enumerate(values) if is_op(v.producer(), "BatchNormalization")), None)
    if index is None:
        return None
    normalized, other = values[index], values[1 - index]
    norm = normalized.producer()
    if norm is None or norm.graph is not node.graph or has_references(norm) or only_use(normalized) is None:
        return None
    if attribute(norm, "training_mode", 0) or (scope.opset < TRAINING_ATTRIBUTE and len(norm.outputs) > 1):
        return Refused("the normalization is in training mode")
    constant = constant_or_fill(other)
    parameters = [constant_or_fill(v) for v in norm.inputs[1:3]]
    scale, shift = parameters if len(parameters) == 2 else (None, None)
    if constant is None or scale is None or shift is None or scale.shape != shift.shape:
        return None
    channels = _per_channel(constant, scale.size, ctx.shapes.rank(normalized))
    if channels is None:
        return Refused("the other operand is not one number per channel")
    changed = _changed(node.op_type, index, scale.astype(np.float64), shift.astype(np.float64), channels)
    if changed is None:
        return None
    with np.errstate(over="ignore"):
        new_scale, new_shift = (np.broadcast_to(c, scale.shape).astype(scale.dtype) for c in changed)
    if not (np.isfinite(new_scale.astype(np.float64)).all() and np.isfinite(new_shift.astype(np.float64)).all()):
        return Refused("the fused parameters do not fit into the element type")
    attributes = {name: a.value for name, a in norm.attributes.items()}

    def build(builder: Builder) -> ir.Value:
        scaled, shifted = store(builder, "scale", new_scale), store(builder, "bias", new_shift)
        return builder.op("BatchNormalization", [norm.inputs[0], scaled, shifted, *norm.inputs[3:5]], attributes)

    return Found(node.outputs[0], f"{node.op_type} into the BatchNormalization before it", build)


def _per_channel(constant: _Array, channels: int, rank: int | None) -> _Array | None:
    """Return one number for all channels or one for each, in float64, or None when the constant is neither."""
    if constant.dtype.kind != "f" or rank is None or rank < 2 or constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if shape[1] not in (1, channels) or any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    return constant.astype(np.float64).reshape(-1)


def _changed(op_type: str, index: int, scale: _Array, shift: _Array, channels: _Array) -> tuple[_Array, _Array] | None:
    """Return scale and shift with an operation done to scale * x + shift, which is operand `index` of it."""
    match op_type, index:
        case "Mul", _:
            return scale * channels, shift * channels
        case "Div", 0:
            return (scale / channels, shift / channels) if channels.all() else None
        case "Add", _:
            return scale, shift + channels
        case "Sub", 0:
            return scale, shift - channels
        case "Sub", _:
            return -scale, channels - shift
    return None
