"""Attention becomes one operator where that is not slower, and the fewest plain operators elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import kernels
from onnxopt.analysis.attention import Attention, Heads, Operand, attention, dead_without, split_off
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Rearrangement, Step, is_layout, plan
from onnxopt.analysis.masks import CERTAIN, Term, is_causal, is_key_padding, term
from onnxopt.analysis.projections import Packed, packed
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import Axis, Leaf, View, measured, view, whole_factors
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, constant_ints, is_op, only_use
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

ATTENTION_OPSET = 23
"""Attention is a standard operator from this opset on."""
SPLIT_SIZES_AS_INPUT = 13
REDUCE_AXES_AS_INPUT = 18
MICROSOFT = "com.microsoft"
LOWEST = float(np.finfo(np.float32).min)
SAFE_LOW = LOWEST / 2
"""ONNX Runtime's Attention takes a row with nothing above the lowest number for one masked in full."""
CPU = "CPUExecutionProvider"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseAttention(GraphPass):
    """Fuse softmax(scale * Q K^T + masks) V (`analysis/attention.py`), however it is spelled.

    The result is the standard Attention operator where the opset has it. For the target "cpu" it may be one of
    ONNX Runtime's own: Attention with the projections of Q, K and V inside, GroupQueryAttention or
    MultiHeadAttention, where `analysis/kernels.py` says that it is not slower there. Elsewhere the attention is
    written with the fewest plain operators: one scale, no repeated keys and values, no layout twice. Rows that are
    masked in full give what they gave before.
    """

    name = "fuse-attention"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per attention."""
        shared: _Shared = {}
        rule = functools.partial(_rule, shared=shared)
        yield from rewrite(self.name, model, ctx, {"Softmax": [rule]})


_Shared: TypeAlias = dict[tuple[object, ...], ir.Value]
"""Values that several attentions need, such as masks of the full shape, once they are built."""


def _rule(node: ir.Node, scope: Scope, ctx: Context, *, shared: _Shared) -> Answer:
    found = attention(node, ctx.shapes)
    if found is None:
        return None
    if isinstance(found, str):
        return Refused(found)
    site = _Site.make(found, scope, ctx, shared)
    if isinstance(site, str):
        return Refused(site)
    reasons: list[str] = []
    for way in _ways(scope, ctx, reasons):
        made = way(site)
        if not isinstance(made, str):
            return Found(made.result, f"{_description(site)} as {made.name}", made.build)
        reasons.append(made)
    lean = _lean(site)
    if not isinstance(lean, str):
        return Found(lean.result, f"{_description(site)} with fewer plain operators", lean.build)
    return Refused(reasons[0] if reasons else lean)


def _ways(scope: Scope, ctx: Context, reasons: list[str]) -> list[Callable[[_Site], _Made | str]]:
    """Return how an attention may be written as one operator, the fastest first."""
    ways: dict[str, Callable[[_Site], _Made | str]] = {}
    if scope.opset >= ATTENTION_OPSET:
        ways["Attention"] = _standard
    else:
        reasons.append(f"the standard Attention operator needs opset {ATTENTION_OPSET}; raise it with --opset")
    if ctx.target == "cuda":
        reasons.append("the attention operators of ONNX Runtime were not measured on cuda")
    if ctx.target == "cpu":
        ways[f"{MICROSOFT}.Attention"] = _with_projections
        ways[f"{MICROSOFT}.GroupQueryAttention"] = _grouped
        ways[f"{MICROSOFT}.MultiHeadAttention"] = _multi_head
    measured = {name: kernels.ratio(name, CPU) for name in ways}
    for name, ratio in measured.items():
        if ratio is None or ratio > kernels.NOT_SLOWER:
            reasons.append(f"{name} was not measured to be as fast as plain operators")
    fast = [name for name, ratio in measured.items() if ratio is not None and ratio <= kernels.NOT_SLOWER]
    return [ways[name] for name in sorted(fast, key=lambda n: measured[n] or 0)]


def _description(site: _Site) -> str:
    found = site.found
    shared = f" ({found.key.heads} of K and V)" if found.groups != 1 else ""
    masked = ", causal" if site.causal else ", masked" if site.terms else ""
    return f"attention with {found.heads} heads{shared}{masked}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
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
class _Site:
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
    shared: _Shared
    tails: tuple[ir.Value, ...]

    @classmethod
    def make(cls, found: Attention, scope: Scope, ctx: Context, shared: _Shared) -> _Site | str:
        """Read the masks, and follow the result."""
        if ctx.shapes.dtype(found.result) != ir.DataType.FLOAT:
            return "only attention in float32 is rewritten"
        terms: list[Term] = []
        for mask in found.masks:
            read = term(mask, ctx.shapes)
            if isinstance(read, str):
                return read
            terms.append(read)
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


# Layout ------------------------------------------------------------------------------------------------


def _flat(heads: Heads) -> tuple[Step, ...] | None:
    """Return the layout nodes that make an operand batch x length x (heads * size)."""
    return _steps(heads.view, (heads.batch, heads.length, (*heads.heads, *heads.size)))


def _apart(heads: Heads) -> tuple[Step, ...] | None:
    """Return the layout nodes that make an operand batch x heads x length x size."""
    return _steps(heads.view, (heads.batch, heads.heads, heads.length, heads.size))


def _steps(seen: View, after: Sequence[Axis]) -> tuple[Step, ...] | None:
    wanted = seen.rearrangement(after)
    return None if wanted is None else plan(wanted)


@dataclasses.dataclass(frozen=True, slots=True)
class _Tail:
    """How a value is made from what an attention operator gives."""

    value: ir.Value
    steps: tuple[Step, ...]


def _tail(site: _Site, groups: Callable[[_Result], tuple[Axis, ...] | None]) -> _Tail | None:
    """Return the farthest tail that constants can express, from a result with these axes."""
    for value in site.tails:
        result = _Result.of(value, site)
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
            return _Tail(value, steps)
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Result:
    """A rearranged result: its axes in leaves of batch, heads, length and size."""

    batch: Axis
    heads: Axis
    length: Axis
    size: Axis
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, value: ir.Value, site: _Site) -> _Result | None:
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
        return (self.batch, self.length, (*self.heads, *self.size))

    @property
    def apart(self) -> tuple[Axis, ...]:
        return (self.batch, self.heads, self.length, self.size)


def _told_apart(axes: tuple[Axis, ...], axis: int, outer: Dim, inner: Dim) -> tuple[Axis, ...]:
    """Split the leaf that counts a whole axis of the result into an outer and an inner one."""
    if outer == 1 or inner == 1:
        return axes
    joint = Leaf(axis, 1, outer * inner)
    parts = (Leaf(axis, inner, outer), Leaf(axis, 1, inner))
    return tuple(tuple(part for leaf in a for part in (parts if leaf == joint else (leaf,))) for a in axes)


# Masks -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Bias:
    """The masks as one tensor of four axes that ends in queries x keys.

    Attributes:
        terms: The masks.
        fills: What each adds where its condition does not hold; None to add it as it is.
        clamp: No element may be lower than this; None for no such limit.
        expand: Which of the last two axes have to be stretched.
    """

    site: _Site
    terms: tuple[Term, ...]
    fills: tuple[float | None, ...]
    clamp: float | None
    expand: tuple[bool, bool]

    def build(self, builder: Builder) -> ir.Value:
        """Return the tensor, shared with other attentions."""
        parts = tuple(
            (t.value if t.condition is None else t.condition, t.inverted, t.fill if f is None else f)
            for t, f in zip(self.terms, self.fills, strict=True)
        )
        return self.site.keep(("bias", parts, self.clamp, self.expand), self._make, builder)

    def _make(self, builder: Builder) -> ir.Value:
        values = [_addend(t, f, builder) for t, f in zip(self.terms, self.fills, strict=True)]
        total = values[0]
        for value in values[1:]:
            total = builder.op("Add", [total, value])
        if self.clamp is not None:
            total = builder.op("Max", [total, builder.constant("lowest", self.clamp, ir.DataType.FLOAT)])
        rank = max(len(t.shape) for t in self.terms)
        if rank < 4:
            total = _unsqueezed(builder, total, range(4 - rank))
        elif rank == 5:
            total = builder.layout(total, [Step("Squeeze", (1,), ())])
        if any(self.expand):
            total = builder.op("Expand", [total, self._full(builder)])
        return total

    def _full(self, builder: Builder) -> ir.Value:
        """Return the shape that stretches the mask to queries x keys."""
        sizes = [self.site.found.queries, self.site.found.keys]
        wanted = [1, 1, *(size if grow else 1 for size, grow in zip(sizes, self.expand, strict=True))]
        return _shape_of(wanted, self.site, builder)


def _addend(t: Term, fill: float | None, builder: Builder) -> ir.Value:
    """Return what a mask adds, or 0 and `fill` instead."""
    if fill is None and t.value is not None:
        return t.value
    zero = builder.constant("zero", 0, ir.DataType.FLOAT)
    other = builder.constant("masked", t.fill if fill is None else fill, ir.DataType.FLOAT)
    return builder.op("Where", [t.condition, other, zero] if t.inverted else [t.condition, zero, other])


def _unsqueezed(builder: Builder, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    return builder.layout(value, [Step("Unsqueeze", tuple(axes), ())])


def _shape_of(sizes: Sequence[Dim], site: _Site, builder: Builder) -> ir.Value:
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


def _bias(site: _Site, *, guarded_zero: bool = False) -> _Bias | str | None:
    """Return the masks as one tensor, None when there are none, or why they cannot be.

    Args:
        site: The attention.
        guarded_zero: Rows with nothing above the lowest number give 0, as the standard operator has it.
    """
    if not site.terms:
        return None
    fits = _stretch(site)
    if isinstance(fits, str):
        return fits
    if not guarded_zero:
        if site.guarded:
            return "a guard turns the NaN of rows masked in full into 0"
        return _Bias(site, site.terms, (None,) * len(site.terms), None, fits)
    return _bias_of_standard(site, fits)


def _bias_of_standard(site: _Site, expand: tuple[bool, bool]) -> _Bias | str:
    """Return the masks for an operator that gives 0 for rows with nothing above the lowest number."""
    if len(site.terms) > 1:
        lows = [t.low for t in site.terms if t.low is not None]
        if site.found.guard is None and len(lows) == len(site.terms) and sum(lows) > 2 * SAFE_LOW * 0.9:
            return _Bias(site, site.terms, (None,) * len(lows), None, expand)
        return "masks are added up, and a row may be masked in full"
    t = site.terms[0]
    if t.row_kept or (t.low is not None and t.low > 0.9 * LOWEST):
        return _Bias(site, site.terms, (None,), None, expand)
    if site.found.guard is not None and t.may_lose_rows:
        known = t.condition is not None and t.fill == -math.inf
        return _Bias(site, site.terms, (None,), None, expand) if known else "it is not known what a guard does"
    if t.condition is not None:
        if t.fill == -math.inf:
            return "a row masked in full gives NaN, and the operator would give 0"
        return _Bias(site, site.terms, (SAFE_LOW,), None, expand)
    return _Bias(site, site.terms, (None,), SAFE_LOW, expand)


def _stretch(site: _Site) -> tuple[bool, bool] | str:
    """Return which of the last two axes of the summed masks have to be stretched, or why the masks do not fit."""
    found = site.found
    rank = site.shapes.rank(found.product.outputs[0]) or 0
    ranks = [len(t.shape) for t in site.terms]
    if max(ranks) < 2 or max(ranks) > 5 or (max(ranks) == 5 and min(ranks) < 5):
        return "the masks have other axes than batch x heads x queries x keys"
    sizes: list[Dim] = [1] * (4 - max(ranks))
    for axis in range(-max(ranks), 0):
        own = {t.shape[axis] for t in site.terms if len(t.shape) >= -axis} - {1}
        if len(own) > 1:
            return "the masks have different shapes"
        sizes.append(next(iter(own), 1))
    if rank == 5 and (sizes[-3] != 1 or sizes[-4] != 1):
        return "the masks differ between heads"
    if len(sizes) == 5:
        del sizes[1]
    wanted = (found.batch, found.heads, found.queries, found.keys)
    if any(size not in (1, full) for size, full in zip(sizes, wanted, strict=True)):
        return "the masks have other axes than batch x heads x queries x keys"
    return sizes[2] != found.queries, sizes[3] != found.keys


# The standard operator ---------------------------------------------------------------------------------


def _standard(site: _Site) -> _Made | str:
    """Write the attention as the standard operator."""
    found = site.found
    heads, kv_heads = site.heads, site.kv_heads
    if heads is None or kv_heads is None:
        return "the number of heads is not known"
    bias = None if site.causal and not site.guarded else _bias(site, guarded_zero=True)
    if isinstance(bias, str):
        return bias
    flat, apart = _flat_inputs(site), _apart_inputs(site)
    tails = _tail(site, lambda r: r.flat), _tail(site, lambda r: r.apart)
    ways = [
        (inputs.cost + len(tail.steps) - len(site.tails) + site.tails.index(tail.value), inputs, tail)
        for inputs, tail in zip((flat, apart), tails, strict=True)
        if inputs is not None and tail is not None
    ]
    if not ways:
        return "constants cannot express how Q, K, V or the result are arranged"
    _, inputs, tail = min(ways, key=lambda way: way[0])
    attributes: dict[str, int | float] = {"scale": found.scale}
    if inputs is flat:
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
    if bias is None and site.terms:
        attributes["is_causal"] = 1

    def build(builder: Builder) -> ir.Value:
        operands = inputs.build(builder)
        masks = [] if bias is None else [bias.build(builder)]
        return builder.layout(builder.op("Attention", [*operands, *masks], attributes), tail.steps)

    return _Made("Attention", tail.value, build)


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
    """How Q, K and V are made for an operator.

    Attributes:
        cost: How many nodes that takes.
        build: Makes them.
        joint: The value that holds Q, K and V side by side, or None.
    """

    cost: int
    build: Callable[[Builder], list[ir.Value]]
    joint: ir.Value | None = None


def _operands(site: _Site) -> tuple[Operand, Operand, Operand]:
    return site.found.query, site.found.key, site.found.value


def _arranged(site: _Site, how: Callable[[Heads], tuple[Step, ...] | None]) -> _Inputs | None:
    plans = [(o.near.view.source, how(o.near)) for o in _operands(site)]
    known = [(source, steps) for source, steps in plans if steps is not None]
    if len(known) < len(plans):
        return None
    return _Inputs(
        sum(len(steps) for _, steps in known), lambda b: [b.layout(source, steps) for source, steps in known]
    )


def _apart_inputs(site: _Site) -> _Inputs | None:
    return _arranged(site, _apart)


def _flat_inputs(site: _Site) -> _Inputs | None:
    """Return Q, K and V as batch x length x (heads * size): rearranged, or cut out of what holds all three."""
    near, cut = _arranged(site, _flat), _cut(site)
    if cut is None or (near is not None and near.cost <= cut.cost):
        return near
    return cut


def _cut(site: _Site) -> _Inputs | None:
    """Return Q, K and V as a Split of the last axis of what holds all three side by side, in this order."""
    source = site.found.query.root.view.source
    shape = site.shapes.of(source)
    if shape is None or len(shape) != 3:
        return None
    sizes: list[int] = []
    for operand in _operands(site):
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

    return _Inputs(1, build, source)


# ONNX Runtime's operators ------------------------------------------------------------------------------


def _with_projections(site: _Site) -> _Made | str:
    """Write the attention and the projections of its inputs as com.microsoft.Attention."""
    found = site.found
    if site.heads is None or found.groups != 1 or found.queries != found.keys:
        return "com.microsoft.Attention needs as many heads and positions in K and V as in Q"
    tail = _tail(site, lambda r: r.flat)
    if tail is None or not isinstance(found.size, int) or not isinstance(found.value_size, int):
        return "constants cannot express how the result is arranged"
    parts = packed(_operands(site), site.dead(tail.value), site.shapes)
    if isinstance(parts, str):
        return parts
    mask = _contrib_mask(site)
    if isinstance(mask, str):
        return mask
    attributes: dict[str, object] = {"num_heads": site.heads, "scale": found.scale, **mask.attributes}
    if found.value_size != found.size:
        sizes = [site.heads * found.size] * 2 + [site.heads * found.value_size]
        attributes["qkv_hidden_sizes"] = sizes

    def build(builder: Builder) -> ir.Value:
        x = builder.layout(parts.x, parts.steps)
        weight, bias = _packed_weights(parts, builder)
        inputs = [x, weight, bias, mask.padding(builder), None, mask.bias(builder)]
        made = builder.op("Attention", _trimmed(inputs), attributes, domain=MICROSOFT)
        return builder.layout(mask.finish(builder, made), tail.steps)

    return _Made("com.microsoft.Attention", tail.value, build)


def _packed_weights(parts: Packed, builder: Builder) -> tuple[ir.Value, ir.Value | None]:
    weight = parts.weight if parts.weight is not None else builder.tensor("qkv_weight", parts.weight_tensor())
    if parts.weight is not None or not parts.has_bias:
        return weight, parts.bias
    return weight, builder.constant("qkv_bias", parts.bias_array())


def _trimmed(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Leave out missing inputs at the end."""
    kept = list(inputs)
    while kept[-1] is None:
        kept.pop()
    return kept


