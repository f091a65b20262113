"""The scores of an attention: the product of Q and K, its factor and its masks, read from the softmax backwards."""

from __future__ import annotations

import dataclasses
import itertools

import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import scalar_factor
from onnxopt.graph import constant_scalar, is_op, only_use

_MAX_STEPS = 12
"""Nodes between the product of Q and K and the softmax."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """A term that is added to the scores, or what the scores are replaced by where a condition does not hold.

    Attributes:
        value: What is added, or the condition.
        fill: What stands where the condition does not hold; None for a mask that is added.
        inverted: The scores are replaced where the condition does hold.
    """

    value: ir.Value
    fill: float | None = None
    inverted: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Scores:
    """What goes into the softmax.

    Attributes:
        product: The node that multiplies Q and K.
        factor: What the product is multiplied by.
        masks: In the order they are applied, the first one next to the product.
        shape: The shape with the most axes on the way, which tells batch and heads apart.
    """

    product: ir.Node
    factor: float
    masks: tuple[Mask, ...]
    shape: tuple[Dim, ...]


def read_scores(value: ir.Value, shapes: Shapes) -> Scores | str | None:
    """Walk from what goes into the softmax to the product of Q and K."""
    factor = 1.0
    masks: list[Mask] = []
    added_to: list[tuple[Dim, ...]] = []
    widest = shapes.of(value)
    for _ in range(_MAX_STEPS):
        node = value.producer()
        if node is None or widest is None:
            return None
        if is_op(node, "MatMul"):
            if any(
                not _is_over_outer_axes(m, at, shapes.of(value), shapes) for m, at in zip(masks, added_to, strict=True)
            ):
                return "a mask is added where batch and heads are divided into other axes"
            return Scores(node, factor, tuple(reversed(masks)), widest)
        step = _step(node, shapes)
        if step is None or isinstance(step, str):
            return step
        inner, number, mask = step
        if mask is not None and factor != 1:
            return "the scores are scaled after a mask was added"
        if only_use(value) is None:
            return "the attention scores are used elsewhere"
        factor *= number
        before, after = shapes.of(inner), shapes.of(value)
        if before is None or after is None or before[-2:] != after[-2:]:
            return None
        if mask is not None:
            masks.append(mask)
            added_to.append(after)
        widest = before if len(before) > len(widest) else widest
        value = inner
    return None


def _is_over_outer_axes(mask: Mask, at: tuple[Dim, ...], product: tuple[Dim, ...] | None, shapes: Shapes) -> bool:
    """Whether a mask means the same for the product of Q and K as for the reshaped one of shape `at` it is added to."""
    own = shapes.of(mask.value)
    if own is not None and all(size == 1 for size in own[:-2]):
        return True
    if product is None:
        return False
    outer, given = product[:-2], at[:-2]
    if len(outer) == 1 and len(given) == 2:  # batch and heads are told apart where the mask is added
        return given[0] * given[1] == outer[0]
    if len(outer) == 3 and len(given) == 2:  # heads that share K and V are told apart in the product
        return given == (outer[0], outer[1] * outer[2])
    return list(itertools.dropwhile(_is_one, outer)) == list(itertools.dropwhile(_is_one, given))


def _is_one(size: Dim) -> bool:
    return size == 1


def _step(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, float, Mask | None] | str | None:
    """Return (where the scores come from, what they are multiplied by, the mask) of one node."""
    if is_op(node, "Reshape", "Squeeze", "Unsqueeze", "Identity") and node.inputs[0] is not None:
        return node.inputs[0], 1.0, None
    if is_op(node, "Mul", "Div"):
        factor = scalar_factor(node)
        source = next((v for v in node.inputs if v is not None and constant_scalar(v) is None), None)
        if factor is None and any(_leads_to_product(v) for v in node.inputs):
            return "the scores are multiplied by a tensor"
        return None if factor is None or source is None else (source, factor, None)
    if is_op(node, "Add"):
        first, second = node.inputs
        for scores, mask in ((first, second), (second, first)):
            if scores is not None and mask is not None and _leads_to_product(scores):
                return scores, 1.0, Mask(mask)
    if is_op(node, "Where"):
        condition, yes, no = node.inputs
        for scores, other, inverted in ((yes, no, False), (no, yes, True)):
            fill = constant_scalar(other)
            if condition is not None and scores is not None and fill is not None and _leads_to_product(scores):
                return scores, 1.0, Mask(condition, fill, inverted)
    return None


def _leads_to_product(value: ir.Value | None) -> bool:
    """Whether a value is a product of matrices, scaled, masked and reshaped."""
    for _ in range(_MAX_STEPS):
        node = value.producer() if value is not None else None
        if node is None:
            return False
        if is_op(node, "MatMul"):
            return True
        if is_op(node, "Add"):
            return any(_leads_to_product(v) for v in node.inputs)
        if is_op(node, "Where"):
            return any(_leads_to_product(v) for v in node.inputs[1:])
        if not is_op(node, "Mul", "Div", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
            return False
        value = next((v for v in node.inputs if v is not None and constant_scalar(v) is None), None)
    return False
