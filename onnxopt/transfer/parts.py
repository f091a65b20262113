"""Layers whose channels are split afterwards, such as query, key and value in one: each part is a layer of its own."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.graph import attribute, constant_ints, constant_scalar, is_op
from onnxopt.transfer.layers import Layer
from onnxopt.transfer.tensors import constant_slice, constant_split, is_same
from onnxopt.transfer.trace import Tracer

Ranges = dict[ir.Value, tuple[int, int]]


class PartFinder:
    """Finds into what the channels of layers are split."""

    def __init__(self, tracer: Tracer) -> None:
        """Take what is known about shapes."""
        self._tracer = tracer

    def ranges(self, value: ir.Value, layer: Layer) -> Ranges:
        """Return value -> its channels (start, stop), for all uses of a layer's output; empty when some take it whole.

        The channels are followed through the reshape into heads and through transposes.
        """
        shapes = self._tracer.shapes
        assert layer.weight is not None
        width, rank = layer.weight.shape[1], shapes.rank(value)
        axis, inner = (rank or 0) - 1, 1
        while rank:
            users = [use.node for use in value.uses()]
            if value.is_graph_output() or not users:
                return {}
            if len(users) > 1 or is_op(users[0], "Split", "Slice", "SplitToSequence"):
                return self._parted(value, users, axis, inner, width, rank)
            node, value = users[0], users[0].outputs[0]
            shape = shapes.of(value)
            if is_op(node, "Transpose"):
                axis = attribute(node, "perm", tuple(reversed(range(rank)))).index(axis)
            elif is_op(node, "Reshape") and shape and axis == rank - 1 and inner == 1:
                rank = len(shape)
                axis, inner = _outermost(shape, width)
                if axis < 0:
                    return {}
            elif not is_same(node):
                return {}
        return {}

    def _parted(self, value: ir.Value, users: list[ir.Node], axis: int, inner: int, width: int, rank: int) -> Ranges:
        found: Ranges = {}
        for node in users:
            own = None
            if node.inputs[0] is value:
                own = self._of_node(node, axis, width // inner, rank)
            if own is None:
                return {}
            found.update(own)
        covered = 0
        for start, stop in sorted(set(found.values())):
            if start != covered:
                return {}
            covered = stop
        if covered != width // inner or len(set(found.values())) < 2:
            return {}
        return {v: (start * inner, stop * inner) for v, (start, stop) in found.items()}

    def _of_node(self, node: ir.Node, axis: int, size: int, rank: int) -> Ranges | None:
        if is_op(node, "Slice"):
            found = constant_slice(node, rank)
            if found is None or found[0] != axis:
                return None
            start, stop = (max(0, min(n + size if n < 0 else n, size)) for n in found[1:])
            return {node.outputs[0]: (start, stop)} if start < stop else None
        if is_op(node, "Split") and attribute(node, "axis", 0) % rank == axis:
            sizes = constant_split(node, size, len(node.outputs))
            if sizes is None:
                return None
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return {o: (end - n, end) for o, end, n in zip(node.outputs, ends, sizes, strict=True)}
        if is_op(node, "Gather") and attribute(node, "axis", 0) % rank == axis:
            index = constant_scalar(node.inputs[1])
            if index is None or not -size <= index < size:
                return None
            return {node.outputs[0]: (int(index) % size, int(index) % size + 1)}
        if is_op(node, "SplitToSequence") and attribute(node, "axis", 0) % rank == axis:
            return self._sequence(node, size)
        return None

    def _sequence(self, node: ir.Node, size: int) -> Ranges | None:
        given = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        if given is None or not given or not attribute(node, "keepdims", 1):
            return None
        chunk = constant_scalar(node.inputs[1])
        single = chunk is not None and not self._tracer.shapes.rank(node.inputs[1] or node.outputs[0])
        starts = list(range(0, size, given[0])) if single else [sum(given[:i]) for i in range(len(given))]
        ends = [*starts[1:], size]
        found: Ranges = {}
        for use in node.outputs[0].uses():
            at = constant_scalar(use.node.inputs[1]) if is_op(use.node, "SequenceAt") else None
            if at is None or not -len(starts) <= at < len(starts):
                return None
            found[use.node.outputs[0]] = (starts[int(at)], ends[int(at)])
        return found


def _outermost(shape: Sequence[Dim], width: int) -> tuple[int, int]:
    """Return the first of the last axes that channels are reshaped into, and how many lie below each of its indexes.

    The axis is -1 when no last axes have so many elements together.
    """
    inner = 1
    for axis in reversed(range(len(shape))):
        size = shape[axis]
        if not isinstance(size, int):
            break
        if inner * size == width:
            return axis, inner
        inner *= size
    return -1, 1
