"""What a value shows of another one: layout, slices, repeats and a scalar factor, read through any chain of nodes.

Attention heads are split, merged, transposed, flattened, cut out of a joint projection and repeated in ways that
differ by exporter. A chain of Reshape, Transpose, Squeeze, Unsqueeze, Flatten, Split, Slice, Gather of one index,
Expand and multiplications by a number is read as one strided view: each axis of the result is made of leaves, and
each leaf counts along one axis of the source with a stride (or repeats the same elements).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim, exact_div, product
from onnxopt.analysis.layout import LAYOUT_OPS, Rearrangement
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, constant_ints, constant_scalar, has_references, is_op

_MAX_CHAIN = 24
"""Longer chains are cut; the rest counts as the source."""


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """A part of an axis.

    Attributes:
        axis: The axis of the source that it counts along; None when it repeats.
        stride: By how much, per element.
        size: How many elements.
    """

    axis: int | None
    stride: Dim
    size: Dim


Axis: TypeAlias = tuple[Leaf, ...]
"""What makes up an axis, outermost first; an axis of size 1 has none."""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A value as elements of a source, times a number.

    Attributes:
        source: The value that is shown.
        shape: Its shape.
        axes: The axes of the result.
        starts: The first element shown, per axis of the source.
        factor: What the elements are multiplied by.
        nodes: The nodes looked through, first to last.
    """

    source: ir.Value
    shape: tuple[Dim, ...]
    axes: tuple[Axis, ...]
    starts: tuple[int, ...]
    factor: float
    nodes: tuple[ir.Node, ...]

    def rearrangement(self, after: Sequence[Axis]) -> Rearrangement | None:
        """Return how axes made of these leaves come from the source, or None when they do not cover it exactly."""
        factors = None if any(self.starts) else whole_factors(self.shape, [leaf for a in after for leaf in a])
        if factors is None:
            return None
        order = [leaf for axis in factors for leaf in axis]
        number = {leaf: i for i, leaf in enumerate(order)}
        return Rearrangement(
            tuple(leaf.size for leaf in order),
            tuple(tuple(number[leaf] for leaf in axis) for axis in factors),
            tuple(tuple(number[leaf] for leaf in axis) for axis in after),
        )

    def columns(self, leaves: Axis) -> np.ndarray | None:
        """Return the indices along the last axis of the source that these leaves count, or None if not numbers."""
        last = len(self.shape) - 1
        index = np.array([self.starts[last]], np.int64)
        for leaf in leaves:
            if leaf.axis != last or not isinstance(leaf.size, int) or not isinstance(leaf.stride, int):
                return None
            index = (index[:, None] + leaf.stride * np.arange(leaf.size)).reshape(-1)
        return index


def size_of(axis: Axis) -> Dim:
    """Return the number of elements of an axis."""
    return product(leaf.size for leaf in axis)


def whole_factors(shape: Sequence[Dim], leaves: Sequence[Leaf]) -> list[Axis] | None:
    """Return the leaves of each axis of a source, outermost first, when they cover it exactly, else None."""
    if any(leaf.axis is None for leaf in leaves):
        return None
    factors: list[Axis] = []
    for axis, size in enumerate(shape):
        own = [leaf for leaf in leaves if leaf.axis == axis]
        ordered: list[Leaf] = []
        stride: Dim = 1
        while own:
            inner = next((leaf for leaf in own if leaf.stride == stride), None)
            if inner is None:
                return None
            own.remove(inner)
            ordered.insert(0, inner)
            stride = stride * inner.size
        if stride != size:
            return None
        factors.append(tuple(ordered))
    return factors


