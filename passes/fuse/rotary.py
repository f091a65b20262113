"""Rotary position embedding becomes one operator where that is faster, and loses a node elsewhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import kernels
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Rearrangement, Step, plan, reshape_step
from onnxopt.analysis.rotary import Rotation, Table, rotation, table
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import Axis, Leaf, View, measured, view
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, is_op, only_use
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

ROTARY_OPSET = 23
"""RotaryEmbedding is a standard operator from this opset on."""
MICROSOFT = "com.microsoft"
CPU = "CPUExecutionProvider"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseRotaryEmbedding(GraphPass):
    """Fuse the rotation of pairs of features by an angle per position (`analysis/rotary.py`).

    The result is the standard RotaryEmbedding where the opset has it, for the target "cpu" also ONNX Runtime's own
    where `analysis/kernels.py` says that it is not slower, in front of the split into heads where there is one. The
    cosines and sines are taken once per pair. Elsewhere the minus of the rotation moves into the sines, which all
    layers share.
    """

    name = "fuse-rotary"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per rotary embedding."""
        rule = functools.partial(_rule, shared={})
        yield from rewrite(self.name, model, ctx, {op: [rule] for op in ("Add", "Concat")})


_Shared: TypeAlias = dict[tuple[object, ...], ir.Value]
"""Cosines and sines that all layers use, once they are built."""


def _rule(node: ir.Node, scope: Scope, ctx: Context, *, shared: _Shared) -> Answer:
    found = rotation(node, ctx.shapes)
    if found is None:
        return None
    site = _Site(found, node, scope, ctx.shapes, shared)
    reasons: list[str] = []
    domains = [""] if scope.opset >= ROTARY_OPSET else []
    if not domains:
        reasons.append(f"the standard RotaryEmbedding needs opset {ROTARY_OPSET}; raise it with --opset")
    if ctx.target == "cpu":
        domains.append(MICROSOFT)
    elif ctx.target == "cuda":
        reasons.append("the RotaryEmbedding of ONNX Runtime was not measured on cuda")
    for domain in sorted(domains, key=_ratio):
        if _ratio(domain) > kernels.NOT_SLOWER:
            reasons.append("the operator was not measured to be as fast as plain operators")
            continue
        answer = _fused(site, domain)
        if isinstance(answer, Found):
            return answer
        reasons.append(answer)
    return _without_minus(site) or Refused(reasons[0])


def _ratio(domain: str) -> float:
    found = kernels.ratio(f"{domain}.RotaryEmbedding" if domain else "RotaryEmbedding", CPU)
    return float("inf") if found is None else found


@dataclasses.dataclass(frozen=True)
class _Site:
    """A rotary embedding and where it is."""

    found: Rotation
    node: ir.Node
    scope: Scope
    shapes: Shapes
    shared: _Shared

    def keep(self, key: tuple[object, ...], builder: Builder, make: Any) -> ir.Value:
        """Return a value that layers share, made in front of this node if it is not there yet."""
        key = (self.scope.graph, *key)
        value = self.shared.get(key)
        producer = value.producer() if value is not None else None
        if value is None or (producer is not None and producer.graph is not self.scope.graph):
            value = self.shared[key] = make(builder.at(self.node))
        return value


# One operator ------------------------------------------------------------------------------------------


def _fused(site: _Site, domain: str) -> Found | str:
    """Write the rotary embedding as one operator of a domain."""
    found, shapes = site.found, site.shapes
    x, result, pairs = found.x, found.result, None
    whole = _partial(site)
    if whole is not None:
        x, result, pairs = whole
    if shapes.dtype(x) != ir.DataType.FLOAT:
        return "only rotary embedding in float32 is fused"
    placed = _placed(x, found, shapes)
    if isinstance(placed, str):
        return placed
    angles = _angles(site, placed)
    if isinstance(angles, str):
        return angles
    attributes = {"interleaved": int(found.interleaved)}
    if placed.flat or pairs is not None:
        attributes["num_heads"] = placed.heads
    if pairs is not None or (placed.flat and domain == MICROSOFT):
        attributes["rotary_embedding_dim"] = pairs if pairs is not None else placed.features

    def build(builder: Builder) -> ir.Value:
        source = builder.layout(placed.source, placed.before)
        inputs = angles.inputs(builder, domain, source)
        made = builder.op("RotaryEmbedding", inputs, attributes, domain=domain)
        return builder.layout(made, placed.after)

    name = f"{domain}.RotaryEmbedding" if domain else "RotaryEmbedding"
    return Found(result, f"rotary embedding of {x.name} as {name}", build)