@dataclasses.dataclass(frozen=True, slots=True)
class _ContribMask:
    """The masks for an operator of ONNX Runtime.

    Attributes:
        site: The attention.
        attributes: What is said about them in attributes.
        whole: The masks as one tensor, or None.
        keys: A condition on keys alone, or None.
        zeroed: Rows masked in full become 0 after the operator.
    """

    site: _Site
    attributes: dict[str, object]
    whole: _Bias | None = None
    keys: Term | None = None
    zeroed: Term | None = None

    def bias(self, builder: Builder) -> ir.Value | None:
        """Return the input attention_bias."""
        return None if self.whole is None else self.whole.build(builder)

    def padding(self, builder: Builder) -> ir.Value | None:
        """Return the input key_padding_mask."""
        if self.keys is None:
            return None
        keys = self.keys

        def make(builder: Builder) -> ir.Value:
            condition = builder.op("Not", [keys.condition]) if keys.inverted else keys.condition
            assert condition is not None
            flat = builder.layout(condition, [Step("Squeeze", (1, 2), ())])
            return builder.op("Cast", [flat], {"to": ir.DataType.INT32})

        return self.site.keep(("padding", keys.condition, keys.inverted), make, builder)

    def finish(self, builder: Builder, result: ir.Value) -> ir.Value:
        """Set rows of batch x queries x features to 0 that are masked in full."""
        if self.zeroed is None:
            return result
        return builder.op("Mul", [result, _row_factor(self.site, self.zeroed, builder, flat=True)])


