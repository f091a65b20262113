"""What is saved when units go: products of the sizes of axes, which groups make smaller."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.contract import Calibration
from onnxopt.coupling.analysis import Coupling
from onnxopt.graph import constant_tensor, is_op

Array = npt.NDArray[Any]

FEW = 4
"""So many samples tell the sizes of values."""


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """Something of which a model has as much as the product of some sizes.

    Attributes:
        factor: What the product is multiplied by.
        sizes: The sizes as they are.
        parts: For each size: index of a group -> how much a unit of it adds to the size.
    """

    factor: float
    sizes: tuple[int, ...]
    parts: tuple[Mapping[int, int], ...]

    def left(self, gone: Array) -> Array:
        """Return what is left, (...,), when (..., groups) units are gone."""
        total = np.full(gone.shape[:-1], float(self.factor))
        for size, parts in zip(self.sizes, self.parts, strict=True):
            total *= size - sum((gone[..., g] * part for g, part in parts.items()), np.zeros(gone.shape[:-1]))
        return total


class Costs:
    """A sum of terms."""

    def __init__(self, terms: Sequence[Term], groups: int) -> None:
        """Take the terms, and how many groups there are."""
        self.groups = groups
        self._terms = tuple(terms)
        self._of: dict[int, list[Term]] = defaultdict(list)
        for term in self._terms:
            for group in {g for parts in term.parts for g in parts}:
                self._of[group].append(term)

    def left(self, gone: Array) -> float:
        """Return the cost when so many units of each group are gone."""
        return float(sum(term.left(gone) for term in self._terms))

    def saved(self, gone: Array, group: int, counts: Array) -> Array:
        """Return what is saved when other numbers of units of a group are gone instead, (counts,)."""
        then = np.repeat(gone[None], len(counts), axis=0)
        then[:, group] = counts
        total: Array = np.zeros(len(counts))
        for term in self._of[group]:
            total += term.left(gone) - term.left(then)
        return total

    def together(self, group: int) -> set[int]:
        """Return the groups whose savings depend on how much of a group is gone."""
        return {g for term in self._of[group] for parts in term.parts for g in parts}


def channels(coupling: Coupling) -> Costs:
    """Return the number of channels: a head counts as many as it has."""
    terms = [Term(group.span, (group.units,), ({index: 1},)) for index, group in enumerate(coupling.groups)]
    return Costs(terms, len(terms))


def elements(coupling: Coupling, factors: Mapping[str, float] | None = None) -> Costs:
    """Return the number of elements of the constants that groups run through.

    Args:
        coupling: The analysis.
        factors: Name of a constant -> what its elements count, for example how often each is used; 0 for others.
    """
    parts: dict[ir.Value, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    shapes: dict[ir.Value, tuple[int, ...]] = {}
    for index, group in enumerate(coupling.groups):
        for member in group.members:
            parts[member.value][member.axis][index] = int((member.units == 0).sum())
            shapes[member.value] = tuple(int(size) for size in member.tensor.shape.numpy())
    terms = []
    for value, axes in parts.items():
        factor = 1.0 if factors is None else factors.get(value.name or "", 0.0)
        if factor:
            own = tuple(axes.get(axis, {}) for axis in range(len(shapes[value])))
            terms.append(Term(factor, shapes[value], own))
    return Costs(terms, len(coupling.groups))


class Positions:
    """Observes at how many positions nodes compute their channels. An `onnxopt.contract.JointObserver`.

    Attributes:
        reference: Nothing of the first model.
        changed: The outputs of the nodes.
    """

    def __init__(self, nodes: Sequence[ir.Node]) -> None:
        """Observe the first outputs of nodes."""
        self.reference: tuple[str, ...] = ()
        self.changed = tuple(node.outputs[0].name or "" for node in nodes)
        self._axes = [1 if node.op_type in ("Conv", "ConvTranspose") else -1 for node in nodes]
        self._total, self._seen = np.zeros(len(nodes)), 0

    def add(self, reference: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> None:
        """Take in the outputs for a sample."""
        self._seen += 1
        for index, (array, axis) in enumerate(zip(changed, self._axes, strict=True)):
            self._total[index] += array.size / max(1, array.shape[axis])

    @property
    def mean(self) -> Array:
        """How many there are in a sample."""
        mean: Array = self._total / max(1, self._seen)
        return mean


def products(model: ir.Model, coupling: Coupling, calibration: Calibration) -> Costs:
    """Return the number of multiplications by the constants that groups run through, for a typical sample.

    Args:
        model: The model that was analysed; it is not changed.
        coupling: The analysis.
        calibration: The data.
    """
    touched = {member.value for group in coupling.groups for member in group.members}
    nodes = [
        node
        for node in model.graph
        if is_op(node, "Conv", "ConvTranspose", "MatMul", "Gemm") and node.inputs[1] in touched and node.outputs[0].name
    ]
    observer = Positions(nodes)
    calibration.observe_both(model, model, [observer], most=FEW)
    factors: dict[str, float] = defaultdict(float)
    for node, count in zip(nodes, observer.mean, strict=True):
        weight = node.inputs[1]
        if weight is not None and constant_tensor(weight) is not None:
            factors[weight.name or ""] += float(count)
    return elements(coupling, factors)
