"""What the layers of a changed model should compute, read off the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.products import CONTRIB
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, Refusal
from onnxopt.graph import constant_tensor, is_op, only_use
from onnxopt.repair.fit import Target, repair

Kept = Mapping[str, Mapping[int, np.ndarray]]
"""Name of a value -> its shorter axes -> the original indexes that are still there."""
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FUSED = ("FusedConv", "FusedGemm", "FusedMatMul")


def repair_all(
    pass_name: str, original: ir.Model, model: ir.Model, ctx: Context, kept: Kept
) -> Iterator[Edit | Refusal]:
    """Yield the repair of every layer that a removal of channels may have harmed; see `repair`.

    Args:
        pass_name: The pass that the sites belong to.
        original: The model as it was.
        model: The model as it is now.
        ctx: With data to run both on.
        kept: Which channels are left.
    """
    shapes = Shapes(model)
    wanted = list(targets(model, shapes, kept))
    yield from repair(pass_name, original, model, wanted, dataclasses.replace(ctx, shapes=shapes))


def targets(
    model: ir.Model, shapes: Shapes, kept: Kept | None = None, stands_for: Mapping[str, str] | None = None
) -> Iterator[Target]:
    """Yield a target for each layer of the main graph with a constant weight.

    A layer whose output goes into a sum, such as a residual, is to make the sum right, and with it what the other
    parts of it lack. Where several layers go into a sum, that is the task of the last one.

    Args:
        model: The changed model; values that are left of the original have their names.
        shapes: What is known about its shapes.
        kept: Which channels are left of values that have fewer than in the original.
        stands_for: Name of a value -> the value of the original whose part it plays, where it is another one.
    """
    kept, stands_for = kept or {}, stands_for or {}
    layers = [node for node in model.graph if _is_layer(node) and _has_weight(node)]
    last = {total: node for node in layers if (total := _sum(node, shapes)) is not None}
    summing = {node: total for total, node in last.items()}
    for node in layers:
        output = node.outputs[0]
        value = summing.get(node, output)
        rank = shapes.rank(value)
        axis = 1 if node.op_type.endswith(_CONVOLUTIONS) else -1 if rank is None else rank - 1
        shorter = dict(kept.get(value.name or "", {}))
        indexes = shorter.pop(axis, None)
        if not shorter:
            yield Target(
                layer=output.name or "",
                value=stands_for.get(value.name or "", value.name or ""),
                kept=None if indexes is None else tuple(int(i) for i in indexes),
                through=None if value is output else value.name,
            )


def _is_layer(node: ir.Node) -> bool:
    return is_op(node, *_CONVOLUTIONS, "Gemm", "MatMul") or is_op(node, *_FUSED, domain=CONTRIB)


def _has_weight(node: ir.Node) -> bool:
    return len(node.inputs) > 1 and constant_tensor(node.inputs[1]) is not None


def _sum(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Return the sum with another activation that the output of a layer goes into, and nowhere else."""
    value = node.outputs[0]
    while (user := only_use(value)) is not None and is_op(user, "Add") and user.graph is node.graph:
        other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
        if not shapes.same_shape(user.outputs[0], value):
            return None
        value = user.outputs[0]
        if constant_tensor(other) is None:
            return value
    return None
