"""The linear layers that sum up the units of a group, and what data say about their inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.contract import Calibration
from onnxopt.coupling.activity import multiplied
from onnxopt.coupling.analysis import Coupling, Group
from onnxopt.coupling.builder import Sink, label
from onnxopt.coupling.partition import Ints
from onnxopt.graph import Scope, is_op, scopes
from onnxopt.numeric.elimination import Consumer
from onnxopt.numeric.least_squares import Change
from onnxopt.numeric.products import Products
from onnxopt.repair.layers import Layer, read

Array = npt.NDArray[Any]

MOMENT_BYTES = 1 << 30
"""Memory for what is seen of layers in one run of the data."""
MOST_INPUTS = 4608
"""Groups with a consumer of more inputs are judged without one: inverting its covariance would take minutes."""
LEAST_ROWS, ROWS = 4096, 8
"""Positions that are looked at: at least so many, and so many per channel."""
NO_LAYER = "not a linear layer with a constant weight and a computed input"
SEEN = 2
"""Positions per input that must have been seen before inputs are fitted to one another freely."""
HOLD_BACK = 4
"""One of so many samples is held back, to see what is lost on data that nothing was fitted to."""
SPOILT = "a weight behind it holds NaN or infinity"
TOO_FEW = "infinite values, or too few samples to hold some back, were seen of it"


def held_back(samples: int) -> range:
    """Return the numbers of the samples that are held back, of so many; none where there is a single one."""
    every = max(2, min(HOLD_BACK, samples))
    return range(every - 1, samples, every)


@dataclasses.dataclass(frozen=True, slots=True)
class Outlet:
    """A layer behind a group.

    Attributes:
        layer: The layer.
        axis: The axis of its input that holds the channels.
        units: (channels,) the unit that each channel that a group of it takes belongs to; -1 for none.
    """

    layer: Layer
    axis: int
    units: Ints

    @property
    def place(self) -> tuple[str, int]:
        """Name of its input, and the axis."""
        return self.layer.x.name or "", self.axis

    @property
    def size(self) -> int:
        """Channels of its input."""
        return self.layer.groups * len(self.units)

    @property
    def places(self) -> Ints:
        """(units, span): where the channels of each unit are."""
        return np.stack([np.flatnonzero(self.units == unit) for unit in range(int(self.units.max()) + 1)])


def outlets(model: ir.Model, coupling: Coupling) -> Mapping[str, tuple[Outlet, ...] | str]:
    """Return the layers behind each group, or why not all of them can be read as linear layers."""
    scope = next(iter(scopes(model)))
    layers: dict[ir.Node, Layer | str] = {}
    takers: dict[str, list[tuple[Sink, Ints]]] = {group.name: [] for group in coupling.groups}
    groups = _Members(coupling.groups)
    for sink in coupling.sinks:
        value = sink.node.inputs[sink.index]
        labels = None if value is None else coupling.labels_of(value, sink.axis)
        if labels is None:
            continue
        if sink.node not in layers:
            layers[sink.node] = _read(sink, model, scope, coupling)
        for group, units in groups.among(labels):
            takers[group.name].append((sink, units))
    found: dict[str, tuple[Outlet, ...] | str] = {}
    for group in coupling.groups:
        own = [_outlet(sink, layers[sink.node], units, group) for sink, units in takers[group.name]]
        reasons = [outlet for outlet in own if isinstance(outlet, str)]
        read_ones = tuple(outlet for outlet in own if isinstance(outlet, Outlet))
        found[group.name] = reasons[0] if reasons else read_ones or "nothing sums it up"
    return found


class _Members:
    """Tells which units of which groups indexes belong to."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        sizes = [group.units for group in groups]
        roots = np.concatenate([group.roots for group in groups]) if groups else np.zeros(0, np.int64)
        order = np.argsort(roots)
        self._roots: Ints = roots[order]
        self._group: Ints = np.repeat(np.arange(len(groups)), sizes)[order]
        self._unit: Ints = np.concatenate([np.arange(size) for size in sizes])[order] if groups else roots

    def among(self, labels: Ints) -> Iterator[tuple[Group, Ints]]:
        """Yield each group that indexes are of, with the unit of each index; -1 for one that is of none of its."""
        if not len(self._roots):
            return
        place = np.minimum(np.searchsorted(self._roots, labels), len(self._roots) - 1)
        known = self._roots[place] == labels
        for group in np.unique(self._group[place[known]]).tolist():
            yield self._groups[group], np.where(known & (self._group[place] == group), self._unit[place], -1)


