"""An attention in its graph: how its operands and its result are arranged, and what several attentions share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.attention import Attention, Heads, Operand, dead_without, split_off
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Rearrangement, Step, is_layout, plan
from onnxopt.analysis.masks import Term, is_causal, term
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import Axis, Leaf, View, measured, view, whole_factors
from onnxopt.contract import Context
from onnxopt.graph import Scope, only_use
from onnxopt.rewrite import Builder

SPLIT_SIZES_AS_INPUT = 13


Shared: TypeAlias = dict[tuple[object, ...], ir.Value]
"""Values that several attentions need, such as masks of the full shape, once they are built."""


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A replacement.

    Attributes:
        name: The operator.
        result: The value that is replaced.
        build: Makes it.
    """

    name: str
    result: ir.Value
    build: Callable[[Builder], ir.Value]


@dataclasses.dataclass(frozen=True)
class Site:
    """An attention with what is known about its masks and its surroundings.

    Attributes:
        found: The attention.
        terms: Its masks as terms that are added.
        causal: The only mask hides later keys.
        scope: Where it is.
        shapes: What is known about shapes.
        shared: Values that other attentions may use too.
        tails: The values that only rearrange the result, the last one first, the result itself last.
    """

    found: Attention
    terms: tuple[Term, ...]
    causal: bool
    scope: Scope
    shapes: Shapes
    shared: Shared
    tails: tuple[ir.Value, ...]

    @classmethod
    def make(cls, found: Attention, scope: Scope, ctx: Context, shared: Shared) -> Site | str:
        """Read the masks, and follow the result."""
        if ctx.shapes.dtype(found.result) != ir.DataType.FLOAT:
            return "only attention in float32 is rewritten"
        terms: list[Term] = []
        for mask in found.masks:
            read = term(mask, ctx.shapes)
            if isinstance(read, str):
                return read
            terms.append(read)
        joint = ctx.shapes.rank(found.product.outputs[0]) == 3 and found.batch != 1
        if joint and any(len(t.shape) == 3 and t.shape[0] != 1 for t in terms):
            return "a mask has batch and heads in one axis"
        causal = len(terms) == 1 and is_causal(terms[0], found.queries, found.keys, ctx.shapes)
        return cls(found, tuple(terms), causal, scope, ctx.shapes, shared, tuple(_tails(found.result)))

    @property
    def guarded(self) -> bool:
        """Whether a row masked in full gives 0 because of a guard, where plain arithmetic gives NaN."""
        return self.found.guard is not None and (len(self.terms) > 1 or any(t.may_lose_rows for t in self.terms))

    @property
    def heads(self) -> int | None:
        """Number of heads, when it is a number."""
        return self.found.heads if isinstance(self.found.heads, int) else None

    @property
    def kv_heads(self) -> int | None:
        """Number of heads of K and V, when it is a number."""
        heads = self.found.key.heads
        return heads if isinstance(heads, int) else None

    def keep(self, key: tuple[object, ...], make: Callable[[Builder], ir.Value], builder: Builder) -> ir.Value:
        """Return a value that attentions share, made in front of this one's softmax if it is not there yet."""
        key = (self.scope.graph, *key)
        value = self.shared.get(key)
        node = value.producer() if value is not None else None
        if value is None or node is None or node.graph is not self.scope.graph:
            value = self.shared[key] = make(builder.at(self.found.softmax))
        return value

    def dead(self, result: ir.Value, *, keep_operands: bool = False) -> set[ir.Node]:
        """Return the nodes that go when a value is replaced, those that Q, K and V come from as well or not."""
        node = result.producer()
        assert node is not None
        kept = [o.near.view.source for o in (self.found.query, self.found.key, self.found.value)]
        kept += [v for t in self.terms for v in (t.value, t.condition) if v is not None]
        return dead_without(node, kept if keep_operands else ())


