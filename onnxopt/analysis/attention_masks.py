"""The masks of an attention as what operators take: one tensor that is added, and rows that become zero."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.attention_site import Site, list_of_sizes
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Step
from onnxopt.analysis.masks import Term
from onnxopt.rewrite import Builder

REDUCE_AXES_AS_INPUT = 18
LOWEST = float(np.finfo(np.float32).min)
SAFE_LOW = LOWEST / 2
"""ONNX Runtime's Attention takes a row with nothing above the lowest number for one masked in full."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bias:
    """The masks as one tensor of four axes that ends in queries x keys.

    Attributes:
        terms: The masks.
        fills: What each adds where its condition does not hold; None to add it as it is.
        clamp: No element may be lower than this; None for no such limit.
        expand: Which of the last two axes have to be stretched.
    """

    site: Site
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
        values = [addend(t, f, builder) for t, f in zip(self.terms, self.fills, strict=True)]
        total = values[0]
        for value in values[1:]:
            total = builder.op("Add", [total, value])
        if self.clamp is not None:
            total = builder.op("Max", [total, builder.constant("lowest", self.clamp, ir.DataType.FLOAT)])
        rank = max(len(t.shape) for t in self.terms)
        if rank < 4:
            total = unsqueezed(builder, total, range(4 - rank))
        elif rank == 5:
            total = builder.layout(total, [Step("Squeeze", (1,), ())])
        if any(self.expand):
            total = builder.op("Expand", [total, self._full(builder)])
        return total

    def _full(self, builder: Builder) -> ir.Value:
        """Return the shape that stretches the mask to queries x keys."""
        sizes = [self.site.found.queries, self.site.found.keys]
        wanted = [1, 1, *(size if grow else 1 for size, grow in zip(sizes, self.expand, strict=True))]
        return list_of_sizes(wanted, self.site, builder)


def addend(t: Term, fill: float | None, builder: Builder) -> ir.Value:
    """Return what a mask adds, or 0 and `fill` instead."""
    if fill is None and t.value is not None:
        return t.value
    zero = builder.constant("zero", 0, ir.DataType.FLOAT)
    other = builder.constant("masked", t.fill if fill is None else fill, ir.DataType.FLOAT)
    return builder.op("Where", [t.condition, other, zero] if t.inverted else [t.condition, zero, other])


def unsqueezed(builder: Builder, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    """Add an Unsqueeze."""
    return builder.layout(value, [Step("Unsqueeze", tuple(axes), ())])


def added_bias(site: Site, *, guarded_zero: bool = False) -> Bias | str | None:
    """Return the masks as one tensor, None when there are none, or why they cannot be.

    Args:
        site: The attention.
        guarded_zero: Rows with nothing above the lowest number give 0, as the standard operator has it.
    """
    if not site.terms:
        return None
    fits = stretched(site)
    if isinstance(fits, str):
        return fits
    if not guarded_zero:
        if site.guarded:
            return "a guard turns the NaN of rows masked in full into 0"
        return Bias(site, site.terms, (None,) * len(site.terms), None, fits)
    return _bias_of_standard(site, fits)


def _bias_of_standard(site: Site, expand: tuple[bool, bool]) -> Bias | str:
    """Return the masks for an operator that gives 0 for rows with nothing above the lowest number."""
    if len(site.terms) > 1:
        lows = [t.low for t in site.terms if t.low is not None and not (t.low == -math.inf and t.row_kept)]
        hiding = [t for t in site.terms if t.low == -math.inf and t.row_kept]
        if len(lows) + len(hiding) == len(site.terms) and len(hiding) < 2 and sum(lows) > 0.9 * LOWEST:
            return Bias(site, site.terms, (None,) * len(site.terms), None, expand)
        return "masks are added up, and a row may be masked in full"
    t = site.terms[0]
    if t.row_kept or (t.low is not None and t.low > 0.9 * LOWEST):
        return Bias(site, site.terms, (None,), None, expand)
    if site.found.guard is not None and t.may_lose_rows:
        known = t.condition is not None and t.fill == -math.inf
        return Bias(site, site.terms, (None,), None, expand) if known else "it is not known what a guard does"
    if t.fill == -math.inf or t.holds_infinity:
        return "a row masked in full gives NaN, and the operator would give 0"
    if t.condition is not None:
        return Bias(site, site.terms, (SAFE_LOW,), None, expand)
    return Bias(site, site.terms, (None,), SAFE_LOW, expand)


def stretched(site: Site) -> tuple[bool, bool] | str:
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


def row_factor(site: Site, t: Term, builder: Builder, *, flat: bool) -> ir.Value:
    """Return 1 for rows with a key that counts, else 0: batch x queries x 1, or with an axis for heads."""

    def make(builder: Builder) -> ir.Value:
        condition = builder.op("Not", [t.condition]) if t.inverted else t.condition
        number = builder.op("Cast", [condition], {"to": ir.DataType.FLOAT})
        if site.scope.opset >= REDUCE_AXES_AS_INPUT:
            kept = builder.op("ReduceMax", [number, builder.ints("axes", [3])], {"keepdims": 1})
        else:
            kept = builder.op("ReduceMax", [number], {"axes": [3], "keepdims": 1})
        return builder.layout(kept, [Step("Squeeze", (1,), ())]) if flat else kept

    return site.keep(("rows", t.condition, t.inverted, flat), make, builder)