def _contrib_mask(site: _Site) -> _ContribMask | str:
    """Return how the masks are given to an operator of ONNX Runtime."""
    if site.causal and not site.guarded:
        return _ContribMask(site, {"unidirectional": 1, "mask_filter_value": LOWEST})
    terms, zeroed = site.terms, None
    if site.guarded:
        t = terms[0]
        if len(terms) > 1 or t.condition is None or t.fill != -math.inf or len(t.shape) != 4 or t.shape[1] != 1:
            return "a guard turns the NaN of rows masked in full into 0"
        zeroed = t
        terms = (dataclasses.replace(t, fill=LOWEST, value=None, low=LOWEST),)
        site = dataclasses.replace(site, terms=terms)
    certain = len(terms) == 1 and math.isfinite(terms[0].fill) and terms[0].fill <= CERTAIN
    if certain and is_key_padding(terms[0], site.found.batch, site.found.keys):
        return _ContribMask(site, {"mask_filter_value": terms[0].fill}, keys=terms[0], zeroed=zeroed)
    if zeroed is not None:
        fits = _stretch(site)
        whole = fits if isinstance(fits, str) else _Bias(site, terms, (None,), None, fits)
    else:
        whole = _bias(site)  # type: ignore[assignment]
    return whole if isinstance(whole, str) else _ContribMask(site, {}, whole=whole, zeroed=zeroed)