def view(
    value: ir.Value, shapes: Shapes, *, selections: bool = True, repeats: bool = True, factors: bool = True
) -> View | None:
    """Read a value as a view of the farthest source it can be read from.

    Args:
        value: The value.
        shapes: What is known about shapes.
        selections: Look through Split, Slice and Gather.
        repeats: Look through Expand.
        factors: Look through multiplications by a number.

    Returns:
        The view, of the value itself if nothing can be looked through; None when its rank is unknown.
    """
    allowed = {*LAYOUT_OPS, "Identity"}
    allowed |= {"Split", "Slice", "Gather"} if selections else set()
    allowed |= {"Expand"} if repeats else set()
    allowed |= {"Mul", "Div"} if factors else set()
    chain: list[tuple[ir.Node, ir.Value]] = []
    current = value
    while len(chain) < _MAX_CHAIN:
        node = current.producer()
        if node is None or not is_op(node, *allowed) or has_references(node) or node.graph is not value.graph:
            break
        source = _scaled_input(node) if node.op_type in ("Mul", "Div") else node.inputs[0]
        if source is None:
            break
        chain.append((node, current))
        current = source
    chain.reverse()
    while True:
        found = _replay(current, chain, shapes)
        if found is not None or not chain:
            return found
        current = chain.pop(0)[1]


def _scaled_input(node: ir.Node) -> ir.Value | None:
    """Return what a Mul or Div by a number scales."""
    first, second = node.inputs
    if first is None or second is None:
        return None
    if constant_scalar(second) is not None:
        return first
    return second if node.op_type == "Mul" and constant_scalar(first) is not None else None


def scalar_factor(node: ir.Node) -> float | None:
    """Return what a Mul or Div multiplies its other input by, or None when that is no number."""
    for index in (1, 0):
        number = constant_scalar(node.inputs[index])
        if number is not None and not (index == 0 and node.op_type == "Div"):
            return number if node.op_type == "Mul" else 1 / number if number else None
    return None


def _replay(source: ir.Value, chain: Sequence[tuple[ir.Node, ir.Value]], shapes: Shapes) -> View | None:
    shape = shapes.of(source)
    if shape is None:
        return None
    state = _State(shape)
    for node, output in chain:
        target = shapes.of(output)
        if target is None or not state.step(node, output, target, shapes):
            return None
    axes = tuple(tuple(axis) for axis in state.axes)
    return View(source, shape, axes, tuple(state.starts), state.factor, tuple(n for n, _ in chain))