def _read(sink: Sink, model: ir.Model, scope: Scope, coupling: Coupling) -> Layer | str:
    """Read the layer that a sink is in, or say why it is none."""
    if sink.node.graph is not model.graph:
        return f"{label(sink.node)} is in a body of If, Loop or Scan"
    found = None if multiplied(sink) is None else read(sink.node, scope, coupling.shapes)
    if isinstance(found, Layer):
        return found
    return f"{label(sink.node)} is {NO_LAYER}" if found is None else f"{label(sink.node)}: {found}"


def _outlet(sink: Sink, layer: Layer | str, units: Ints, group: Group) -> Outlet | str:
    """Return how a layer takes the units of a group, or why it cannot be told."""
    if isinstance(layer, str):
        return layer
    convolution = is_op(layer.node, "Conv", "ConvTranspose")
    if is_op(layer.node, "ConvTranspose") and layer.groups != 1:
        return f"{label(sink.node)} has groups"
    if layer.groups * len(units) > MOST_INPUTS:
        return f"{label(sink.node)} takes more than {MOST_INPUTS:,} channels"
    counts = np.bincount(units[units >= 0], minlength=group.units)
    if layer.inputs % len(units) or not counts[0] or (counts != counts[0]).any():
        return f"{label(sink.node)} takes more of some units than of others"
    return Outlet(layer, 1 if convolution else layer.axis, units)


class Inputs:
    """Observes the products of the channels of a value at some of its positions. An `onnxopt.contract.Observer`.

    Attributes:
        learnt: The products in most samples.
        held: The same in those held back.
    """

    def __init__(self, size: int, axis: int, samples: int, seed: int) -> None:
        """Start from nothing.

        Args:
            size: Channels.
            axis: Their axis.
            samples: How many arrays there will be.
            seed: Seeds which positions are looked at.
        """
        self.learnt, self.held = Products(size), Products(size)
        self._held_back, self._seen = frozenset(held_back(samples)), 0
        self._axis = axis
        self._rows = math.ceil(max(LEAST_ROWS, ROWS * size) / max(1, samples))
        self._rng = np.random.default_rng(seed)

    def add(self, array: Array) -> None:
        """Take in an array."""
        rows = np.moveaxis(array, self._axis, -1).reshape(-1, array.shape[self._axis])
        if len(rows) > self._rows:
            rows = rows[self._rng.permutation(len(rows))[: self._rows]]
        (self.held if self._seen in self._held_back else self.learnt).add(rows)
        self._seen += 1


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What data say about a group.

    Attributes:
        group: The group.
        outlets: The layers behind it; none where they cannot be read, or nothing usable was seen.
        problems: The same as problems of least squares.
        unread: Why there are none; empty where there are.
    """

    group: Group
    outlets: tuple[Outlet, ...]
    problems: tuple[Problem, ...]
    unread: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A layer behind a group, as a problem of least squares over the channels that it takes.

    What a kernel sees of a channel at one offset is made up for by other channels at this offset. Where fewer positions
    were seen than the layer has inputs, the same holds for the places within a unit, as behind a Flatten.

    Attributes:
        consumer: The problem.
        means: (groups, channels) of the inputs.
        aligned: Whether places within units were taken for positions.
    """

    consumer: Consumer
    means: Array
    aligned: bool

    @classmethod
    def of(cls, outlet: Outlet, learnt: Products, held: Products) -> Problem:
        """Make the problem of a layer from the products of its inputs, in most samples and in those held back."""
        layer, channels = outlet.layer, len(outlet.units)
        means = learnt.mean.reshape(layer.groups, channels)
        about = means if layer.takes_bias else np.zeros_like(means)
        covariance, apart = learnt.about(about), held.about(about)
        weight: Array = layer.weight().reshape(layer.groups, layer.outputs, channels, -1)
        weight = np.moveaxis(weight, -1, 2).reshape(layer.groups, -1, channels)
        places = outlet.places
        aligned = learnt.count < SEEN * channels and places.shape[1] > 1 and (outlet.units >= 0).all()
        units = outlet.units
        if aligned:
            rows, columns = places[:, None, :], places[None, :, :]
            covariance, apart = (products[:, rows, columns].mean(axis=-1) for products in (covariance, apart))
            weight = np.moveaxis(weight[:, :, places], -1, 2).reshape(layer.groups, -1, len(places))
            units = np.arange(len(places))
        return cls(Consumer(covariance, apart, weight, units), means, bool(aligned))

    def change(self, outlet: Outlet, weight: Array) -> Change:
        """Return what to add to a layer so that it has the weight of its problem, and the same mean output."""
        layer, channels = outlet.layer, len(outlet.units)
        moved: Array = weight - self.consumer.weight
        if self.aligned:
            units, span = outlet.places.shape
            apart = np.moveaxis(moved.reshape(layer.groups, -1, span, units), 2, -1)
            moved = np.zeros((layer.groups, apart.shape[1], channels))
            moved[:, :, outlet.places] = apart
        means = np.einsum("goc,gc->go", moved, self.means).reshape(layer.groups, layer.outputs, -1).sum(axis=-1)
        moved = np.moveaxis(moved.reshape(layer.groups, layer.outputs, -1, channels), 2, -1)
        return Change(moved.reshape(layer.groups, layer.outputs, -1), -means)


