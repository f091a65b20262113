"""What a model has of channels, parameters and multiply-accumulates, before and after units of a group go."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.flops import Shape, Sizes, UnknownCostError, assumed_sizes, macs
from onnxopt.analysis.inspect import INDEX_TYPES, summary_stats
from onnxopt.coupling.analysis import Coupling, Group
from onnxopt.coupling.importance import weighed
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.removal import Removal
from onnxopt.graph import all_nodes, is_op
from onnxopt.removed import Change, Damage, Removed, Width

Axes = Mapping[ir.Value, Mapping[int, int]]
"""The place of each axis among `Coupling.axes`."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Total:
    """What there is when the axes have some sizes."""

    sizes: Ints
    parameters: int
    macs: int


class Ledger:
    """Tells what the removal of units takes out of a model, and what it is about."""

    def __init__(self, removal: Removal) -> None:
        """Count what there is.

        Args:
            removal: What units are removed with; nothing was yet.
        """
        model, coupling = removal.model, removal.coupling
        self._removal = removal
        self._axes: dict[ir.Value, dict[int, int]] = defaultdict(dict)
        for place, axis in enumerate(coupling.axes):
            self._axes[axis.value][axis.axis] = place
        self._constants: dict[ir.Value, Shape] = {
            member.value: tuple(int(size) for size in member.tensor.shape.numpy())
            for group in coupling.groups
            for member in group.members
            if member.tensor.dtype not in INDEX_TYPES and not _is_view(member.value)
        }
        self._shapes: dict[ir.Value, Shape] = {}
        self._users: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        known, work = assumed_sizes(model, coupling.shapes), 0
        for node in all_nodes(model):
            own = macs(node, known)
            if own:
                work += own
                self._shapes.update(_shapes(node, known))
                for value in dict.fromkeys((*node.inputs, *node.outputs)):
                    if value is not None and value in self._axes:
                        self._users[value].append(node)
        self._behind = _behind(coupling)
        self._last = _Total(removal.sizes(), summary_stats(model).parameters, work)

    def removed(self, group: Group, gone: Ints, predicted: Damage | None) -> Removed:
        """Return what goes of the model, as it is now, with units of a group.

        Args:
            group: The group.
            gone: The places of its units that go.
            predicted: What is expected of it.
        """
        before = self._last = self._total(self._removal.sizes())
        after = self._total(self._removal.sizes(group.roots[gone]))
        channels = self._channels()
        return Removed(
            name=group.name,
            unit=group.noun,
            units=Change(group.units, group.units - len(gone)),
            widths=tuple(self._widths(group, before.sizes, after.sizes)),
            channels=Change(channels, channels - len(gone) * group.span),
            parameters=Change(before.parameters, after.parameters),
            macs=Change(before.macs, after.macs),
            predicted=predicted,
            behind=self._behind.get(group.name, ()),
        )

    def _channels(self) -> int:
        return sum(int(self._removal.left(g.roots).sum()) * g.span for g in self._removal.coupling.groups)

    def _widths(self, group: Group, before: Ints, after: Ints) -> Iterator[Width]:
        for member in weighed(group):
            place = self._axes[member.value][member.axis]
            was, now = int(before[place]), int(after[place])
            yield Width(member.value.name or "", "inputs" if member.consumes else "outputs", was, now)

    def _total(self, sizes: Ints) -> _Total:
        """Return what there is with some sizes of the axes, by what is different from the last total."""
        last, axes = self._last, self._removal.coupling.axes
        values = {axes[place].value: None for place in np.flatnonzero(sizes != last.sizes).tolist()}
        nodes = {node: None for value in values for node in self._users.get(value, ())}
        was, now = (_Left(self._shapes, self._axes, of) for of in (last.sizes, sizes))
        parameters = sum(
            math.prod(now.along(value, shape)) - math.prod(was.along(value, shape))
            for value in values
            if (shape := self._constants.get(value)) is not None
        )
        work = sum(macs(node, now) - macs(node, was) for node in nodes)
        return _Total(sizes, last.parameters + parameters, last.macs + work)


class _Left(Sizes):
    """The shapes of values when units are gone."""

    def __init__(self, shapes: Mapping[ir.Value, Shape], axes: Axes, sizes: Ints) -> None:
        self._whole, self._axes, self._sizes = shapes, axes, sizes

    def shape(self, value: ir.Value | None) -> Shape:
        """Return a shape; see `Sizes.shape`."""
        if value is None or value not in self._whole:
            raise UnknownCostError
        return self.along(value, self._whole[value])

    def along(self, value: ir.Value, shape: Shape) -> Shape:
        """Return the shape of a value that has a shape when nothing is gone."""
        own = self._axes.get(value, {})
        return tuple(int(self._sizes[own[axis]]) if axis in own else size for axis, size in enumerate(shape))


def _is_view(value: ir.Value) -> bool:
    """Whether it shows the elements of another value, where they are counted."""
    node = value.producer()
    return node is not None and not is_op(node, "Constant", "ConstantOfShape")


def _shapes(node: ir.Node, known: Sizes) -> Iterator[tuple[ir.Value, Shape]]:
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            try:
                yield value, known.shape(value)
            except UnknownCostError:
                continue


def _behind(coupling: Coupling) -> Mapping[str, tuple[str, ...]]:
    """Return the outputs of the nodes that sum up units of a group, by its name."""
    group_of = np.full(len(coupling.labels), -1)
    for index, group in enumerate(coupling.groups):
        group_of[group.roots] = index
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for sink in coupling.sinks:
        value = sink.node.inputs[sink.index]
        labels = None if value is None else coupling.labels_of(value, sink.axis)
        if labels is not None and sink.node.outputs:
            for index in np.unique(group_of[labels]):
                if index >= 0:
                    found[coupling.groups[index].name][sink.node.outputs[0].name or ""] = None
    return {name: tuple(outputs) for name, outputs in found.items()}
