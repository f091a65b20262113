"""How much to remove of every layer to reach a number of parameters or a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from onnxopt.analysis.fills import filled_elements
from onnxopt.contract import Timed
from onnxopt.coupling.analysis import Coupling, Group, analyse
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.removal import Removal
from onnxopt.graph import all_nodes, constant_tensor

STEPS = 16
"""Ratios are tried in steps of a sixteenth when models are timed, and of a 256th of that when elements are counted."""

Keep = Callable[[Group, float], int]
"""How many units of a group stay at a ratio."""


def elements(model: ir.Model) -> int:
    """Return how many elements the constants of a model have, with those that nodes fill with one number."""
    initializers = (value for scope in _graphs(model) for value in scope.initializers.values())
    outputs = (output for node in all_nodes(model) for output in node.outputs)
    tensors = (constant_tensor(value) for value in (*initializers, *outputs))
    return sum(tensor.size for tensor in tensors if tensor is not None) + filled_elements(model)


def _graphs(model: ir.Model) -> Iterable[ir.Graph]:
    found = {model.graph: None}
    found.update((node.graph, None) for node in all_nodes(model) if isinstance(node.graph, ir.Graph))
    return found


def removed(coupling: Coupling, gone: Mapping[str, int]) -> int:
    """Return how many elements of constants go when so many units of each group do.

    Args:
        coupling: The analysis.
        gone: Name of a group -> how many of its units go.
    """
    lost: dict[ir.Value, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    shapes: dict[ir.Value, tuple[int, ...]] = {}
    for group in coupling.groups:
        for member in group.members:
            per_unit = int((member.units == 0).sum())
            lost[member.value][member.axis] += per_unit * gone.get(group.name, 0)
            shapes[member.value] = tuple(int(size) for size in member.tensor.shape.numpy())
    total = 0
    for value, axes in lost.items():
        before = after = 1
        for axis, size in enumerate(shapes[value]):
            before, after = before * size, after * (size - axes.get(axis, 0))
        total += before - after
    return total


def ratio_for_elements(coupling: Coupling, total: int, fraction: float, keep: Keep) -> float | None:
    """Return the smallest ratio at which at most a fraction of all elements is left, or None if none does.

    Args:
        coupling: The analysis.
        total: Elements of all constants of the model.
        fraction: What may be left of them.
        keep: How many units stay at a ratio.
    """

    def fits(step: int) -> bool:
        ratio = step / (STEPS * 256)
        gone = {group.name: group.units - keep(group, ratio) for group in coupling.groups}
        return total - removed(coupling, gone) <= fraction * total

    found = _first(fits, STEPS * 256 - 1)
    return None if found is None else found / (STEPS * 256)


def ratio_for_time(
    model: ir.Model, fraction: float, timed: Timed, key: str, choose: Callable[[float], Iterable[Ints]]
) -> float | None:
    """Return the smallest ratio at which a model takes at most a fraction of the original's time, or None.

    Args:
        model: The model that was analysed; it is not changed.
        fraction: What the result may take of the time of the original.
        timed: Times models.
        key: What the candidates are remembered by, with their ratio.
        choose: The units that go at a ratio.
    """

    def fits(step: int) -> bool:
        def make() -> ir.Model:
            candidate = model.clone()
            removal = Removal(candidate, analyse(candidate))
            for roots in choose(step / STEPS):
                removal.remove(roots)
            return candidate

        return timed(f"{key} {step}/{STEPS}", make) <= fraction

    found = _first(fits, STEPS - 1)
    return None if found is None else found / STEPS


def _first(fits: Callable[[int], bool], last: int) -> int | None:
    """Return the first step from 1 on that fits, when all after it do; None if the last does not."""
    low, high = 0, last
    if not fits(last):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
