"""Attention becomes one operator where that is not slower, and the fewest plain operators elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import onnx_ir as ir

from onnxopt.analysis import kernels
from onnxopt.analysis.attention import attention, split_off
from onnxopt.analysis.attention_contrib import MICROSOFT, grouped_query, multi_head, with_projections
from onnxopt.analysis.attention_masks import LOWEST, added_bias, addend, row_factor, unsqueezed
from onnxopt.analysis.attention_site import (
    Result,
    Shared,
    Site,
    Written,
    apart_inputs,
    apart_steps,
    flat_inputs,
    operands,
    steps_to,
    tail_from,
)
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Step
from onnxopt.analysis.masks import Term
from onnxopt.analysis.views import Axis
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

ATTENTION_OPSET = 23
"""Attention is a standard operator from this opset on."""
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
        shared: Shared = {}
        rule = functools.partial(_rule, shared=shared)
        yield from rewrite(self.name, model, ctx, {"Softmax": [rule]})


def _rule(node: ir.Node, scope: Scope, ctx: Context, *, shared: Shared) -> Answer:
    found = attention(node, ctx.shapes, scope.opset)
    if found is None:
        return None
    if isinstance(found, str):
        return Refused(found)
    site = Site.make(found, scope, ctx, shared)
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


def _ways(scope: Scope, ctx: Context, reasons: list[str]) -> list[Callable[[Site], Written | str]]:
    """Return how an attention may be written as one operator, the one that takes in most first."""
    ways: dict[str, Callable[[Site], Written | str]] = {}
    if scope.opset >= ATTENTION_OPSET:
        ways["Attention"] = _standard
    else:
        reasons.append(f"the standard Attention operator needs opset {ATTENTION_OPSET}; raise it with --opset")
    if ctx.target == "cuda":
        reasons.append("the attention operators of ONNX Runtime were not measured on cuda")
    if ctx.target == "cpu":
        ways[f"{MICROSOFT}.Attention"] = with_projections
        ways[f"{MICROSOFT}.GroupQueryAttention"] = grouped_query
        ways[f"{MICROSOFT}.MultiHeadAttention"] = multi_head
    measured = {name: kernels.ratio(name, CPU) for name in ways}
    for name, ratio in measured.items():
        if ratio is None or ratio > kernels.NOT_SLOWER:
            reasons.append(f"{name} was not measured to be as fast as plain operators")
    return [ways[n] for n, ratio in measured.items() if ratio is not None and ratio <= kernels.NOT_SLOWER]


def _description(site: Site) -> str:
    found = site.found
    shared = f" ({found.key.heads} of K and V)" if found.groups != 1 else ""
    masked = ", causal" if site.causal else ", masked" if site.terms else ""
    return f"attention with {found.heads} heads{shared}{masked}"


def _standard(site: Site) -> Written | str:
    """Write the attention as the standard operator."""
    found = site.found
    heads, kv_heads = site.heads, site.kv_heads
    if heads is None or kv_heads is None:
        return "the number of heads is not known"
    bias = None if site.causal and not site.guarded else added_bias(site, guarded_zero=True)
    if isinstance(bias, str):
        return bias
    flat, apart = flat_inputs(site), apart_inputs(site)
    tails = tail_from(site, lambda r: r.flat), tail_from(site, lambda r: r.apart)
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
        for value in operands:  # ONNX infers a wrong shape for the result when it does not know theirs
            value.shape = value.shape or site.shapes.ir_shape(value)
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        masks = [] if bias is None else [bias.build(builder)]
        return builder.layout(builder.op("Attention", [*operands, *masks], attributes), tail.steps)

    return Written("Attention", tail.value, build)


def _lean(site: Site) -> Written | str:
    """Write the attention with plain operators, if that takes fewer of them."""
    found = site.found
    grouped = found.groups != 1
    if grouped and any((len(t.shape) > 3 and t.shape[1] != 1) or len(t.shape) > 4 for t in site.terms):
        return "the masks differ between the heads that share one of K and V"
    query, key, value = _lean_steps(site)
    tail = tail_from(site, _by_group(site) if grouped else lambda r: r.apart)
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
        weights = builder.op("Softmax", [scores], {"axis": 4 if grouped else 3})
        if site.guarded and isinstance(rows, str):
            zero = builder.constant("zero", 0, ir.DataType.FLOAT)
            weights = builder.op("Where", [builder.op("IsNaN", [weights]), zero, weights])
        result = builder.op("MatMul", [weights, builder.layout(found.value.near.view.source, value)])
        if isinstance(rows, Term):
            factor = row_factor(site, rows, builder, flat=False)
            result = builder.op("Mul", [result, _with_group_axis(site, factor, rows.shape, builder)])
        return builder.layout(result, tail.steps)

    return Written("plain operators", tail.value, build)


def _guarded_rows(site: Site) -> Term | str | None:
    """Return the mask whose rows become 0 after the products, cheaper than a guard; None without a guard."""
    if not site.guarded:
        return None
    t = site.terms[0]
    if len(site.terms) > 1 or t.condition is None or t.fill != -math.inf or len(t.shape) != 4 or t.shape[1] != 1:
        return "the guard stays"
    return t


def _masked(
    site: Site, scores: ir.Value, fill: float | None, t: Term, rows: Term | str | None, builder: Builder
) -> ir.Value:
    """Apply one mask to the scores."""
    if isinstance(rows, Term):
        finite = dataclasses.replace(t, fill=LOWEST, value=None)
        key = ("finite", t.condition, t.inverted)
        mask = site.keep(key, functools.partial(addend, finite, None), builder)
        return builder.op("Add", [scores, _with_group_axis(site, mask, t.shape, builder)])
    if fill is None:
        assert t.value is not None
        return builder.op("Add", [scores, _with_group_axis(site, t.value, t.shape, builder)])
    assert t.condition is not None
    condition = _with_group_axis(site, t.condition, t.shape, builder)
    other = builder.constant("masked", fill, ir.DataType.FLOAT)
    return builder.op("Where", [condition, other, scores] if t.inverted else [condition, scores, other])


def _with_group_axis(site: Site, mask: ir.Value, shape: tuple[Dim, ...], builder: Builder) -> ir.Value:
    """Insert the axis of the heads that share one of K and V into a mask that has an axis for the batch."""
    if site.found.groups == 1 or len(shape) < 4:
        return mask
    return site.keep(("grouped", mask), lambda b: unsqueezed(b, mask, [1]), builder)


_Plan: TypeAlias = tuple[Step, ...] | None


def _lean_steps(site: Site) -> tuple[_Plan, _Plan, _Plan]:
    """Return the layout of Q, K and V for the two products; K with its last axes swapped.

    Heads that share one of K and V get an axis of their own, along which K and V have one element.
    """
    found = site.found
    q, k, v = (o.near for o in operands(site))
    if found.groups == 1:
        return apart_steps(q), steps_to(k.view, (k.batch, k.heads, k.size, k.length)), apart_steps(v)
    outer = split_off(list(q.heads), found.key.heads)
    query = None if outer is None else steps_to(q.view, (q.batch, *outer, q.length, q.size))
    key = steps_to(k.view, (k.batch, k.heads, (), k.size, k.length))
    if key is None or len(key) > 2:  # the runtime makes a transposition of the last axes part of the product
        straight = steps_to(k.view, (k.batch, k.heads, (), k.length, k.size))
        turned = None if straight is None else (*straight, Step("Transpose", (0, 1, 2, 4, 3), ()))
        key = turned if key is None or (turned is not None and len(turned) <= len(key)) else key
    return query, key, steps_to(v.view, (v.batch, v.heads, (), v.length, v.size))


def _by_group(site: Site) -> Callable[[Result], tuple[Axis, ...] | None]:
    def groups(result: Result) -> tuple[Axis, ...] | None:
        outer = split_off(list(result.heads), site.found.key.heads)
        if outer is None or {*outer[0], *outer[1]} != set(result.heads):
            return None
        return (result.batch, *outer, result.length, result.size)

    return groups
