"""Chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten, read as one rearrangement.

Every such chain splits the axes of its input into factors, permutes the factors, and groups them into the axes
of its output. Written that way, two chains are the same exactly when their factors and groups are, and the fewest
nodes that do the same follow from it: nothing, a Reshape, a Transpose, one of each, or Reshape-Transpose-Reshape.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeAlias

import onnx_ir as ir

from onnxopt.analysis.dims import Dim, exact_div, provably_positive
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, has_references, is_op, only_use

LAYOUT_OPS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")

Axis: TypeAlias = tuple[int, ...]
"""The factors that make up an axis, outermost first; an axis of size 1 has none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rearrangement:
    """How the axes of an output are made of the axes of an input.

    Attributes:
        sizes: Size of each factor.
        before: The input's axes.
        after: The output's axes.
    """

    sizes: tuple[Dim, ...]
    before: tuple[Axis, ...]
    after: tuple[Axis, ...]

    def shape(self, axes: Sequence[Axis]) -> tuple[Dim, ...]:
        """Return the sizes of axes made of these factors."""
        return tuple(self._size(axis) for axis in axes)

    def _size(self, axis: Axis) -> Dim:
        size: Dim = 1
        for factor in axis:
            size = size * self.sizes[factor]
        return size


class _Factors:
    """Factors that can still be split; a split one stands for its parts."""

    def __init__(self) -> None:
        self.sizes: list[Dim] = []
        self._parts: dict[int, tuple[int, int]] = {}

    def add(self, size: Dim) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def split(self, factor: int, first: Dim, second: Dim) -> tuple[int, int]:
        self._parts[factor] = self.add(first), self.add(second)
        return self._parts[factor]

    def resolve(self, axis: Axis) -> Axis:
        resolved: list[int] = []
        for factor in axis:
            parts = self._parts.get(factor)
            resolved += self.resolve(parts) if parts else [factor]
        return tuple(resolved)


def rearrangement(nodes: Sequence[ir.Node], shapes: Shapes) -> Rearrangement | None:
    """Read a chain of layout nodes, first to last.

    Returns:
        The rearrangement, or None when a shape is unknown or a Reshape cuts across factors it cannot tell apart.
    """
    source = nodes[0].inputs[0]
    shape = shapes.of(source) if source is not None else None
    if shape is None:
        return None
    factors = _Factors()
    before: list[Axis] = [() if size == 1 else (factors.add(size),) for size in shape]
    axes: list[Axis] | None = list(before)
    for node in nodes:
        if axes is None:
            return None
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", tuple(reversed(range(len(axes)))))
            axes = [axes[i] for i in perm]
            continue
        target = shapes.of(node.outputs[0])
        axes = None if target is None else _regroup(factors, axes, target)
    if axes is None:
        return None
    resolved_before = tuple(factors.resolve(a) for a in before)
    resolved_after = tuple(factors.resolve(a) for a in axes)
    used = [f for axis in resolved_before for f in axis]
    number = {factor: i for i, factor in enumerate(used)}
    return Rearrangement(
        tuple(factors.sizes[f] for f in used),
        tuple(tuple(number[f] for f in axis) for axis in resolved_before),
        tuple(tuple(number[f] for f in axis) for axis in resolved_after),
    )


def _regroup(factors: _Factors, axes: Sequence[Axis], target: Sequence[Dim]) -> list[Axis] | None:
    """Group the factors, in order, into axes of these sizes."""
    stream = [f for axis in axes for f in factors.resolve(axis)]
    stream.reverse()
    grouped: list[Axis] = []
    for size in target:
        group: list[int] = []
        missing: Dim = size
        while missing != 1:
            if not stream:
                return None
            factor = stream.pop()
            have = factors.sizes[factor]
            rest = exact_div(missing, have)
            if rest is not None:
                group.append(factor)
                missing = rest
                continue
            rest = exact_div(have, missing)
            if rest is None:
                return None
            first, second = factors.split(factor, missing, rest)
            group.append(first)
            stream.append(second)
            missing = 1
        grouped.append(tuple(group))
    return None if stream else grouped