def _tails(result: ir.Value) -> list[ir.Value]:
    found = [result]
    while True:
        user = only_use(found[0])
        if user is None or not is_layout(user) or user.graph is not result.graph or user.inputs[0] is not found[0]:
            return found
        found.insert(0, user.outputs[0])


def flat_steps(heads: Heads) -> tuple[Step, ...] | None:
    """Return the layout nodes that make an operand batch x length x (heads * size)."""
    return steps_to(heads.view, (heads.batch, heads.length, (*heads.heads, *heads.size)))


def apart_steps(heads: Heads) -> tuple[Step, ...] | None:
    """Return the layout nodes that make an operand batch x heads x length x size."""
    return steps_to(heads.view, (heads.batch, heads.heads, heads.length, heads.size))


def steps_to(seen: View, after: Sequence[Axis]) -> tuple[Step, ...] | None:
    """Return the layout nodes that make axes of these leaves, or None when constants cannot express them."""
    wanted = seen.rearrangement(after)
    return None if wanted is None else plan(wanted)


@dataclasses.dataclass(frozen=True, slots=True)
class Tail:
    """How a value is made from what an attention operator gives."""

    value: ir.Value
    steps: tuple[Step, ...]


def tail_from(site: Site, groups: Callable[[Result], tuple[Axis, ...] | None]) -> Tail | None:
    """Return the farthest tail that constants can express, from a result with these axes."""
    for value in site.tails:
        result = Result.of(value, site)
        before = None if result is None else groups(result)
        if result is None or before is None:
            continue
        order = [leaf for axis in before for leaf in axis]
        number = {leaf: i for i, leaf in enumerate(order)}
        wanted = Rearrangement(
            tuple(leaf.size for leaf in order),
            tuple(tuple(number[leaf] for leaf in axis) for axis in before),
            tuple(tuple(number[leaf] for leaf in axis) for axis in result.axes),
        )
        steps = plan(wanted)
        if steps is not None:
            return Tail(value, steps)
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A rearranged result: its axes in leaves of batch, heads, length and size."""

    batch: Axis
    heads: Axis
    length: Axis
    size: Axis
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, value: ir.Value, site: Site) -> Result | None:
        """Read a tail in terms of the result."""
        found = site.found
        read = view(value, site.shapes, selections=False, repeats=False, factors=False)
        if read is None or read.source is not found.result:
            return None
        axes = read.axes
        if len(read.shape) == 3:
            axes = _told_apart(axes, 0, found.batch, found.heads)
        elif len(read.shape) == 4:
            axes = _told_apart(axes, 1, found.key.heads, found.groups)
        factors = whole_factors(read.shape, [leaf for axis in axes for leaf in axis])
        if factors is None:
            return None
        outer = split_off([leaf for axis in factors[:-2] for leaf in axis], found.batch)
        if outer is None or {*outer[0], *outer[1]} != {leaf for axis in factors[:-2] for leaf in axis}:
            return None
        return cls(*outer, factors[-2], factors[-1], axes)

    @property
    def flat(self) -> tuple[Axis, ...]:
        """Axes batch x length x (heads * size)."""
        return (self.batch, self.length, (*self.heads, *self.size))

    @property
    def apart(self) -> tuple[Axis, ...]:
        """Axes batch x heads x length x size."""
        return (self.batch, self.heads, self.length, self.size)


def _told_apart(axes: tuple[Axis, ...], axis: int, outer: Dim, inner: Dim) -> tuple[Axis, ...]:
    """Split the leaf that counts a whole axis of the result into an outer and an inner one."""
    if outer == 1 or inner == 1:
        return axes
    joint = Leaf(axis, 1, outer * inner)
    parts = (Leaf(axis, inner, outer), Leaf(axis, 1, inner))
    return tuple(tuple(part for leaf in a for part in (parts if leaf == joint else (leaf,))) for a in axes)


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """How Q, K and V are made for an operator.

    Attributes:
        cost: How many nodes that takes.
        build: Makes them.
        joint: The value that holds Q, K and V side by side, or None.
    """

    cost: int
    build: Callable[[Builder], list[ir.Value]]
    joint: ir.Value | None = None


def operands(site: Site) -> tuple[Operand, Operand, Operand]:
    """Return Q, K and V."""
    return site.found.query, site.found.key, site.found.value


def arranged(site: Site, how: Callable[[Heads], tuple[Step, ...] | None]) -> Inputs | None:
    """Return Q, K and V, each rearranged from its nearest source; None when constants cannot express that."""
    plans = [(o.near.view.source, how(o.near)) for o in operands(site)]
    known = [(source, steps) for source, steps in plans if steps is not None]
    if len(known) < len(plans):
        return None
    return Inputs(sum(len(steps) for _, steps in known), lambda b: [b.layout(source, steps) for source, steps in known])


def apart_inputs(site: Site) -> Inputs | None:
    """Return Q, K and V as batch x heads x length x size."""
    return arranged(site, apart_steps)


def flat_inputs(site: Site) -> Inputs | None:
    """Return Q, K and V as batch x length x (heads * size): rearranged, or cut out of what holds all three."""
    near, cut = arranged(site, flat_steps), cut_inputs(site)
    if cut is None or (near is not None and near.cost <= cut.cost):
        return near
    return cut


def cut_inputs(site: Site) -> Inputs | None:
    """Return Q, K and V as a Split of the last axis of what holds all three side by side, in this order."""
    source = site.found.query.root.view.source
    shape = site.shapes.of(source)
    if shape is None or len(shape) != 3:
        return None
    sizes: list[int] = []
    for operand in operands(site):
        heads = operand.root
        columns = heads.view.columns((*heads.heads, *heads.size))
        rows = whole_factors(shape[:2], [*heads.batch, *heads.length])
        if heads.view.source is not source or columns is None or rows != [heads.batch, heads.length]:
            return None
        if not np.array_equal(columns, np.arange(len(columns)) + sum(sizes)):
            return None
        sizes.append(len(columns))
    if sum(sizes) != shape[2]:
        return None

    def build(builder: Builder) -> list[ir.Value]:
        if site.scope.opset >= SPLIT_SIZES_AS_INPUT:
            first = builder.op("Split", [source, builder.ints("sizes", sizes)], {"axis": 2}, outputs=3)
        else:
            first = builder.op("Split", [source], {"axis": 2, "split": sizes}, outputs=3)
        node = first.producer()
        assert node is not None
        return list(node.outputs)

    return Inputs(1, build, source)


def mixed_inputs(site: Site) -> Inputs | None:
    """Return Q as batch x length x features, K and V with their heads apart, as a cache has them."""
    query = flat_steps(site.found.query.near)
    others = [(o.near.view.source, apart_steps(o.near)) for o in operands(site)[1:]]
    known = [(source, steps) for source, steps in others if steps is not None]
    if query is None or len(known) < 2:
        return None
    source = site.found.query.near.view.source
    cost = len(query) + sum(len(steps) for _, steps in known)
    return Inputs(cost, lambda b: [b.layout(source, query), *(b.layout(s, steps) for s, steps in known)])


def list_of_sizes(sizes: Sequence[Dim], site: Site, builder: Builder) -> ir.Value:
    """Return a list of sizes, those that are no numbers read off Q or K."""
    parts: list[ir.Value] = []
    for size in sizes:
        if isinstance(size, int):
            parts.append(builder.ints("size", [size]))
        else:
            near = [v for v in site.found.product.inputs if v is not None]
            there = measured(size, near, site.scope.graph, site.shapes)
            assert there is not None, "the sizes of an attention are sizes of Q and K"
            parts.append(builder.size(*there))
    return parts[0] if len(parts) == 1 else builder.op("Concat", parts, {"axis": 0})