def observe(
    model: ir.Model,
    groups: Sequence[Group],
    found: Mapping[str, tuple[Outlet, ...] | str],
    calibration: Calibration,
    seed: int,
) -> Iterator[Seen]:
    """Yield what the inputs of the layers behind groups look like, with bounded memory.

    Args:
        model: The model that was analysed; it is not changed.
        groups: The groups.
        found: The layers behind them, or why they cannot be read.
        calibration: The data.
        seed: Seeds which positions are looked at.
    """
    portion: list[Group] = []
    sizes: dict[tuple[str, int], int] = {}
    for group in groups:
        own = {outlet.place: outlet.size for outlet in _known(found[group.name])}
        if sizes and sum(16 * size**2 for size in (sizes | own).values()) > MOMENT_BYTES:
            yield from _seen(model, portion, sizes, found, calibration, seed)
            portion, sizes = [], {}
        portion.append(group)
        sizes |= own
    yield from _seen(model, portion, sizes, found, calibration, seed)


def _seen(
    model: ir.Model,
    portion: Sequence[Group],
    sizes: Mapping[tuple[str, int], int],
    found: Mapping[str, tuple[Outlet, ...] | str],
    calibration: Calibration,
    seed: int,
) -> Iterator[Seen]:
    observers = {place: Inputs(size, place[1], calibration.samples, seed) for place, size in sizes.items()}
    named: dict[str, list[Inputs]] = {}
    for (name, _), observer in observers.items():
        named.setdefault(name, []).append(observer)
    if named:
        calibration.observe(model, named)
    for group in portion:
        own, unread = _known(found[group.name]), found[group.name]
        pairs = [(o.learnt, o.held) for o in (observers[outlet.place] for outlet in own)]
        if isinstance(unread, str):
            yield Seen(group, (), (), unread)
        elif not all(products.usable for pair in pairs for products in pair):
            yield Seen(group, (), (), TOO_FEW)
        else:
            problems = tuple(Problem.of(o, *pair) for o, pair in zip(own, pairs, strict=True))
            spoilt = not all(np.isfinite(problem.consumer.weight).all() for problem in problems)
            yield Seen(group, (), (), SPOILT) if spoilt else Seen(group, own, problems)


def _known(found: tuple[Outlet, ...] | str) -> tuple[Outlet, ...]:
    return () if isinstance(found, str) else found