def _partial(site: _Site) -> tuple[ir.Value, ir.Value, int] | None:
    """Return (whole features, result, how many are rotated) when the other features are appended unchanged."""
    found, shapes = site.found, site.shapes
    user = only_use(found.result)
    slicer = found.x.producer()
    if user is None or slicer is None or not is_op(user, "Concat") or len(user.inputs) != 2:
        return None
    whole, rest = slicer.inputs[0], user.inputs[1]
    shape, total = shapes.of(found.x), shapes.of(whole) if whole is not None else None
    if rest is None or whole is None or shape is None or total is None or user.inputs[0] is not found.result:
        return None
    if attribute(user, "axis") not in (-1, len(shape) - 1) or shape[:-1] != total[:-1]:
        return None
    views = [view(v, shapes, repeats=False, factors=False) for v in (whole, found.x, rest)]
    known = [v for v in views if v is not None]
    if len(known) < 3 or any(len(v.axes[-1]) != 1 or v.source is not known[0].source for v in known):
        return None
    full, first, second = (v.axes[-1][0] for v in known)
    if not isinstance(first.size, int) or not isinstance(first.stride, int) or first.axis is None:
        return None
    moved = list(known[0].starts)
    moved[first.axis] += first.size * first.stride
    fits = (
        known[0].starts == known[1].starts
        and known[2].starts == tuple(moved)
        and full.stride == first.stride == second.stride
        and first.size + second.size == full.size
        and all(v.axes[:-1] == known[0].axes[:-1] for v in known)
    )
    return (whole, user.outputs[0], first.size) if fits else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Placed:
    """How the features get into the operator and back.

    Attributes:
        source: What is rotated, before it is split into heads where that is possible.
        before: Layout nodes from there to the operator.
        after: Layout nodes behind the operator.
        flat: The operator gets batch x positions x (heads * features), else batch x heads x positions x features.
        batch: Size of the batch.
        positions: Number of positions.
        heads: Number of heads.
        features: Number of features of a head.
    """

    source: ir.Value
    before: tuple[Step, ...]
    after: tuple[Step, ...]
    flat: bool
    batch: Dim
    positions: Dim
    heads: int
    features: int


def _placed(x: ir.Value, found: Rotation, shapes: Shapes) -> _Placed | str:
    shape = shapes.of(x)
    axis = _position_axis(found, shapes)
    if shape is None or len(shape) != 4 or axis is None:
        return "it is not clear which axis counts positions and which heads"
    heads, features = shape[3 - axis], shape[3]
    if not isinstance(heads, int) or not isinstance(features, int):
        return "the number of heads or features is not known"
    direct = view(x, shapes, selections=False, repeats=False, factors=False)
    if direct is None:
        return "the shape of what is rotated is not known"
    for seen, flat in ((direct, True), (_itself(x, shape), False), (_itself(x, shape), True)):
        batch, head, position, size = seen.axes[0], seen.axes[3 - axis], seen.axes[axis], seen.axes[3]
        groups = (batch, position, (*head, *size)) if flat else (batch, head, position, size)
        before = _plan(seen, groups)
        after = _back(groups, seen.axes, found.paired)
        if before is None or after is None or (seen is direct and before):
            continue
        if flat or not before or axis == 1:
            return _Placed(seen.source, before, after, flat, shape[0], shape[axis], heads, features)
    return "constants cannot express how the features are arranged"


def _itself(x: ir.Value, shape: tuple[Dim, ...]) -> View:
    axes = tuple(() if d == 1 else (Leaf(k, 1, d),) for k, d in enumerate(shape))
    return View(x, shape, axes, (0,) * len(shape), 1.0, ())


def _plan(seen: View, groups: Sequence[Axis]) -> tuple[Step, ...] | None:
    wanted = seen.rearrangement(groups)
    return None if wanted is None else plan(wanted)


