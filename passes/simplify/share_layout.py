"""A tensor that is split is rearranged once, not part by part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Rearrangement, Step, chain_to, is_layout, plan, rearrangement
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.sharing import Sharing, branch, share
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    attribute,
    constant_ints,
    first_output,
    has_references,
    is_op,
    remove_unused,
    replace_value,
    scopes,
    use_count,
)
from onnxopt.rewrite import Builder

SLICE_BOUNDS_AS_INPUT = 10
"""From this opset on, Slice takes what it cuts as inputs."""

_MOST_PARTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareLayout(GraphPass):
    """Rearrange a tensor once instead of each of the parts it is split into.

    Where the parts of a Split are reshaped and transposed alike, as the heads of query, key and value are, that is
    done in front of the Split. Where Slices, elements of a sequence, or one Gather per element, take all of an axis,
    a Split takes their place.
    """

    name: ClassVar[str] = "share-layout"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per tensor that is split."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            # Edits add nodes, but do not change the order of those that are there.
            order = functools.cache(lambda graph=scope.graph: {node: i for i, node in enumerate(graph)})
            for node in scope.graph:
                for found in _plans(node, scope, ctx.shapes, order):
                    if isinstance(found, str):
                        yield Refusal(Site(self.name, scope.path, first_output(node)), found)
                    else:
                        site = Site(self.name, scope.path, found.parts[0].name or "")
                        yield Edit(site, found.summary, functools.partial(found.apply, scope, names))


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What replaces the nodes from a tensor to its parts.

    Attributes:
        source: The tensor.
        sharing: What is done instead.
        parts: What the parts end in.
        place: The node in front of which the new ones go.
    """

    source: ir.Value
    sharing: Sharing
    parts: tuple[ir.Value, ...]
    place: ir.Node

    @property
    def summary(self) -> str:
        return f"{len(self.parts)} parts of {self.source.name} rearranged at once"

    def apply(self, scope: Scope, names: Callable[[], Names]) -> None:
        builder = Builder(scope, names(), self.place, self.parts[0].name or "split")
        value = builder.layout(self.source, self.sharing.steps)
        outputs = builder.split(value, self.sharing.axis, self.sharing.sizes, len(self.parts))
        for old, output, steps in zip(self.parts, outputs, self.sharing.rest, strict=True):
            producer = old.producer()
            assert producer is not None
            replace_value(old, builder.layout(output, steps))
            remove_unused(producer)


_Order = Callable[[], dict[ir.Node, int]]


def _plans(node: ir.Node, scope: Scope, shapes: Shapes, order: _Order) -> Iterator[_Plan | str]:
    if is_op(node, "Split"):
        found = _split(node, shapes)
    elif is_op(node, "SplitToSequence"):
        found = _sequence(node, shapes)
    elif is_layout(node):
        found = _gathers(node, shapes)
    else:
        found = None
    if found is not None:
        yield found
    for output in node.outputs:
        sliced = _slices(output, scope, shapes, order) if use_count(output) > 1 else None
        if sliced is not None:
            yield sliced


# Split, then layout -------------------------------------------------------------------------------------------


def _split(node: ir.Node, shapes: Shapes) -> _Plan | str | None:
    source = node.inputs[0]
    rank = None if source is None else shapes.rank(source)
    if source is None or rank is None or has_references(node) or not all(use_count(o) for o in node.outputs):
        return None
    branches = [branch(output, shapes) for output in node.outputs]
    sharing = share(branches, attribute(node, "axis", 0) % rank, shapes)
    if sharing is None:
        return "the parts are not rearranged alike" if all(len(b.nodes) > 1 for b in branches) else None
    return _Plan(source, sharing, tuple(b.result for b in branches), node)


# One Gather per element ---------------------------------------------------------------------------------------


def _gathers(node: ir.Node, shapes: Shapes) -> _Plan | str | None:
    """Look at a layout node whose result is taken apart by one Gather per element of an axis."""
    if not 2 <= use_count(node.outputs[0]) <= _MOST_PARTS:
        return None
    value = node.outputs[0]
    users = [use.node for use in value.uses()]
    if value.is_graph_output() or any(not _is_pick(u, value) or u.graph is not node.graph for u in users):
        return None
    shape = shapes.of(value)
    axes = {attribute(u, "axis", 0) for u in users}
    if shape is None or len({a % len(shape) for a in axes}) != 1:
        return None
    axis = axes.pop() % len(shape)
    count = shape[axis]
    picked = {}
    for user in users:
        (index,) = constant_ints(user.inputs[1]) or (0,)
        picked[index % count if isinstance(count, int) and count else index] = user
    if count != len(users) or sorted(picked) != list(range(len(users))):
        return "not every element of the axis is taken once"
    chain = chain_to(node)
    read = rearrangement(chain, shapes)
    if read is None or chain[0].inputs[0] is None:
        return "the shapes are not known well enough"
    best: tuple[tuple[Step, ...], int] | None = None
    for target in range(len(shape)):
        if target == axis:
            continue
        joined = [read.after[axis] + a if i == target else a for i, a in enumerate(read.after) if i != axis]
        steps = plan(Rearrangement(read.sizes, read.before, tuple(joined)))
        if steps is not None and (best is None or len(steps) < len(best[0])):
            best = steps, target - (target > axis)
    if best is None or len(best[0]) + 1 >= len(chain) + len(users):
        return None
    sharing = Sharing(best[0], best[1], None, ((),) * len(users))
    return _Plan(chain[0].inputs[0], sharing, tuple(picked[i].outputs[0] for i in range(len(users))), node)


