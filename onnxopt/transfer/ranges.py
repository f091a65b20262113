"""Grids of activations after a transfer: they were learnt with other parameters.

A grid covers a certain part of what its activation took on when it was calibrated: all of it, or less where a
percentile or an error decided. So it is scaled by how much further the activation reaches with the new parameters than
with the old ones, on the same inputs and without rounding. Zero points stay, and a grid that takes the place of
Clip(x, 0, limit) ends there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxopt.calibrate.collector import observe
from onnxopt.contract import Silent
from onnxopt.feeds import Feed
from onnxopt.graph import constant_array
from onnxopt.runtime import RunOptions
from onnxopt.transfer.edit import Editor
from onnxopt.transfer.quantized import LEVELS, Dequantized, Product
from onnxopt.transfer.real import Grid
from onnxopt.transfer.skeleton import Skeleton
from onnxopt.transfer.tensors import Array, Store
from onnxopt.transfer.wide import widened

_SAME = 1e-6


def rescale(before: Skeleton, after: Skeleton, feeds: Sequence[Feed], options: RunOptions) -> int:
    """Scale the grids of a model whose parameters have changed.

    Args:
        before: The model as it was.
        after: The model as it is; it is changed.
        feeds: What both are run on.
        options: How to run them.

    Returns:
        How many grids have changed.

    Raises:
        RuntimeFailure: If a model does not run.
    """
    reached = [_reached(skeleton, feeds, options) for skeleton in (before, after)]
    weights = {leaf for group in after.layers for leaf in group.leaves()}
    store = Store()
    old = {grid.scale: grid for grid in after.real.grids}
    for scale, grid in old.items():
        ends = [sides.get(scale.name or "") for sides in reached]
        step = constant_array(scale)
        if scale in weights or step is None or step.size != 1 or ends[0] is None or ends[1] is None:
            continue
        limit = min(after.real.limits.get(g.name, np.inf) for g in after.real.grids if g.scale is scale)
        new = _step(float(step.reshape(())), grid, ends[0], ends[1], limit)
        if abs(new / float(step.reshape(())) - 1) > _SAME:
            store.put(scale, np.full(step.shape, new))
    if store.written:
        for multiple in after.real.multiples:
            if multiple.base in store.written:
                store.put(multiple.scale, store.get(multiple.base).astype(np.float64) * multiple.factor)
        _follow(after, store)
        Editor(after.real).commit(store)
    return sum(scale in store.written for scale in old)


class _Ends:
    """The lowest and the highest finite number seen, and 0."""

    def __init__(self) -> None:
        """Start at 0."""
        self.low = self.high = 0.0

    def add(self, array: Array) -> None:
        """Take in the values of one run."""
        finite = array[np.isfinite(array)]
        self.low = min(self.low, float(finite.min(initial=0)))
        self.high = max(self.high, float(finite.max(initial=0)))


def _reached(skeleton: Skeleton, feeds: Sequence[Feed], options: RunOptions) -> dict[str, _Ends]:
    """Return how far what is rounded reaches, by the names of scales."""
    graph = skeleton.model.graph
    found: dict[str, _Ends] = {}
    observers: dict[str, list[_Ends]] = {}
    for grid in skeleton.real.grids:
        if grid.value.graph is graph and grid.value.name and not grid.value.is_initializer():
            ends = found.setdefault(grid.scale.name or "", _Ends())
            observers.setdefault(grid.value.name, []).append(ends)
    observe(widened(skeleton), observers, feeds, options, Silent())
    return found


def _step(step: float, grid: Grid, before: _Ends, after: _Ends, limit: float) -> float:
    """Return the distance between two levels that covers as much of what an activation reaches as it did."""
    lowest, highest = LEVELS[grid.dtype]
    offset = constant_array(grid.zero)
    zero = 0 if offset is None else int(offset.reshape(-1)[0])
    factors = []
    if zero > lowest and before.low < 0:
        factors.append(after.low / before.low)
    if zero < highest and before.high > 0:
        factors.append(min(after.high, limit) / min(before.high, limit))
    new = step * max(factors, default=1.0)
    if np.isfinite(limit) and zero < highest:
        new = min(new, max(step, limit / (highest - zero)))
    return new if new > 0 and np.isfinite(new) else step


def _follow(skeleton: Skeleton, store: Store) -> None:
    """Write biases anew whose steps follow from those of activations."""
    for tensor in skeleton.real.tensors.values():
        scale = tensor.scale if isinstance(tensor, Dequantized) else None
        if isinstance(scale, Product) and any(leaf in store.written for f in scale.factors for leaf in f.leaves()):
            tensor.write(tensor.read(Store()), store)
