"""How alike the units of a group are, by what the model computes with on data, or by the weights that make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.analysis.weights import FLOATS
from onnxopt.contract import Calibration
from onnxopt.coupling.activity import multiplied
from onnxopt.coupling.analysis import Coupling, Group, Member
from onnxopt.coupling.builder import Sink
from onnxopt.coupling.grids import numbers
from onnxopt.coupling.importance import Scores, squared_norms
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.removal import Removal
from onnxopt.coupling.stored import stored
from onnxopt.graph import bodies
from onnxopt.numeric import merging
from onnxopt.numeric.gram import Gram

GRAM_BYTES = 1 << 30
"""Memory for the products that are observed in one run of the data."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outlet:
    """One way out of a group: the units are multiplied by slices of a weight and summed up.

    Attributes:
        member: The weight.
        gram: (units, units): products of what it is multiplied by.
    """

    member: Member
    gram: Scores


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is merged, and by what the weights behind are multiplied.

    Attributes:
        merge: Which units go, into which ones.
        parts: Each weight behind the group, with a factor for each unit that goes.
        lost: The part of what the units bring into the weights behind that others do not make up for.
    """

    merge: merging.Merge
    parts: tuple[tuple[Member, Scores], ...]
    lost: float


def rounded(group: Group) -> bool:
    """Whether a weight behind a group is on a grid, which sums of its slices would not be."""
    return any(member.consumes and member.tensor.dtype not in FLOATS for member in group.members)


def inseparable(group: Group, coupling: Coupling) -> str:
    """Return why slices of what units are multiplied by cannot be summed up ahead; empty when they can."""
    roots = set(group.roots.tolist())
    consumers = {(m.value, m.axis) for m in group.members if m.consumes}
    for sink in coupling.sinks:
        value = sink.node.inputs[sink.index]
        if value is not None and stored(value, sink.axis) not in consumers:
            labels = coupling.labels_of(value, sink.axis)
            if labels is not None and not roots.isdisjoint(labels.tolist()):
                return _unsummable(value)
    return ""


def _unsummable(value: ir.Value) -> str:
    producer = value.producer()
    if producer is None or _varies(value):
        return "it is also multiplied by other results, which cannot be summed up ahead"
    return f"a weight behind it is computed in the graph, by {producer.op_type}, and not stored as one constant"


def _varies(value: ir.Value) -> bool:
    """Whether a value depends on an input of the model, or may."""
    seen, waiting = set(), [value]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(v is not None and v.is_graph_input() for v in node.inputs) or any(bodies(node)):
            return True
        waiting += [v for v in node.inputs if v is not None]
    return False


def plans(
    model: ir.Model, coupling: Coupling, wanted: Mapping[str, int], calibration: Calibration | None
) -> Iterator[tuple[Group, Plan | None]]:
    """Yield for each group what to merge; None where not all that its units are multiplied by could be seen.

    Args:
        model: The model that was analysed; it is not changed.
        coupling: The analysis.
        wanted: Name of a group -> how many of its units go.
        calibration: Data to see on how alike units are; without any, they are judged by the weights that make them.
    """
    portion: list[tuple[Group, list[tuple[Member, Sink]]]] = []
    used = 0
    for group in coupling.groups:
        if group.name not in wanted:
            continue
        if calibration is None:
            yield group, _plan(group, by_weights(group), wanted[group.name])
            continue
        outlets = _outlets(group, coupling, model)
        size = 4 * group.units**2 * len(outlets)
        if portion and used + size > GRAM_BYTES:
            yield from _seen(model, coupling, portion, wanted, calibration)
            portion, used = [], 0
        portion.append((group, outlets))
        used += size
    if portion and calibration is not None:
        yield from _seen(model, coupling, portion, wanted, calibration)


def _seen(
    model: ir.Model,
    coupling: Coupling,
    portion: Sequence[tuple[Group, list[tuple[Member, Sink]]]],
    wanted: Mapping[str, int],
    calibration: Calibration,
) -> Iterator[tuple[Group, Plan | None]]:
    for group, outlets in _observe(model, coupling, portion, calibration):
        yield group, _plan(group, outlets, wanted[group.name])


def _plan(group: Group, outlets: Sequence[Outlet], count: int) -> Plan | None:
    if {id(outlet.member) for outlet in outlets} != {id(m) for m in group.members if m.consumes}:
        return None
    merge = merged(group, outlets, count)
    parts = tuple((outlet.member, merging.factors(outlet.gram, merge)) for outlet in outlets)
    norms = [squared_norms(outlet.member, group.units) for outlet in outlets]
    lost = [merging.lost(outlet.gram, own, merge) for outlet, own in zip(outlets, norms, strict=True)]
    return Plan(merge, parts, float(np.mean(lost)) if lost else 0.0)


def _outlets(group: Group, coupling: Coupling, model: ir.Model) -> list[tuple[Member, Sink]]:
    found = []
    consumers = {(m.value, m.axis): m for m in group.members if m.consumes}
    for sink in coupling.sinks:
        weight = sink.node.inputs[sink.index]
        member = None if weight is None else consumers.get(stored(weight, sink.axis))
        place = multiplied(sink)
        if member is not None and place is not None and place[0].graph is model.graph:
            found.append((member, sink))
    return found


def _observe(
    model: ir.Model,
    coupling: Coupling,
    portion: Sequence[tuple[Group, list[tuple[Member, Sink]]]],
    calibration: Calibration,
) -> Iterator[tuple[Group, list[Outlet]]]:
    seen: list[tuple[Group, list[tuple[Member, UnitProducts]]]] = []
    names: dict[str, list[UnitProducts]] = {}
    for group, outlets in portion:
        observers = []
        for member, sink in outlets:
            place = multiplied(sink)
            labels = None if place is None else coupling.labels_of(*place)
            if place is not None and labels is not None:
                observer = UnitProducts(group, labels, place[1])
                observers.append((member, observer))
                names.setdefault(place[0].name or "", []).append(observer)
        seen.append((group, observers))
    calibration.observe(model, names)
    for group, observers in seen:
        sums: dict[int, Outlet] = {}
        for member, observer in observers:
            if observer.gram.usable:
                found = observer.gram.total.astype(np.float64)
                before = sums.get(id(member))  # a weight that several nodes use
                sums[id(member)] = Outlet(member, found if before is None else np.add(before.gram, found))
        yield group, list(sums.values())


class UnitProducts:
    """Observes the products of units: index by index of two units, in order. An `onnxopt.contract.Observer`.

    Attributes:
        gram: (units, units), their sums.
    """

    def __init__(self, group: Group, labels: Ints, axis: int) -> None:
        """Start from zero.

        Args:
            group: The units.
            labels: The unit of each index of the axis.
            axis: The axis of the observed arrays.
        """
        self.gram = Gram(group.units)
        self._indexes = np.stack([np.flatnonzero(labels == root) for root in group.roots], axis=1)
        self._axis = axis

    def add(self, array: npt.NDArray[Any]) -> None:
        """Take in an array."""
        self.gram.add(np.moveaxis(array, self._axis, -1)[..., self._indexes])


def by_weights(group: Group) -> list[Outlet]:
    """Return the outlets of a group with products of the rows of weights that make the units, in place of data."""
    rows = []
    for member in group.makers:
        inside = np.flatnonzero(member.units >= 0)
        counts = np.bincount(member.units[inside], minlength=group.units)
        if counts[0] and (counts == counts[0]).all():  # several where gates, or query, key and value lie in one weight
            array = np.moveaxis(numbers(member.value, member.tensor), member.axis, 0).astype(np.float64)
            order = inside[np.argsort(member.units[inside], kind="stable")]
            rows.append(array[order].reshape(group.units, -1))
    if not rows:
        return []
    joined = np.concatenate(rows, axis=1)
    gram = joined @ joined.T
    return [Outlet(member, gram) for member in group.members if member.consumes]


def merged(group: Group, outlets: Sequence[Outlet], count: int) -> merging.Merge:
    """Choose the units that are cheapest to replace by multiples of others."""
    matrices = []
    for outlet in outlets:
        norms = squared_norms(outlet.member, group.units)
        mean = float((np.diag(outlet.gram) * norms).mean())
        matrices.append(merging.costs(outlet.gram, norms / mean if mean > 0 else norms))
    return merging.least_costly(matrices, count)


def sum_up(removal: Removal, group: Group, plan: Plan) -> None:
    """Add the slices of the weights behind units that go, times their factors, to those of the units that stay."""
    for member, factors in plan.parts:
        array = np.array(removal.whole(member.value))
        rows = np.moveaxis(array, member.axis, 0)
        before = rows.copy()
        places = [np.flatnonzero(member.units == unit) for unit in range(group.units)]
        for gone, into, factor in zip(plan.merge.gone, plan.merge.into, factors, strict=True):
            rows[places[into]] += (factor * before[places[gone]]).astype(array.dtype)
        removal.replace(member.value, array)