def _is_pick(user: ir.Node, value: ir.Value) -> bool:
    """Whether a node takes one element along an axis of a value, which it drops."""
    if not is_op(user, "Gather") or has_references(user) or user.inputs[0] is not value:
        return False
    index = user.inputs[1]
    return constant_ints(index) is not None and index is not None and index.shape is not None and not index.shape


# One element of a sequence per part ---------------------------------------------------------------------------


def _sequence(node: ir.Node, shapes: Shapes) -> _Plan | str | None:
    """Look at a sequence of parts whose elements are taken one by one."""
    source, value = node.inputs[0], node.outputs[0]
    shape = shapes.of(source) if source is not None else None
    users = [use.node for use in value.uses()]
    if source is None or shape is None or not users or has_references(node) or value.is_graph_output():
        return None
    if any(not is_op(u, "SequenceAt") or u.graph is not node.graph for u in users):
        return "the sequence is used as such"
    axis = attribute(node, "axis", 0) % len(shape)
    sizes = _sizes(node, shape[axis])
    if sizes is None or len(sizes) > _MOST_PARTS:
        return "the sizes of the parts are not known, or they are too many"
    picked: dict[int, ir.Node] = {}
    for user in users:
        index = constant_ints(user.inputs[1])
        if index is None or len(index) != 1:
            return "which part is taken is not known"
        picked[index[0] % len(sizes)] = user
    if len(picked) != len(users) or len(picked) != len(sizes):
        return "not every part is taken once"
    sharing = Sharing((), axis, sizes, ((),) * len(sizes))
    return _Plan(source, sharing, tuple(picked[i].outputs[0] for i in range(len(sizes))), node)


def _sizes(node: ir.Node, size: Dim) -> tuple[int, ...] | None:
    """Return the sizes of the parts of a sequence that keeps its axes."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    known = constant_ints(given)
    if given is None or known is None or not isinstance(size, int) or given.shape is None:
        return None
    if len(given.shape):
        return known if sum(known) == size else None
    step = known[0]
    return tuple(min(step, size - start) for start in range(0, size, step)) if step > 0 else None


# One Slice per part -------------------------------------------------------------------------------------------


def _slices(value: ir.Value, scope: Scope, shapes: Shapes, order: _Order) -> _Plan | None:
    """Return the Split that takes the place of Slices which take a value apart along an axis."""
    if use_count(value) > _MOST_PARTS:
        return None
    cuts: dict[int, dict[tuple[int, int], ir.Node]] = {}
    for use in value.uses():
        cut = _cut(use.node, value, scope.opset, shapes)
        if cut is not None and use.node.graph is scope.graph:
            axis, start, end = cut
            cuts.setdefault(axis, {})[start, end] = use.node
    shape = shapes.of(value)
    for axis, found in cuts.items():
        ranges = sorted(found)
        ends = [0, *(end for _, end in ranges)]
        if len(ranges) < 2 or shape is None or ends[-1] != shape[axis] or ends[:-1] != [start for start, _ in ranges]:
            continue
        nodes = [found[r] for r in ranges]
        sharing = Sharing((), axis, tuple(end - start for start, end in ranges), ((),) * len(nodes))
        return _Plan(value, sharing, tuple(n.outputs[0] for n in nodes), min(nodes, key=order().__getitem__))
    return None


def _cut(node: ir.Node, value: ir.Value, opset: int, shapes: Shapes) -> tuple[int, int, int] | None:
    """Return (axis, start, end) of a Slice that cuts a piece out of one axis, whose size is a known number."""
    if not is_op(node, "Slice") or has_references(node) or node.inputs[0] is not value:
        return None
    if opset < SLICE_BOUNDS_AS_INPUT:
        given = [attribute(node, name) for name in ("starts", "ends", "axes")]
        steps = None
    else:
        given = [constant_ints(v) for v in [*node.inputs[1:4], None][:3]]
        steps = constant_ints(node.inputs[4]) if len(node.inputs) > 4 else None
        if len(node.inputs) > 4 and steps != (1,):
            return None
    starts, ends, axes = given
    shape = shapes.of(value)
    if starts is None or ends is None or axes is None or shape is None or not len(starts) == len(axes) == 1:
        return None
    axis = axes[0] % len(shape)
    size = shape[axis]
    if not isinstance(size, int):
        return None
    start, end = (max(0, min(size, b + size if b < 0 else b)) for b in (starts[0], ends[0]))
    return (axis, start, end) if start < end else None
