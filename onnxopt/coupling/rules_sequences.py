"""How indexes go through sequences that are only taken apart again, as torch.split is exported."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.coupling.builder import Builder, Opaque
from onnxopt.coupling.rewrites import SetParts
from onnxopt.coupling.rules import Rule, operand
from onnxopt.graph import attribute, constant_ints, constant_tensor, is_op


def split_to_sequence(builder: Builder, node: ir.Node) -> None:
    """Each SequenceAt takes a part of one axis."""
    data = operand(node, 0)
    axis = attribute(node, "axis", 0) % len(builder.shape(data))
    whole = builder.known_ids(data, axis)
    bounds = _bounds(node, len(whole))
    members = _members(node, len(bounds) - 1)
    for member, place in members:
        part = member.outputs[0]
        builder.same(data, part, but=[axis])
        builder.link(builder.known_ids(part, axis), whole[bounds[place] : bounds[place + 1]])
    builder.followed.update(member for member, _ in members)
    builder.rewrites.append(SetParts(node, (data,), axis, bounds))


def _bounds(node: ir.Node, size: int) -> tuple[int, ...]:
    """Return where the parts begin, and where the last one ends."""
    given = operand(node, 1)
    tensor, sizes = constant_tensor(given), constant_ints(given)
    if tensor is None or not sizes or not attribute(node, "keepdims", 1):
        raise Opaque("the sizes of its parts are not in the file")
    listed = len(tensor.shape) == 1
    bounds: tuple[int, ...] = tuple(np.cumsum([0, *sizes]).tolist()) if listed else (*range(0, size, sizes[0]), size)
    if bounds[-1] != size:
        raise Opaque("its parts do not add up")
    return bounds


def _members(node: ir.Node, count: int) -> list[tuple[ir.Node, int]]:
    """Return the nodes that take the parts, each with the place of its part."""
    sequence, found = node.outputs[0], []
    for use in sequence.uses():
        place = constant_ints(use.node.inputs[1]) if is_op(use.node, "SequenceAt") else None
        if not place or not -count <= place[0] < count:
            raise Opaque("more is done with the sequence than to take its parts")
        found.append((use.node, place[0] % count))
    if sequence.is_graph_output():
        raise Opaque("more is done with the sequence than to take its parts")
    return found


RULES: Mapping[str, Rule] = {"SplitToSequence": split_to_sequence}
