"""Scaled dot-product attention in a graph, whatever operators an exporter spelled it with.

    softmax(scale * Q K^T + masks) V

is read from its softmax outwards: the sum that goes into it has one product of two matrices, the other terms are
masks; what comes out of it is multiplied with a third. Scale factors are collected wherever they stand, and Q, K
and V are read as views (`analysis/views.py`) with the axes batch, heads, length and size. Vaswani et al. 2017,
https://arxiv.org/abs/1706.03762; K and V may have fewer heads, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from onnxopt.analysis.attention_scores import Mask, Scores, read_scores
from onnxopt.analysis.dims import Dim, exact_div
from onnxopt.analysis.layout import is_layout
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import Axis, Leaf, View, size_of, view
from onnxopt.graph import attribute, constant_scalar, is_op, only_use, use_count

_MAX_DEAD = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """A view as batch x heads x length x size.

    Attributes:
        view: What is shown.
        batch: Leaves of the batch axis.
        heads: Leaves of the heads axis, without repeats.
        length: Leaves of the sequence axis.
        size: Leaves of the axis that is contracted, or of V's own.
    """

    view: View
    batch: Axis
    heads: Axis
    length: Axis
    size: Axis


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """Q, K or V.

    Attributes:
        near: Seen from the nearest source: nothing is cut out of it.
        root: Seen from the farthest, through slices of a joint projection.
    """

    near: Heads
    root: Heads

    @property
    def heads(self) -> Dim:
        """Number of heads, without repeats."""
        return size_of(self.near.heads)


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """An attention and its parts.

    Attributes:
        softmax: The node it was found by.
        product: The node that multiplies Q and K.
        result: What comes out, of the rank of the second product, heads apart.
        query: Q.
        key: K; the sequence axis is `length`.
        value: V.
        scale: What the product of Q and K is multiplied by.
        masks: In the order they are applied, the first one next to the product.
        guard: The Where that turns NaN into 0, if there is one.
        batch: Size of the batch.
        heads: Number of heads of Q.
        groups: How many heads of Q share one of K and V.
        queries: Length of Q.
        keys: Length of K and V.
        size: Size of a head of Q and K.
        value_size: Size of a head of V.
    """

    softmax: ir.Node
    product: ir.Node
    result: ir.Value
    query: Operand
    key: Operand
    value: Operand
    scale: float
    masks: tuple[Mask, ...]
    guard: ir.Node | None
    batch: Dim
    heads: Dim
    groups: Dim
    queries: Dim
    keys: Dim
    size: Dim
    value_size: Dim


def attention(softmax: ir.Node, shapes: Shapes, opset: int) -> Attention | str | None:
    """Read the attention around a softmax of an opset.

    Returns:
        The attention, or why what looks like one is not read as one, or None when it is something else.
    """
    guard, weights = _guarded(softmax.outputs[0])
    weights, second = _weighted_sum(weights, shapes)
    scores = softmax.inputs[0]
    if second is None or scores is None:
        return None
    found = read_scores(scores, shapes)
    if found is None or isinstance(found, str):
        return found
    rank = shapes.rank(found.product.outputs[0])
    if rank is None or not is_over_last_axis(softmax, shapes, opset):
        return "the softmax is not over the keys, or its rank is unknown"
    if only_use(weights) is None or use_count(softmax.outputs[0]) > (2 if guard else 1):
        return "the attention weights are used elsewhere"
    return _Reader(softmax, found, guard, second, rank, shapes).read()


def is_over_last_axis(softmax: ir.Node, shapes: Shapes, opset: int) -> bool:
    """Whether a Softmax is taken over the last axis alone; before opset 13 it was over all from one on."""
    source = softmax.inputs[0]
    rank = shapes.rank(source) if source is not None else None
    return rank is not None and attribute(softmax, "axis", -1 if opset >= 13 else 1) in (-1, rank - 1)


def _guarded(weights: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """Return the Where(IsNaN(p), 0, p) that the weights go into, and what comes out."""
    for use in weights.uses():
        node = use.node
        test = node.inputs[0].producer() if is_op(node, "Where") and node.inputs[0] is not None else None
        if test is not None and is_op(test, "IsNaN") and test.inputs[0] is weights and use.idx == 2:
            return (node, node.outputs[0]) if constant_scalar(node.inputs[1]) == 0 else (None, weights)
    return None, weights


def _weighted_sum(weights: ir.Value, shapes: Shapes) -> tuple[ir.Value, ir.Node | None]:
    """Return the node that multiplies the weights with V, and the weights as they go into it."""
    while True:
        second = next((u.node for u in weights.uses() if is_op(u.node, "MatMul") and u.idx == 0), None)
        user = only_use(weights)
        if second is not None or user is None or not is_layout(user):
            return weights, second
        before, after = shapes.of(weights), shapes.of(user.outputs[0])
        if before is None or after is None or before[-2:] != after[-2:] or is_op(user, "Transpose"):
            return weights, None
        weights = user.outputs[0]


# Q, K and V --------------------------------------------------------------------------------------------


class _Reader:
    """Reads the operands of both products into batch, heads, length and size."""

    def __init__(
        self, softmax: ir.Node, scores: Scores, guard: ir.Node | None, second: ir.Node, rank: int, shapes: Shapes
    ) -> None:
        self.softmax = softmax
        self.scores = scores
        self.guard = guard
        self.second = second
        self.rank = rank
        self.shapes = shapes

    def read(self) -> Attention | str | None:
        batch = self._batch()
        if batch is None:
            return "it is not clear which axis counts the batch and which the heads"
        found = self._with(batch, repeats=True)
        return self._with(batch, repeats=False) if isinstance(found, str) else found

    def _with(self, batch: Dim, *, repeats: bool) -> Attention | str:
        (q, k), v = self.scores.product.inputs, self.second.inputs[1]
        query = self._operand(q, batch, repeats=repeats)
        key = self._operand(k, batch, repeats=repeats, transposed=True)
        value = self._operand(v, batch, repeats=repeats, scaled=False)
        if query is None or key is None or value is None:
            return "the axes of Q, K and V do not fit together"
        groups = exact_div(query.heads, key.heads)
        fits = (
            key.heads == value.heads
            and size_of(query.near.size) == size_of(key.near.size)
            and size_of(key.near.length) == size_of(value.near.length)
            and (self.rank < 5 or _outer_heads(query) == _outer_heads(key) == _outer_heads(value))
        )
        if groups is None or not fits:
            return "the sizes of Q, K and V do not fit together"
        return Attention(
            softmax=self.softmax,
            product=self.scores.product,
            result=self.second.outputs[0],
            query=query,
            key=key,
            value=value,
            scale=self.scores.factor * query.near.view.factor * key.near.view.factor,
            masks=self.scores.masks,
            guard=self.guard,
            batch=batch,
            heads=query.heads,
            groups=groups,
            queries=size_of(query.near.length),
            keys=size_of(key.near.length),
            size=size_of(query.near.size),
            value_size=size_of(value.near.size),
        )

    def _batch(self) -> Dim | None:
        """Return the size of the batch."""
        query = self.scores.product.inputs[0]
        shape = self.shapes.of(query) if query is not None else None
        if query is None or shape is None or len(shape) != self.rank or not 2 <= self.rank <= 5:
            return None
        if self.rank != 3:
            return shape[0] if self.rank > 2 else 1
        if len(self.scores.shape) == 4:  # batch and heads are told apart where the mask is added
            return self.scores.shape[0]
        read = view(query, self.shapes, repeats=False)
        leaves = read.axes[0] if read is not None else ()
        return leaves[0].size if leaves else 1

    def _operand(
        self,
        value: ir.Value | None,
        batch: Dim,
        *,
        repeats: bool,
        transposed: bool = False,
        scaled: bool = True,
    ) -> Operand | None:
        if value is None:
            return None
        close = view(value, self.shapes, selections=False, repeats=repeats, factors=scaled)
        far = view(value, self.shapes, repeats=repeats, factors=scaled)
        near, root = self._heads(close, batch, transposed), self._heads(far, batch, transposed)
        if near is None:
            return None
        return Operand(near, root if root is not None and root.view.factor == near.view.factor else near)

    def _heads(self, read: View | None, batch: Dim, transposed: bool) -> Heads | None:
        """Tell the axes of a view apart, or return None when something but heads repeats."""
        if read is None or len(read.axes) != self.rank:
            return None
        length, size = (read.axes[-1], read.axes[-2]) if transposed else (read.axes[-2], read.axes[-1])
        if self.rank == 3:
            outer = split_off(list(read.axes[0]), batch)
        else:
            first = read.axes[0] if self.rank > 2 else ()
            outer = (first, sum(read.axes[1:-2], ())) if size_of(first) == batch else None
        if outer is None:
            return None
        start, heads = outer
        while heads and heads[-1].axis is None:  # the innermost leaves repeat a head
            heads = heads[:-1]
        if any(leaf.axis is None for leaf in (*start, *heads, *length, *size)):
            return None
        return Heads(read, start, heads, length, size)


def _outer_heads(operand: Operand) -> Dim:
    """Return the size of the axis between batch and the innermost heads of a product of five axes."""
    return size_of(operand.near.view.axes[1])


def split_off(leaves: list[Leaf], batch: Dim) -> tuple[Axis, Axis] | None:
    """Split leaves into those that make up the batch and the others."""
    taken: list[Leaf] = []
    missing = batch
    while missing != 1:
        if not leaves:
            return None
        rest = exact_div(missing, leaves[0].size)
        if rest is None:
            inner = exact_div(leaves[0].size, missing)
            if inner is None:
                return None
            first = leaves[0]
            taken.append(Leaf(first.axis, first.stride * inner, missing))
            leaves = [Leaf(first.axis, first.stride, inner), *leaves[1:]]
            break
        taken.append(leaves[0])
        leaves, missing = leaves[1:], rest
    return tuple(taken), tuple(leaves)


def dead_without(node: ir.Node, kept: Collection[ir.Value] = ()) -> set[ir.Node]:
    """Return the nodes that nothing needs any more once the outputs of a node are not needed.

    Args:
        node: The node.
        kept: Values that are needed all the same.
    """
    dead = {node}
    pending = [node]
    while pending and len(dead) < _MAX_DEAD:
        for value in pending.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is None or producer in dead:
                continue
            outputs = producer.outputs
            if any(o.is_graph_output() or any(o is k for k in kept) for o in outputs):
                continue
            if all(use.node in dead for output in outputs for use in output.uses()):
                dead.add(producer)
                pending.append(producer)
    return dead