def _row_factor(site: _Site, t: Term, builder: Builder, *, flat: bool) -> ir.Value:
    """Return 1 for rows with a key that counts, else 0: batch x queries x 1, or with an axis for heads."""

    def make(builder: Builder) -> ir.Value:
        condition = builder.op("Not", [t.condition]) if t.inverted else t.condition
        number = builder.op("Cast", [condition], {"to": ir.DataType.FLOAT})
        if site.scope.opset >= REDUCE_AXES_AS_INPUT:
            kept = builder.op("ReduceMax", [number, builder.ints("axes", [-1])], {"keepdims": 1})
        else:
            kept = builder.op("ReduceMax", [number], {"axes": [-1], "keepdims": 1})
        return builder.layout(kept, [Step("Squeeze", (1,), ())]) if flat else kept

    return site.keep(("rows", t.condition, t.inverted, flat), make, builder)


def _multi_head(site: _Site) -> _Made | str:
    """Write the attention as com.microsoft.MultiHeadAttention."""
    found = site.found
    if site.heads is None or found.groups != 1:
        return "com.microsoft.MultiHeadAttention needs as many heads in K and V as in Q"
    tail = _tail(site, lambda r: r.flat)
    flat = _flat_inputs(site)
    mixed = _mixed_inputs(site)
    ways = [way for way in (flat, mixed) if way is not None]
    if tail is None or not ways:
        return "constants cannot express how Q, K, V or the result are arranged"
    inputs = min(ways, key=lambda way: way.cost)
    if site.causal and found.queries != found.keys:
        return "com.microsoft.MultiHeadAttention hides later keys only where there are as many as queries"
    mask = _contrib_mask(site)
    if isinstance(mask, str):
        return mask
    attributes = {"num_heads": site.heads, "scale": found.scale, **mask.attributes}

    def build(builder: Builder) -> ir.Value:
        operands = inputs.build(builder)
        wanted = [*operands, None, mask.padding(builder), mask.bias(builder)]
        made = builder.op("MultiHeadAttention", _trimmed(wanted), attributes, domain=MICROSOFT)
        return builder.layout(mask.finish(builder, made), tail.steps)

    return _Made("com.microsoft.MultiHeadAttention", tail.value, build)