def _back(groups: Sequence[Axis], axes: Sequence[Axis], paired: bool) -> tuple[Step, ...] | None:
    """Return the layout nodes from the operator's axes to those of x, with an axis for pairs where there is one."""
    after = list(axes)
    if paired:
        leaf = axes[-1][-1]
        assert isinstance(leaf.size, int)
        pairs = (Leaf(leaf.axis, leaf.stride * 2, leaf.size // 2), Leaf(leaf.axis, leaf.stride, 2))
        groups = [tuple(p for old in axis for p in (pairs if old == leaf else (old,))) for axis in groups]
        after[-1:] = [(*axes[-1][:-1], pairs[0]), (pairs[1],)]
    order = [leaf for axis in groups for leaf in axis]
    number = {leaf: i for i, leaf in enumerate(order)}
    return plan(
        Rearrangement(
            tuple(leaf.size for leaf in order),
            tuple(tuple(number[leaf] for leaf in axis) for axis in groups),
            tuple(tuple(number[leaf] for leaf in axis) for axis in after),
        )
    )


def _position_axis(found: Rotation, shapes: Shapes) -> int | None:
    """Return which axis of x the angles depend on: 1 or 2."""
    x, cos, sin = shapes.of(found.x), shapes.of(found.cos), shapes.of(found.sin)
    if x is None or cos is None or sin is None or len(x) != 4 or len(cos) > 4 or len(sin) > 4:
        return None
    axes: set[int] = set()
    for shape in (cos, sin):
        padded = (*(1,) * (4 - len(shape)), *shape)
        moving = [k for k in (1, 2) if padded[k] != 1]
        if len(moving) != 1 or padded[moving[0]] != x[moving[0]] or padded[0] not in (1, x[0]):
            return None
        axes.add(moving[0])
    return axes.pop() if len(axes) == 1 else None


# Angles ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Angles:
    """The cosines and sines of a rotary embedding.

    Attributes:
        site: The rotary embedding.
        cos: Cosines per pair.
        sin: Sines per pair.
        batch: Size of the batch.
        positions: Number of positions.
        per_batch: Whether they differ between the sequences of a batch.
    """

    site: _Site
    cos: Table
    sin: Table
    batch: Dim
    positions: Dim
    per_batch: bool

    def inputs(self, builder: Builder, domain: str, source: ir.Value) -> list[ir.Value]:
        """Return the inputs of the operator of a domain."""
        cos, sin = (self._table(t, builder) for t in (self.cos, self.sin))
        if not domain:
            return [source, *(self._for_each(t, builder) for t in (cos, sin))]
        if not self.per_batch:  # where the first position is
            first = self.site.keep(("first",), builder, lambda b: b.ints("position", [0]))
            return [source, first, cos, sin]
        rows = self.site.keep(("rows", cos), builder, functools.partial(_rows, cos))
        return [source, rows, *(self.site.keep(("flat", t), builder, self._flat(t)) for t in (cos, sin))]

    def _table(self, of: Table, builder: Builder) -> ir.Value:
        """Return a table: (batch x) positions x pairs."""
        value = self.site.found.cos if of is self.cos else self.site.found.sin
        key = ("table", value, self.site.found.interleaved, self.site.found.per_pair)
        return self.site.keep(key, builder, functools.partial(self._make, of))

    def _make(self, of: Table, builder: Builder) -> ir.Value:
        def op(kind: str, *given: Any) -> ir.Value:
            return builder.constant(*given) if kind == "constant" else builder.op(kind, *given)

        made = of.make(op)
        pairs = of.shape[-1]
        wanted = (self.batch, self.positions, pairs) if self.per_batch else (self.positions, pairs)
        step = None if of.shape == wanted else reshape_step(of.shape, wanted)
        return made if step is None else builder.layout(made, [step])

    def _for_each(self, cache: ir.Value, builder: Builder) -> ir.Value:
        """Return a table for every sequence of the batch, as the standard operator wants it."""
        if self.per_batch:
            return cache

        def make(builder: Builder) -> ir.Value:
            if self.batch == 1:
                return builder.layout(cache, [Step("Unsqueeze", (0,), ())])
            batch = builder.ints("batch", [self.batch]) if isinstance(self.batch, int) else self._batch(builder)
            shape = builder.op("Concat", [batch, builder.ints("ones", [1, 1])], {"axis": 0})
            return builder.op("Expand", [cache, shape])

        return self.site.keep(("expanded", cache), builder, make)

    def _batch(self, builder: Builder) -> ir.Value:
        there = measured(self.batch, [self.site.found.x], self.site.scope.graph, self.site.shapes)
        assert there is not None, "the batch is an axis of x"
        return builder.size(*there)

    def _flat(self, cache: ir.Value) -> Callable[[Builder], ir.Value]:
        """Return what makes one table of those of all sequences."""
        return lambda builder: builder.op("Reshape", [cache, builder.ints("shape", [-1, self._pairs])])

    @property
    def _pairs(self) -> int:
        pairs = self.cos.shape[-1]
        assert isinstance(pairs, int)
        return pairs


def _rows(cache: ir.Value, builder: Builder) -> ir.Value:
    """Return for each sequence the rows of its positions in the table of all sequences."""
    sizes = builder.op("Concat", [builder.size(cache, 0), builder.size(cache, 1)], {"axis": 0})
    zero, one = builder.constant("zero", np.array(0, np.int64)), builder.constant("one", np.array(1, np.int64))
    total = builder.op("ReduceProd", [sizes], {"keepdims": 0})
    return builder.op("Reshape", [builder.op("Range", [zero, total, one]), sizes])


def _angles(site: _Site, placed: _Placed) -> _Angles | str:
    found, shapes = site.found, site.shapes
    if found.per_pair:
        cos, sin = _given(found.cos, shapes), _given(found.sin, shapes)
    else:
        cos = table(found.cos, shapes, interleaved=found.interleaved)
        sin = table(found.sin, shapes, interleaved=found.interleaved)
    if cos is None or sin is None or cos.negated or sin.negated is not found.signed or cos.shape != sin.shape:
        return "it is not known that both features of a pair are rotated by the same angle"
    pairs = cos.shape[-1]
    sizes = [d for d in cos.shape[:-1] if d != 1]
    if sizes not in ([placed.positions], [placed.batch, placed.positions]) or pairs == 1:
        return "the angles have other axes than positions and pairs"
    return _Angles(site, cos, sin, placed.batch, placed.positions, len(sizes) == 2)


def _given(value: ir.Value, shapes: Shapes) -> Table | None:
    shape = shapes.of(value)
    return None if shape is None else Table(shape, False, lambda op: value)


# Plain operators ---------------------------------------------------------------------------------------


def _without_minus(site: _Site) -> Found | None:
    """Move the minus of (-x2, x1) into the sines."""
    found = site.found
    last = site.shapes.of(found.sin)
    if found.per_pair or found.signed or found.interleaved or not last or not isinstance(last[-1], int):
        return None
    turned = _turned(found, site.node)
    rank = site.shapes.rank(found.x)
    if turned is None or rank is None:
        return None
    second, first = turned
    half = last[-1] // 2

    def signed(builder: Builder) -> ir.Value:
        signs = np.repeat(np.array([-1.0, 1.0]), half)
        dtype = site.shapes.dtype(found.sin)
        return builder.op("Mul", [found.sin, builder.constant("signs", signs, dtype)])

    def build(builder: Builder) -> ir.Value:
        sin = site.keep(("signed", found.sin), builder, signed)
        swapped = builder.op("Concat", [second, first], {"axis": rank - 1})
        rotated = builder.op("Mul", [swapped, sin])
        return builder.op("Add", [builder.op("Mul", [found.x, found.cos]), rotated])

    return Found(found.result, f"the minus in the rotary embedding of {found.x.name} moved into the sines", build)


def _turned(found: Rotation, node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return x2 and x1 of the Concat of -x2 and x1 that is multiplied with the sines."""
    for product in node.inputs:
        factors = product.producer() if product is not None else None
        if factors is None or not any(v is found.sin for v in factors.inputs):
            continue
        for value in factors.inputs:
            concat = value.producer() if value is not None else None
            if concat is None or not is_op(concat, "Concat") or concat.inputs[0] is None:
                continue
            negative = concat.inputs[0].producer()
            if negative is not None and is_op(negative, "Neg") and only_use(negative.outputs[0]) is not None:
                second, first = negative.inputs[0], concat.inputs[1]
                return None if second is None or first is None else (second, first)
    return None
