"""Parts of one tensor that are rearranged alike, and how to do that once, before the tensor is taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from onnxopt.analysis.dims import Dim, product
from onnxopt.analysis.layout import Axis, Rearrangement, Step, is_layout, plan, rearrangement
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import only_use


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    """A part, and the layout nodes behind it.

    Attributes:
        result: What the nodes end in; the part itself when there are none.
        nodes: The nodes, first to last.
        read: What they do; None when they do nothing, or nothing that can be read.
    """

    result: ir.Value
    nodes: tuple[ir.Node, ...]
    read: Rearrangement | None


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """How to rearrange a tensor before it is split.

    Attributes:
        steps: What is done to all of it.
        axis: The axis that is split then.
        sizes: The sizes of the parts; None when they are equal.
        rest: What is left to do to each part.
    """

    steps: tuple[Step, ...]
    axis: int
    sizes: tuple[int, ...] | None
    rest: tuple[tuple[Step, ...], ...]

    @property
    def count(self) -> int:
        """Number of layout nodes."""
        return len(self.steps) + sum(len(steps) for steps in self.rest)


def branch(part: ir.Value, shapes: Shapes) -> Branch:
    """Follow a value through layout nodes, as long as each is the only one that uses the value before it."""
    nodes: list[ir.Node] = []
    value = part
    while (user := only_use(value)) is not None and is_layout(user) and user.graph is part.graph:
        if user.inputs[0] is not value:
            break
        nodes.append(user)
        value = user.outputs[0]
    read = rearrangement(nodes, shapes) if nodes else None
    return Branch(value, tuple(nodes), read) if read is not None else Branch(part, (), None)


def share(branches: Sequence[Branch], axis: int, shapes: Shapes) -> Sharing | None:
    """Return the sharing with the fewest nodes, if it has fewer than there are now.

    Args:
        branches: The parts, in order.
        axis: The axis along which they lie next to each other.
        shapes: What is known about shapes.
    """
    now = sum(len(b.nodes) for b in branches)
    if now < 2:
        return None
    bases = dict.fromkeys(v for b in branches if b.read is not None for v in _readings(b.read, axis))
    found = [s for base in bases if (s := _hoisted(base, axis, branches, shapes)) is not None and s.count < now]
    return min(found, key=lambda s: s.count, default=None)


def _readings(read: Rearrangement, axis: int) -> list[Rearrangement]:
    """Return the ways to see a part as so many pieces along an axis: several, or a single one where there is room."""
    found = [read] if read.before[axis] else []
    if any(not a for a in read.after):
        head = sum(len(a) for a in read.before[:axis])
        shifted = {f: f + (f >= head) for f in range(len(read.sizes))}
        before, after = ([tuple(shifted[f] for f in a) for a in axes] for axes in (read.before, read.after))
        before[axis] = (head, *before[axis])
        sizes: tuple[Dim, ...] = (*read.sizes[:head], 1, *read.sizes[head:])
        for place in (i for i, a in enumerate(after) if not a):
            target = tuple((head,) if i == place else a for i, a in enumerate(after))
            found.append(Rearrangement(sizes, tuple(before), target))
    return found


def _hoisted(base: Rearrangement, axis: int, branches: Sequence[Branch], shapes: Shapes) -> Sharing | None:
    """Rearrange as one of the parts is, then split; what the other parts need besides is done behind the split."""
    head = base.before[axis][0]
    axis_after = next((i for i, a in enumerate(base.after) if a and a[0] == head), None)
    if axis_after is None:
        return None
    rest: list[tuple[Step, ...]] = []
    sizes: list[int] = []
    together: Dim = 0
    for each in branches:
        own = each.read or _identity_like(base, axis, head, each.result, shapes)
        fitting = [
            (steps, read)
            for read in (_readings(own, axis) if own is not None else ())
            if read.before == base.before
            and _same_but(read.sizes, base.sizes, head)
            and (steps := plan(_renumbered(read.sizes, base.after, read.after))) is not None
        ]
        if not fitting:
            return None
        steps, read = min(fitting, key=lambda f: len(f[0]))
        size = product(read.sizes[f] for f in base.after[axis_after])
        if not isinstance(size, int):
            return None
        rest.append(steps)
        sizes.append(size)
        together = together + read.sizes[head]
    total = tuple(together if f == head else size for f, size in enumerate(base.sizes))
    shared = plan(Rearrangement(total, base.before, base.after))
    return None if shared is None else Sharing(shared, axis_after, tuple(sizes), tuple(rest))


def _identity_like(base: Rearrangement, axis: int, head: int, part: ir.Value, shapes: Shapes) -> Rearrangement | None:
    """Return the rearrangement that leaves a part as it is, in the factors of another one."""
    shape = shapes.of(part)
    size = shape[axis] if shape is not None and len(shape) == len(base.before) else None
    inner = product(base.sizes[f] for f in base.before[axis] if f != head)
    if not isinstance(size, int) or not isinstance(inner, int) or size % inner:
        return None
    sizes = tuple(size // inner if f == head else s for f, s in enumerate(base.sizes))
    return Rearrangement(sizes, base.before, base.before)


def _same_but(sizes: Sequence[Dim], others: Sequence[Dim], but: int) -> bool:
    return len(sizes) == len(others) and all(
        i == but or a == b for i, (a, b) in enumerate(zip(sizes, others, strict=True))
    )


def _renumbered(sizes: Sequence[Dim], before: Sequence[Axis], after: Sequence[Axis]) -> Rearrangement:
    """Return a rearrangement whose factors are numbered in the order of its input."""
    order = [f for axis in before for f in axis]
    number = {factor: i for i, factor in enumerate(order)}

    def renamed(axes: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(tuple(number[f] for f in axis) for axis in axes)

    return Rearrangement(tuple(sizes[f] for f in order), renamed(before), renamed(after))