def _mixed_inputs(site: _Site) -> _Inputs | None:
    """Return Q as batch x length x features, K and V with their heads apart, as a cache has them."""
    query = _flat(site.found.query.near)
    others = [(o.near.view.source, _apart(o.near)) for o in _operands(site)[1:]]
    known = [(source, steps) for source, steps in others if steps is not None]
    if query is None or len(known) < 2:
        return None
    source = site.found.query.near.view.source
    cost = len(query) + sum(len(steps) for _, steps in known)
    return _Inputs(cost, lambda b: [b.layout(source, query), *(b.layout(s, steps) for s, steps in known)])


def _grouped(site: _Site) -> _Made | str:
    """Write the attention as com.microsoft.GroupQueryAttention, rotary embeddings included."""
    found, name = site.found, "com.microsoft.GroupQueryAttention"
    if site.heads is None or site.kv_heads is None or found.queries != found.keys:
        return f"{name} needs as many positions in K and V as in Q"
    if not isinstance(found.size, int) or found.size % 8 or found.size != found.value_size:
        return f"{name} needs heads of one size, a multiple of 8"
    if site.guarded:
        return "a guard turns the NaN of rows masked in full into 0"
    bias = None if site.causal or not site.terms else _bias(site)
    tail = _tail(site, lambda r: r.flat)
    if isinstance(bias, str) or tail is None:
        return bias if isinstance(bias, str) else "constants cannot express how the result is arranged"
    rotary = _rotary(site)
    if rotary is not None:
        query, key = (
            dataclasses.replace(o, near=h, root=h) for o, h in zip(_operands(site), rotary.heads, strict=False)
        )
        site = dataclasses.replace(site, found=dataclasses.replace(found, query=query, key=key))
    inputs = _joint_inputs(site, tail.value)
    if inputs is None:
        return "constants cannot express how Q, K and V are arranged"
    attributes: dict[str, object] = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": found.scale,
        "causal": int(site.causal),
        "do_rotary": int(rotary is not None),
        "rotary_interleaved": int(rotary is not None and rotary.interleaved),
    }

    def build(builder: Builder) -> ir.Value:
        operands: list[ir.Value | None] = list(inputs.build(builder))
        operands += [None] * (5 - len(operands))
        caches: list[ir.Value | None] = [None, None] if rotary is None else [rotary.cos, rotary.sin]
        wanted = [
            *operands,
            *_lengths(site, builder),
            *caches,
            None,
            None if bias is None else bias.build(builder),
        ]
        made = builder.op("GroupQueryAttention", _trimmed(wanted), attributes, domain=MICROSOFT)
        return builder.layout(made, tail.steps)

    return _Made(name, tail.value, build)


