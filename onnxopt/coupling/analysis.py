"""Which indexes of which axes can only be removed together, and why others must stay.

Every index of every axis of known size has an identity, a number. Rules of the operators say which identities go
together and which are frozen (`rules`, `rules_nn`, `rules_attention`); what is then connected is a unit: a channel, a
head, a neuron, a hidden unit. Units that run through the same axes compete with one another and make a group.
(DepGraph, https://arxiv.org/abs/2301.12900, groups layers; here groups follow from single indexes.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.fills import fill
from onnxopt.analysis.shapes import Shapes
from onnxopt.coupling import rules, rules_attention, rules_nn, rules_quantized, rules_sequences
from onnxopt.coupling.builder import Axis, Builder, Opaque, Sink, label
from onnxopt.coupling.grids import NUMBERS
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.rewrites import Rewrite
from onnxopt.coupling.stored import stored
from onnxopt.graph import STANDARD_DOMAINS, bodies, constant_tensor, has_references, scopes

_TABLES: Mapping[str, Mapping[str, rules.Rule]] = {
    "": {
        **rules.RULES,
        **rules_nn.RULES,
        **rules_attention.STANDARD,
        **rules_sequences.RULES,
        **rules_quantized.RULES,
    },
    "com.microsoft": {**rules_nn.MICROSOFT, **rules_attention.MICROSOFT, **rules_quantized.MICROSOFT},
}
_CANNOT_FOLLOW = (Opaque, IndexError, ValueError, KeyError, ZeroDivisionError)
"""What a rule raises where it cannot follow its node; all but the first only for nodes that no runtime could run."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """An axis of a constant that units of a group run through.

    Attributes:
        value: The constant.
        tensor: What it held when it was analysed.
        axis: The axis.
        units: (size,): which unit of the group each index belongs to; -1 for one that is of none of them.
        consumes: Whether products are summed up along it, so that a missing index equals a zero.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    axis: int
    units: Ints
    consumes: bool

    @property
    def graph(self) -> ir.Graph:
        """The graph that holds the constant."""
        node = self.value.producer()
        graph = self.value.graph if node is None else node.graph
        assert graph is not None, "constants of a model are in a graph"
        return graph


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Units that run through the same axes, of which any may go.

    Attributes:
        name: Name of the first constant that its units are computed from, with the first index in brackets where
            another group has that name.
        roots: (units,): the identity by which each unit is known to the analysis.
        members: The constants.
        span: How many indexes of a constant a unit has at least: 1 for a channel, more for a head.
    """

    name: str
    roots: Ints
    members: tuple[Member, ...]
    span: int

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.roots)

    @property
    def noun(self) -> str:
        """What its units are called."""
        return "channels" if self.span == 1 else f"blocks of {self.span} channels"

    @property
    def makers(self) -> tuple[Member, ...]:
        """The constants that the units are computed from."""
        return tuple(m for m in self.members if not m.consumes and m.tensor.dtype in NUMBERS)

    @property
    def parameters(self) -> int:
        """How many elements of constants belong to the units (those shared with other groups included)."""
        return sum(int((m.units >= 0).sum()) * (m.tensor.size // len(m.units)) for m in self.members)


@dataclasses.dataclass(frozen=True)
class Coupling:
    """What `analyse` found. Valid for the model it was made of, until axes change.

    Attributes:
        axes: All axes of known size, in the order of their identities.
        labels: For each identity the smallest one of its unit.
        reasons: For each identity an index into `texts`, or -1 for what may go.
        texts: Why something is frozen.
        groups: The groups, in the order of their first constants.
        sinks: Where products are summed up.
        rewrites: What else must change in nodes.
        opset: Version of the standard operators.
        shapes: What is known about shapes.
    """

    axes: tuple[Axis, ...]
    labels: Ints
    reasons: Ints
    texts: tuple[str, ...]
    groups: tuple[Group, ...]
    sinks: tuple[Sink, ...]
    rewrites: tuple[Rewrite, ...]
    opset: int
    shapes: Shapes

    def size(self, value: ir.Value, axis: int) -> int | None:
        """Return the size of an axis, or None when it is not known."""
        found = self._places.get((value, axis))
        return None if found is None else found.size

    def labels_of(self, value: ir.Value, axis: int) -> Ints | None:
        """Return the unit of each index of an axis, or None when its size is not known."""
        found = self._places.get((value, axis))
        return None if found is None else self.labels[found.first : found.first + found.size]

    def frozen(self, value: ir.Value, axis: int) -> str | None:
        """Return why no index of an axis can be removed, or None when at least one can."""
        found = self._places.get((value, axis))
        if found is None:
            return "its size is not known"
        reasons = self.reasons[found.first : found.first + found.size]
        return self.texts[reasons[0]] if len(reasons) and (reasons >= 0).all() else None

    @functools.cached_property
    def _places(self) -> Mapping[tuple[ir.Value, int], Axis]:
        return {(axis.value, axis.axis): axis for axis in self.axes}


def analyse(model: ir.Model, shapes: Shapes | None = None) -> Coupling:
    """Work out the coupling of a model; nothing is changed.

    Args:
        model: The model.
        shapes: What is known about its shapes.
    """
    shapes = shapes or Shapes(model)
    main = model.graph
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    builder = Builder(shapes, opset)
    for scope in scopes(model):
        if scope.function is not None:
            continue
        for node in scope.graph:
            if node not in builder.followed:
                _follow(builder, node, model)
    for values, kind in ((main.inputs, "input"), (main.outputs, "output")):
        for value in values:
            _freeze(builder, value, f"it is an {kind} of the model")
    partition = builder.partition()
    labels = partition.labels
    reasons = partition.reasons_of(np.arange(builder.size, dtype=np.int64))
    axes = tuple(builder.axes)
    _keep_one_of_each(axes, labels, reasons, builder.reasons)
    groups = _groups(axes, labels, reasons, builder.sinks)
    return Coupling(
        axes,
        labels,
        reasons,
        tuple(builder.reasons),
        groups,
        tuple(builder.sinks),
        tuple(builder.rewrites),
        opset,
        shapes,
    )


def _keep_one_of_each(axes: tuple[Axis, ...], labels: Ints, reasons: Ints, texts: list[str]) -> None:
    """Freeze units that some axis consists of: nothing would be left of it."""
    firsts = np.array([axis.first for axis in axes if axis.size], np.int64)
    if not len(firsts):
        return
    low, high = np.minimum.reduceat(labels, firsts), np.maximum.reduceat(labels, firsts)
    alone = np.isin(labels, low[low == high]) & (reasons < 0)
    reasons[alone] = len(texts)
    texts.append("an axis consists of nothing else")


def _follow(builder: Builder, node: ir.Node, model: ir.Model) -> None:
    table = _TABLES.get("" if node.domain in STANDARD_DOMAINS else node.domain, {})
    rule = table.get(node.op_type)
    if rule is None or node.op_identifier() in model.functions:
        _give_up(builder, node, f"{label(node)} is not known to the analysis")
    elif has_references(node):
        _give_up(builder, node, f"{label(node)} has attributes of a function's caller")
    else:
        try:
            rule(builder, node)
        except _CANNOT_FOLLOW as error:
            _give_up(builder, node, f"{label(node)} is not followed: {error}")


def _give_up(builder: Builder, node: ir.Node, reason: str) -> None:
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            _freeze(builder, value, reason)
    for _, body in bodies(node):
        for value in (*body.inputs, *body.outputs):
            _freeze(builder, value, reason)


def _freeze(builder: Builder, value: ir.Value, reason: str) -> None:
    if builder.known.of(value) is not None:
        builder.freeze_all(value, reason)


def _groups(axes: tuple[Axis, ...], labels: Ints, reasons: Ints, sinks: list[Sink]) -> tuple[Group, ...]:
    """Sort the free units into groups by the axes they run through."""
    if not axes:
        return ()
    axis_of = np.repeat(np.arange(len(axes)), [axis.size for axis in axes])
    free = np.flatnonzero(reasons < 0)
    keys, counts = np.unique(labels[free] * len(axes) + axis_of[free], return_counts=True)
    units, touching = np.divmod(keys, len(axes))
    roots, starts = np.unique(units, return_index=True)
    # Units of equal sets of axes, and equally many indexes on each, have equal sums of these random numbers.
    draw = np.random.default_rng(0).integers(1, 2**62, size=len(axes), dtype=np.int64)
    with np.errstate(over="ignore"):
        signature = np.add.reduceat(draw[touching] * counts, starts) if len(roots) else roots
    members: dict[int, list[int]] = defaultdict(list)
    for place, key in enumerate(signature.tolist()):
        members[key].append(place)
    bounds = np.append(starts, len(keys))
    summed = {stored(value, sink.axis) for sink in sinks if (value := sink.node.inputs[sink.index]) is not None}
    found = []
    for places in members.values():
        first = places[0]
        touched = [axes[i] for i in touching[bounds[first] : bounds[first + 1]]]
        group = _group(touched, roots[places], labels, summed)
        if group is not None:
            found.append(group)
    return _named_apart(sorted(found, key=lambda group: int(group.roots[0])))


def _named_apart(groups: list[Group]) -> tuple[Group, ...]:
    """Add the first index to the names of groups that run through different parts of one constant."""
    named: list[Group] = []
    names: set[str] = set()
    for group in groups:
        maker = group.makers[0]
        name = maker.value.name or ""
        if name in names:
            name = f"{name}[{int(np.flatnonzero(maker.units >= 0)[0])}]"
        names.add(name)
        named.append(dataclasses.replace(group, name=name))
    return tuple(named)


def _group(touched: list[Axis], roots: Ints, labels: Ints, summed: set[tuple[ir.Value, int]]) -> Group | None:
    if len(roots) < 2 or not any((axis.value, axis.axis) in summed for axis in touched):
        return None
    members = []
    for axis in touched:
        tensor = constant_tensor(axis.value)
        if tensor is None and (array := fill(axis.value)) is not None:
            tensor = ir.Tensor(array)
        if tensor is None:
            continue
        own = labels[axis.first : axis.first + axis.size]
        place = np.minimum(np.searchsorted(roots, own), len(roots) - 1)
        units = np.where(roots[place] == own, place, -1)
        members.append(Member(axis.value, tensor, axis.axis, units, (axis.value, axis.axis) in summed))
    span = min((int((member.units == 0).sum()) for member in members), default=1)
    group = Group("", roots, tuple(members), span)
    return group if group.makers else None  # else they are classes of a one-hot encoding, or places