def is_layout(node: ir.Node | None) -> bool:
    """Whether the node only rearranges its first input."""
    return node is not None and is_op(node, *LAYOUT_OPS) and not has_references(node)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One node of a plan.

    Attributes:
        op: "Reshape", "Transpose", "Squeeze" or "Unsqueeze".
        values: The target, the permutation or the axes.
        shape: Shape of its output.
    """

    op: str
    values: tuple[int, ...]
    shape: tuple[Dim, ...]


def chain_to(last: ir.Node) -> list[ir.Node]:
    """Return the layout nodes that end in a node, first to last; values in between have no other use."""
    chain = [last]
    while True:
        source = chain[-1].inputs[0]
        before = source.producer() if source is not None else None
        if source is None or before is None or not is_layout(before) or before.graph is not last.graph:
            break
        if only_use(source) is None:
            break
        chain.append(before)
    return chain[::-1]


def plan(wanted: Rearrangement, *, inferred: bool = False) -> tuple[Step, ...] | None:
    """Return the fewest layout nodes that make a rearrangement, or None when constants cannot express it.

    Args:
        wanted: The rearrangement.
        inferred: Allow -1 in a Reshape even when another size might be zero.
    """
    before, after = wanted.before, wanted.after
    if before == after and wanted.shape(before) == wanted.shape(after):
        return ()
    flat_after = [f for axis in after for f in axis]
    if flat_after == sorted(flat_after):
        return _steps(wanted, [before, after], inferred)
    transposed = _permutation(before, after)
    if transposed is not None:
        return (Step("Transpose", transposed, wanted.shape(after)),)
    candidates = [_transpose_first(before, after), _transpose_last(after), _coarse(wanted)]
    plans = [_steps(wanted, stages, inferred) for stages in candidates if stages is not None]
    return min((p for p in plans if p is not None), key=len, default=None)


def joined(nodes: Sequence[ir.Node], shapes: Shapes, *, inferred: bool = False) -> tuple[Step, ...] | None:
    """Return a chain with neighbours of a kind made one, for chains that are no single rearrangement of factors.

    Where one Reshape follows another, only the shape that the last one gives matters, even when it cuts across the
    factors of the first; two Transposes are one.

    Args:
        nodes: The chain, first to last.
        shapes: What is known about shapes.
        inferred: Allow -1 in a Reshape even when another size might be zero.

    Returns:
        The nodes, or None when a shape is unknown or constants cannot express one.
    """
    source = nodes[0].inputs[0]
    start = shapes.of(source) if source is not None else None
    if start is None:
        return None
    reached: list[tuple[tuple[int, ...] | None, tuple[Dim, ...]]] = [(None, start)]  # permutation, shape after it
    for node in nodes:
        after = shapes.of(node.outputs[0])
        if after is None:
            return None
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", tuple(reversed(range(len(after)))))
            earlier = reached.pop()[0] if reached[-1][0] is not None else None
            perm = tuple(earlier[i] for i in perm) if earlier is not None else tuple(perm)
            reached += [(perm, after)] if perm != tuple(range(len(perm))) else []
            continue
        if reached[-1][0] is None and len(reached) > 1:
            reached.pop()
        reached += [(None, after)] if after != reached[-1][1] else []
    steps = [
        reshape_step(before, after, inferred=inferred) if perm is None else Step("Transpose", perm, after)
        for (_, before), (perm, after) in itertools.pairwise(reached)
    ]
    known = tuple(step for step in steps if step is not None)
    return known if len(known) == len(steps) else None


def _permutation(before: Sequence[Axis], after: Sequence[Axis]) -> tuple[int, ...] | None:
    """Return the perm that makes `after` of whole axes of `before`, or None."""
    if len(before) != len(after):
        return None
    free = list(range(len(before)))
    perm: list[int] = []
    for axis in after:
        match = next((i for i in free if before[i] == axis), None)
        if match is None:
            return None
        free.remove(match)
        perm.append(match)
    return tuple(perm)


def _transpose_first(before: Sequence[Axis], after: Sequence[Axis]) -> list[Sequence[Axis]] | None:
    """Stages of Transpose, Reshape: possible when the axes of the input stay whole."""
    position = {f: i for i, f in enumerate(f for axis in after for f in axis)}
    for axis in before:
        places = [position[f] for f in axis]
        if places != list(range(places[0], places[0] + len(places))) if places else False:
            return None
    keyed = sorted(range(len(before)), key=lambda i: (position[before[i][0]] if before[i] else -1, i))
    return [before, [before[i] for i in keyed], after]


def _transpose_last(after: Sequence[Axis]) -> list[Sequence[Axis]] | None:
    """Stages of Reshape, Transpose: possible when each axis of the output is a run of factors."""
    for axis in after:
        if axis and list(axis) != list(range(axis[0], axis[0] + len(axis))):
            return None
    ordered = sorted(range(len(after)), key=lambda i: (after[i][0] if after[i] else -1, i))
    return [[after[i] for i in ordered], after]


def _coarse(wanted: Rearrangement) -> list[Sequence[Axis]]:
    """Stages of Reshape, Transpose, Reshape over the coarsest factors that move as one."""
    sequence = [f for axis in wanted.after for f in axis]
    runs: list[list[int]] = []
    for factor in sequence:
        if runs and factor == runs[-1][-1] + 1:
            runs[-1].append(factor)
        else:
            runs.append([factor])
    moved = [tuple(run) for run in runs]
    return [wanted.before, sorted(moved), moved, wanted.after]


def _steps(wanted: Rearrangement, stages: Sequence[Sequence[Axis]], inferred: bool) -> tuple[Step, ...] | None:
    """Turn stages into nodes: equal ones vanish, permuted ones are a Transpose, others a reshape."""
    steps: list[Step] = []
    current: Sequence[Axis] = wanted.before
    for stage in stages:
        if tuple(stage) == tuple(current):
            continue
        perm = _permutation(current, stage)
        if perm is not None:
            steps.append(Step("Transpose", perm, wanted.shape(stage)))
        else:
            step = reshape_step(wanted.shape(current), wanted.shape(stage), inferred=inferred)
            if step is None:
                return None
            steps.append(step)
        current = stage
    return tuple(steps)


def reshape_step(before: tuple[Dim, ...], after: tuple[Dim, ...], *, inferred: bool = False) -> Step | None:
    """Return a Squeeze or Unsqueeze where only axes of size 1 come or go, else a Reshape to a constant."""
    gone, come = _unit_axes(before, after), _unit_axes(after, before)
    if come is not None:
        return Step("Unsqueeze", come, after)
    if gone is not None:
        return Step("Squeeze", gone, after)
    target = target_constant(before, after, inferred=inferred)
    return None if target is None else Step("Reshape", target, after)


def _unit_axes(longer: tuple[Dim, ...], shorter: tuple[Dim, ...]) -> tuple[int, ...] | None:
    """Return the axes of size 1 that `longer` has more than `shorter`, or None when that is not the difference."""
    axes: list[int] = []
    position = 0
    for axis, size in enumerate(longer):
        if position < len(shorter) and size == shorter[position]:
            position += 1
        elif size == 1:
            axes.append(axis)
        else:
            return None
    return tuple(axes) if axes and position == len(shorter) else None


def target_constant(
    before: tuple[Dim, ...], after: tuple[Dim, ...], *, inferred: bool = False
) -> tuple[int, ...] | None:
    """Write the shape `after` as the constant target of a Reshape of a tensor of shape `before`.

    Args:
        before: Shape of the input.
        after: Shape of the output.
        inferred: Allow -1 even when another size might be zero (the runtime refuses such inputs).

    Returns:
        Numbers, 0 for a size copied from the same axis of the input, and at most one -1; None when that is not
        enough.
    """
    target: list[int] = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            if dim == 0:
                return None
            target.append(dim)
        elif axis < len(before) and before[axis] == dim:
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1:
        return None
    others_positive = all(provably_positive(d) for d, t in zip(after, target, strict=True) if t != -1)
    if -1 in target and not inferred and not others_positive:
        return None
    return tuple(target)