class _State:
    """The view while the chain is replayed."""

    def __init__(self, shape: tuple[Dim, ...]) -> None:
        self.axes: list[Axis] = [() if d == 1 else (Leaf(k, 1, d),) for k, d in enumerate(shape)]
        self.starts = [0] * len(shape)
        self.factor = 1.0

    def step(self, node: ir.Node, output: ir.Value, target: tuple[Dim, ...], shapes: Shapes) -> bool:
        """Go through one node; False when it cannot be told what it does."""
        match node.op_type:
            case "Identity":
                return True
            case "Transpose":
                perm = attribute(node, "perm", tuple(reversed(range(len(self.axes)))))
                self.axes = [self.axes[i] for i in perm]
                return True
            case "Mul" | "Div":
                factor = scalar_factor(node)
                if factor is None or len(target) != len(self.axes):
                    return False
                self.factor *= factor
                return True
            case "Split":
                return self._split(node, output, target, shapes)
            case "Slice":
                return self._slice(node, target)
            case "Gather":
                return self._gather(node, shapes)
            case "Expand":
                return self._expand(target)
        return self._regroup(target)

    def _regroup(self, target: tuple[Dim, ...]) -> bool:
        """Group the leaves, in order, into axes of these sizes."""
        stream = [leaf for axis in self.axes for leaf in axis][::-1]
        grouped: list[Axis] = []
        for size in target:
            group: list[Leaf] = []
            missing: Dim = size
            while missing != 1:
                if not stream:
                    return False
                leaf = stream.pop()
                rest = exact_div(missing, leaf.size)
                if rest is not None:
                    group.append(leaf)
                    missing = rest
                    continue
                inner = exact_div(leaf.size, missing)
                if inner is None:
                    return False
                group.append(Leaf(leaf.axis, leaf.stride * inner, missing))
                stream.append(Leaf(leaf.axis, leaf.stride, inner))
                missing = 1
            grouped.append(tuple(group))
        self.axes = grouped
        return not stream

    def _select(self, axis: int, start: int, size: int, step: int = 1) -> bool:
        """Keep `size` elements from `start` on; they must be whole elements of the outermost leaf."""
        leaves = self.axes[axis]
        if not leaves or leaves[0].axis is None or (step != 1 and len(leaves) > 1):
            return False
        inner = size_of(leaves[1:])
        if not isinstance(inner, int) or start % inner or size % inner or not isinstance(leaves[0].stride, int):
            return False
        self.starts[leaves[0].axis] += start // inner * leaves[0].stride
        kept = size // inner
        first = () if kept == 1 else (Leaf(leaves[0].axis, leaves[0].stride * step, kept),)
        self.axes[axis] = (*first, *leaves[1:])
        return True

    def _split(self, node: ir.Node, output: ir.Value, target: tuple[Dim, ...], shapes: Shapes) -> bool:
        axis = attribute(node, "axis", 0) % len(self.axes)
        start: Dim = 0
        for other in node.outputs:
            if other is output:
                break
            shape = shapes.of(other)
            if shape is None:
                return False
            start = start + shape[axis]
        size = target[axis]
        return isinstance(start, int) and isinstance(size, int) and self._select(axis, start, size)

    def _slice(self, node: ir.Node, target: tuple[Dim, ...]) -> bool:
        given = [constant_ints(v) if v is not None else None for v in [*node.inputs[1:], None, None][:4]]
        starts, ends, axes, steps = given
        if len(node.inputs) < 3 or starts is None or ends is None:
            return False
        if (len(node.inputs) > 3 and axes is None) or (len(node.inputs) > 4 and steps is None):
            return False
        steps = steps or (1,) * len(starts)
        for axis, start, step in zip(axes or range(len(starts)), starts, steps, strict=True):
            place = axis % len(self.axes)
            before, size = size_of(self.axes[place]), target[place]
            if step == 1 and before == size:
                continue
            if not isinstance(before, int) or not isinstance(size, int) or step < 1:
                return False
            begin = max(start + before, 0) if start < 0 else start
            if not self._select(place, begin, size, step):
                return False
        return True

    def _gather(self, node: ir.Node, shapes: Shapes) -> bool:
        """Go through a Gather of one constant index."""
        axis = attribute(node, "axis", 0) % len(self.axes)
        index, before = constant_ints(node.inputs[1]), size_of(self.axes[axis])
        if index is None or len(index) != 1 or not isinstance(before, int) or node.inputs[1] is None:
            return False
        if not self._select(axis, index[0] % before, 1):
            return False
        rank = shapes.rank(node.inputs[1])
        self.axes[axis : axis + 1] = [()] * (rank or 0)
        return rank is not None

    def _expand(self, target: tuple[Dim, ...]) -> bool:
        missing = len(target) - len(self.axes)
        axes: list[Axis] = [()] * missing + self.axes
        for position, (axis, size) in enumerate(zip(axes, target, strict=True)):
            if size_of(axis) == size:
                continue
            if axis:
                return False
            axes[position] = (Leaf(None, 0, size),)
        self.axes = axes
        return True


def measured(size: Dim, near: Sequence[ir.Value], graph: ir.Graph, shapes: Shapes) -> tuple[ir.Value, int] | None:
    """Return a value of a graph and its axis of this size: an input, or else what these values come from.

    Reading a size off a value keeps what computes it, so the farthest one that has it is taken.
    """
    for value in graph.inputs:
        shape = shapes.of(value)
        if shape is not None and size in shape:
            return value, shape.index(size)
    for value in near:
        found: tuple[ir.Value, int] | None = None
        current: ir.Value | None = value
        for _ in range(_MAX_CHAIN):
            shape = shapes.of(current) if current is not None else None
            if current is None or shape is None or size not in shape or current.graph is not graph:
                break
            found = current, shape.index(size)
            node = current.producer()
            current = next((v for v in node.inputs if v is not None), None) if node is not None else None
        if found is not None:
            return found
    return None