def _joint_inputs(site: _Site, result: ir.Value) -> _Inputs | None:
    """Return Q, K and V side by side where they are computed together or can be, else each by itself."""
    cut, near = _cut(site), _arranged(site, _flat)
    if cut is not None and cut.joint is not None:
        joint = cut.joint
        return _Inputs(0, lambda b: [joint])
    parts = packed(_operands(site), site.dead(result), site.shapes)
    if isinstance(parts, str):
        return near

    def build(builder: Builder) -> list[ir.Value]:
        weight, bias = _packed_weights(parts, builder)
        made = builder.op("MatMul", [builder.layout(parts.x, parts.steps), weight])
        return [made if bias is None else builder.op("Add", [made, bias])]

    return _Inputs(1, build)


def _lengths(site: _Site, builder: Builder) -> list[ir.Value]:
    """Return for each sequence its length less 1, and the common length, as int32."""
    batch, keys = site.found.batch, site.found.keys

    def lengths(builder: Builder) -> ir.Value:
        if isinstance(batch, int) and isinstance(keys, int):
            return builder.constant("lengths", np.full(batch, keys - 1, np.int32))
        last = builder.op("Sub", [_shape_of([keys], site, builder), builder.ints("one", [1])])
        each = builder.op("Expand", [last, _shape_of([batch], site, builder)])
        return builder.op("Cast", [each], {"to": ir.DataType.INT32})

    def total(builder: Builder) -> ir.Value:
        if isinstance(keys, int):
            return builder.constant("length", np.array(keys, np.int32))
        one = builder.layout(_shape_of([keys], site, builder), [Step("Squeeze", (0,), ())])
        return builder.op("Cast", [one], {"to": ir.DataType.INT32})

    return [
        site.keep(("lengths", batch, keys), lengths, builder),
        site.keep(("length", keys), total, builder),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Rotary:
    """The rotary embedding of Q and K: what is rotated, and by which angles."""

    heads: tuple[Heads, Heads]
    cos: ir.Value
    sin: ir.Value
    interleaved: bool


def _rotary(site: _Site) -> _Rotary | None:
    """Return the same rotary embedding of both Q and K by position, as GroupQueryAttention has it inside."""
    nodes: list[ir.Node] = []
    rotated: list[Heads] = []
    for operand in _operands(site)[:2]:
        node = operand.near.view.source.producer()
        if node is None or not is_op(node, "RotaryEmbedding", domain=MICROSOFT) or len(node.inputs) != 4:
            return None
        source, position = node.inputs[0], node.inputs[1]
        # Only from position 0 on, and only whole heads, in a tensor whose features are the heads side by side.
        flat = operand.near.view.shape
        if source is None or constant_ints(position) != (0,) or len(flat) != 3:
            return None
        size = attribute(node, "rotary_embedding_dim", 0)
        if size not in (0, site.found.size) or attribute(node, "scale", 1.0) != 1.0 or _flat(operand.near) != ():
            return None
        nodes.append(node)
        seen = dataclasses.replace(operand.near.view, source=source)
        rotated.append(dataclasses.replace(operand.near, view=seen))
    first, second = nodes
    cos, sin = first.inputs[2], first.inputs[3]
    if cos is None or sin is None or second.inputs[2] is not cos or second.inputs[3] is not sin:
        return None
    if attribute(first, "interleaved", 0) != attribute(second, "interleaved", 0):
        return None
    return _Rotary((rotated[0], rotated[1]), cos, sin, bool(attribute(first, "interleaved", 0)))


# Plain operators ---------------------------------------------------------------------------------------


def _lean(site: _Site) -> _Made | str:
    """Write the attention with plain operators, if that takes fewer of them."""
    found = site.found
    grouped = found.groups != 1
    if grouped and any((len(t.shape) > 3 and t.shape[1] != 1) or len(t.shape) > 4 for t in site.terms):
        return "the masks differ between the heads that share one of K and V"
    query, key, value = _lean_steps(site)
    tail = _tail(site, _by_group(site) if grouped else lambda r: r.apart)
    if query is None or key is None or value is None or tail is None:
        return "constants cannot express how Q, K, V or the result are arranged"
    rows = _guarded_rows(site)
    if isinstance(rows, str) and found.guard is None:
        return rows
    new = len(query) + len(key) + len(value) + len(tail.steps) + (found.scale != 1) + len(site.terms) + 3
    new += 0 if not site.guarded else 2 if isinstance(rows, str) else 1
    if new >= len(site.dead(tail.value, keep_operands=True)):
        return "the attention has the fewest plain operators already"

    def build(builder: Builder) -> ir.Value:
        q = builder.layout(found.query.near.view.source, query)
        if found.scale != 1:
            q = builder.op("Mul", [q, builder.constant("scale", found.scale, ir.DataType.FLOAT)])
        scores = builder.op("MatMul", [q, builder.layout(found.key.near.view.source, key)])
        for mask, t in zip(found.masks, site.terms, strict=True):
            scores = _masked(site, scores, mask.fill, t, rows, builder)
        weights = builder.op("Softmax", [scores], {"axis": -1})
        if site.guarded and isinstance(rows, str):
            zero = builder.constant("zero", 0, ir.DataType.FLOAT)
            weights = builder.op("Where", [builder.op("IsNaN", [weights]), zero, weights])
        result = builder.op("MatMul", [weights, builder.layout(found.value.near.view.source, value)])
        if isinstance(rows, Term):
            factor = _row_factor(site, rows, builder, flat=False)
            result = builder.op("Mul", [result, _with_group_axis(site, factor, rows.shape, builder)])
        return builder.layout(result, tail.steps)

    return _Made("plain operators", tail.value, build)


def _guarded_rows(site: _Site) -> Term | str | None:
    """Return the mask whose rows become 0 after the products, cheaper than a guard; None without a guard."""
    if not site.guarded:
        return None
    t = site.terms[0]
    if len(site.terms) > 1 or t.condition is None or t.fill != -math.inf or len(t.shape) != 4 or t.shape[1] != 1:
        return "the guard stays"
    return t


def _masked(
    site: _Site, scores: ir.Value, fill: float | None, t: Term, rows: Term | str | None, builder: Builder
) -> ir.Value:
    """Apply one mask to the scores."""
    if isinstance(rows, Term):
        finite = dataclasses.replace(t, fill=LOWEST, value=None)
        key = ("finite", t.condition, t.inverted)
        mask = site.keep(key, functools.partial(_addend, finite, None), builder)
        return builder.op("Add", [scores, _with_group_axis(site, mask, t.shape, builder)])
    if fill is None:
        assert t.value is not None
        return builder.op("Add", [scores, _with_group_axis(site, t.value, t.shape, builder)])
    assert t.condition is not None
    condition = _with_group_axis(site, t.condition, t.shape, builder)
    other = builder.constant("masked", fill, ir.DataType.FLOAT)
    return builder.op("Where", [condition, other, scores] if t.inverted else [condition, scores, other])


def _with_group_axis(site: _Site, mask: ir.Value, shape: tuple[Dim, ...], builder: Builder) -> ir.Value:
    """Insert the axis of the heads that share one of K and V into a mask that has an axis for the batch."""
    if site.found.groups == 1 or len(shape) < 4:
        return mask
    return site.keep(("grouped", mask), lambda b: _unsqueezed(b, mask, [1]), builder)


_Plan: TypeAlias = tuple[Step, ...] | None


def _lean_steps(site: _Site) -> tuple[_Plan, _Plan, _Plan]:
    """Return the layout of Q, K and V for the two products; K with its last axes swapped.

    Heads that share one of K and V get an axis of their own, along which K and V have one element.
    """
    found = site.found
    q, k, v = (o.near for o in _operands(site))
    if found.groups == 1:
        return _apart(q), _steps(k.view, (k.batch, k.heads, k.size, k.length)), _apart(v)
    outer = split_off(list(q.heads), found.key.heads)
    query = None if outer is None else _steps(q.view, (q.batch, *outer, q.length, q.size))
    key = _steps(k.view, (k.batch, k.heads, (), k.size, k.length))
    if key is None or len(key) > 2:  # the runtime makes a transposition of the last axes part of the product
        straight = _steps(k.view, (k.batch, k.heads, (), k.length, k.size))
        turned = None if straight is None else (*straight, Step("Transpose", (0, 1, 2, 4, 3), ()))
        key = turned if key is None or (turned is not None and len(turned) <= len(key)) else key
    return query, key, _steps(v.view, (v.batch, v.heads, (), v.length, v.size))


def _by_group(site: _Site) -> Callable[[_Result], tuple[Axis, ...] | None]:
    def groups(result: _Result) -> tuple[Axis, ...] | None:
        outer = split_off(list(result.heads), site.found.key.heads)
        if outer is None or {*outer[0], *outer[1]} != set(result.heads):
            return None
        return (result.batch, *outer, result.length, result.size)

    return groups
