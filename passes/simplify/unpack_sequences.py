"""A sequence that is only taken apart again becomes plain tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    attribute,
    cannot_replace,
    constant_ints,
    constant_tensor,
    first_output,
    has_references,
    is_op,
    remove_unused,
    replace_value,
    scopes,
)
from onnxopt.rewrite import AXES_AS_INPUT, Builder


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnpackSequences(GraphPass):
    """Replace SplitToSequence by Split, and SequenceConstruct by its inputs, where only SequenceAt looks at them.

    torch.split and torch.unbind are exported so. Where most parts are not used, those that are become a Slice or a
    Gather each.
    """

    name: ClassVar[str] = "unpack-sequences"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per sequence."""
        names: Names | None = None
        for scope in scopes(model):
            for node in scope.graph:
                if not is_op(node, "SplitToSequence", "SequenceConstruct") or has_references(node):
                    continue
                site = Site(self.name, scope.path, first_output(node))
                found = _read(node, ctx.shapes)
                if isinstance(found, str):
                    yield Refusal(site, found)
                    continue
                names = names or Names(model)
                apply = functools.partial(_unpack, node, found, Builder(scope, names, node, first_output(node)))
                yield Edit(site, f"{len(found.members)} members of a sequence are plain tensors", apply)


@dataclasses.dataclass(frozen=True, slots=True)
class _Sequence:
    """A sequence all of whose uses are known.

    Attributes:
        members: (SequenceAt, index from the front).
        parts: What a SequenceConstruct puts together; empty for a SplitToSequence.
        axis: What is split.
        sizes: Into what.
        squeezed: Whether the split axis goes.
    """

    members: tuple[tuple[ir.Node, int], ...]
    parts: tuple[ir.Value, ...] = ()
    axis: int = 0
    sizes: tuple[int, ...] = ()
    squeezed: bool = False


def _read(node: ir.Node, shapes: Shapes) -> _Sequence | str:
    if is_op(node, "SequenceConstruct"):
        parts = tuple(v for v in node.inputs if v is not None)
        members = _members(node, len(parts))
        if isinstance(members, str):
            return members
        reasons = (cannot_replace(at.outputs[0], parts[index]) for at, index in members)
        return next((r for r in reasons if r), None) or _Sequence(members, parts)
    split = _split(node, shapes)
    if isinstance(split, str):
        return split
    members = _members(node, len(split.sizes))
    return members if isinstance(members, str) else dataclasses.replace(split, members=members)


def _split(node: ir.Node, shapes: Shapes) -> _Sequence | str:
    """Return how a SplitToSequence splits."""
    source = node.inputs[0]
    shape = shapes.of(source) if source is not None else None
    if shape is None:
        return "the number of axes is not known"
    axis = attribute(node, "axis", 0) % len(shape)
    total = shape[axis]
    given = node.inputs[1] if len(node.inputs) > 1 else None
    tensor, asked = constant_tensor(given), constant_ints(given)
    if given is not None and not attribute(node, "keepdims", 1):
        return "keepdims=0 beside given sizes: the specification ignores it, ONNX Runtime does not"
    if given is not None and (tensor is None or asked is None):
        return "the sizes of the parts are computed"
    if tensor is not None and asked is not None and len(tensor.shape) == 1:
        return _Sequence((), axis=axis, sizes=asked)
    if not isinstance(total, int):
        return "the size of the axis that is split is not known"
    size = asked[0] if asked else 1
    rest = (total % size,) if total % size else ()
    return _Sequence(
        (), (), axis, (size,) * (total // size) + rest, given is None and not attribute(node, "keepdims", 1)
    )


def _members(node: ir.Node, length: int) -> tuple[tuple[ir.Node, int], ...] | str:
    sequence = node.outputs[0]
    if sequence.is_graph_output():
        return "the sequence is an output"
    members: list[tuple[ir.Node, int]] = []
    for user, place in sequence.uses():
        if not is_op(user, "SequenceAt") or place != 0 or user.graph is not node.graph:
            return "the sequence is used by more than SequenceAt"
        index = constant_ints(user.inputs[1])
        if index is None or len(index) != 1:
            return "the index into the sequence is computed"
        if not -length <= index[0] < length:
            return "the index lies outside of the sequence"
        members.append((user, index[0] % length))
    return tuple(members) if members else "nothing uses the sequence"


def _unpack(node: ir.Node, found: _Sequence, builder: Builder) -> None:
    parts = dict(enumerate(found.parts)) if found.parts else _cut(node, found, builder)
    for at, index in found.members:
        replace_value(at.outputs[0], parts[index])
        remove_unused(at)


def _cut(node: ir.Node, found: _Sequence, builder: Builder) -> dict[int, ir.Value]:
    source = node.inputs[0]
    assert source is not None, "a split has been read"
    wanted = sorted({index for _, index in found.members})
    if 2 * len(wanted) >= len(found.sizes):
        equal = len(set(found.sizes)) == 1
        outputs = builder.split(source, found.axis, None if equal else found.sizes, len(found.sizes))
        return {i: _squeezed(outputs[i], found.axis, builder) if found.squeezed else outputs[i] for i in wanted}
    if found.squeezed:
        return {i: builder.op("Gather", [source, builder.constant("index", i)], {"axis": found.axis}) for i in wanted}
    return {i: _slice(source, found.axis, found.sizes, i, builder) for i in wanted}


def _squeezed(value: ir.Value, axis: int, builder: Builder) -> ir.Value:
    if builder.scope.opset < AXES_AS_INPUT:
        return builder.op("Squeeze", [value], {"axes": [axis]})
    return builder.op("Squeeze", [value, builder.ints("axes", [axis])])


def _slice(source: ir.Value, axis: int, sizes: Sequence[int], index: int, builder: Builder) -> ir.Value:
    start = sum(sizes[:index])
    bounds = {"starts": start, "ends": start + sizes[index], "axes": axis}
    return builder.op("Slice", [source, *(builder.ints(name, [number]) for name, number in bounds.items())])
