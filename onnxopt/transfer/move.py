"""Moving parameters along the matches: what is wanted of each layer, written until nothing contradicts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.transfer.edit import Editor, shared_operands
from onnxopt.transfer.fit import MissingBias, Ratios, Write, describe, fit, is_quantized
from onnxopt.transfer.match import Pair
from onnxopt.transfer.skeleton import Group, Operand, Skeleton
from onnxopt.transfer.tensors import Array, Store, Tensor, Unwritable
from onnxopt.transfer.view import Viewer

_ROUNDING = 0.05


@dataclasses.dataclass(frozen=True)
class Moved:
    """The target after a move.

    Attributes:
        skeleton: The target's skeleton, changed graph and all.
        how: Index of a layer -> what was done to its parameters, in words.
        failed: Index of a layer -> why it could not take them.
        ratios: Index of a layer -> what its results were multiplied by.
        added: How many layers were given a bias.
        unshared: How many operands were given a tensor of their own.
    """

    skeleton: Skeleton
    how: dict[int, str]
    failed: dict[int, str]
    ratios: dict[int, float]
    added: int
    unshared: int


def move(
    source: Skeleton,
    target: ir.Model,
    pairs: Sequence[Pair],
    chosen: Collection[int],
    limits: Mapping[str, float] | None = None,
) -> Moved:
    """Write the source's parameters into a model.

    Args:
        source: The model they come from.
        target: The model they go to; it is changed.
        pairs: All matches, by the indexes of a skeleton of `target`.
        chosen: Indexes of the target's layers that take part; the others keep what they compute with.
        limits: As `in_real_numbers` takes them, of the target.
    """
    return _Move(source, target, pairs, chosen, dict(limits or {})).run()


class _Move:
    def __init__(
        self,
        source: Skeleton,
        target: ir.Model,
        pairs: Sequence[Pair],
        chosen: Collection[int],
        limits: dict[str, float],
    ) -> None:
        self._source, self._target, self._limits = source, target, limits
        self._matches = [(p.source.index, p.target.index, p.confidence) for p in pairs]
        self._chosen = set(chosen)
        self._failed: dict[int, str] = {}
        self._how: dict[int, str] = {}
        self._ratios: dict[int, float] = {}
        self._added = self._unshared = 0
        self._apart: set[Operand] = set()

    def run(self) -> Moved:
        """Write, mend what stands in the way, and write again."""
        self._add_biases()
        while True:
            viewer = Viewer(self._target, self._limits)
            skeleton = viewer.view()
            store, contradicted = self._write(skeleton)
            if not contradicted:
                editor = Editor(viewer.real)
                editor.commit(store)
                editor.drop_unused()
                return Moved(skeleton, self._how, self._failed, self._ratios, self._added, self._unshared)
            self._separate(viewer, skeleton, contradicted)

    def _pairs(self, skeleton: Skeleton) -> list[Pair]:
        return [Pair(self._source.groups[s], skeleton.groups[t], c) for s, t, c in self._matches]

    def _wanted(self, pair: Pair, ratios: Ratios) -> list[Write]:
        ratio = ratios.of(pair)
        writes = fit(pair, ratio, Store())
        self._ratios[pair.target.index] = ratio
        self._how[pair.target.index] = describe(pair, ratio)
        return writes

    def _active(self, skeleton: Skeleton) -> list[Pair]:
        return [p for p in self._pairs(skeleton) if p.target.index in self._chosen - self._failed.keys()]

    def _add_biases(self) -> None:
        skeleton = Viewer(self._target, self._limits).view()
        ratios = Ratios(self._source, skeleton, self._pairs(skeleton))
        editor = Editor(skeleton.real)
        for pair in self._active(skeleton):
            if any(m.kind != "scale" for m in pair.target.members):
                continue
            try:
                self._wanted(pair, ratios)
            except MissingBias:
                try:
                    editor.add_bias(pair.target)
                    self._added += 1
                except Unwritable as error:
                    self._failed[pair.target.index] = str(error)
            except Unwritable as error:
                self._failed[pair.target.index] = str(error)

    def _write(self, skeleton: Skeleton) -> tuple[Store, set[int]]:
        """Write all that is wanted; return what was written, and the layers that it was overwritten of."""
        pairs = self._pairs(skeleton)
        ratios = Ratios(self._source, skeleton, pairs)
        store = Store()
        read: dict[int, list[Array]] = {}
        for pair in self._active(skeleton):
            index = pair.target.index
            before = dict(store.written)
            try:
                for write in self._wanted(pair, ratios):
                    write.tensor.write(write.array, store)
            except Unwritable as error:
                store.written = before
                self._failed[index] = str(error)
                continue
            read[index] = [t.read(store) for t in pair.target.tensors()]
        return store, self._contradicted(skeleton, store, read)

    def _contradicted(self, skeleton: Skeleton, store: Store, read: dict[int, list[Array]]) -> set[int]:
        found = set()
        for group in skeleton.layers:
            touched = [leaf for leaf in group.leaves() if leaf in store.written]
            if not touched:
                continue
            wanted = read.get(group.index)
            if wanted is None:
                wanted = [t.read(Store()) for t in group.tensors()]
            now = [t.read(store) for t in group.tensors()]
            if not all(_same(a, b, t) for a, b, t in zip(wanted, now, group.tensors(), strict=True)):
                found.add(group.index)
        return found

    def _separate(self, viewer: Viewer, skeleton: Skeleton, contradicted: set[int]) -> None:
        """Give layers that contradict each other tensors of their own, or let them fail."""
        editor = Editor(viewer.real)
        shared = set(shared_operands(skeleton.layers, viewer.tracer)) - self._apart
        done = set()
        for index in sorted(contradicted):
            group = skeleton.groups[index]
            mine = [o for o in group.operands if o in shared]
            try:
                if not mine:
                    raise Unwritable("a part of its tensor is shared with a layer that gets other numbers")
                for operand in mine:
                    if operand not in done:
                        editor.unshare(operand, viewer.tracer)
                        done.add(operand)
                        self._apart.add(operand)
                        self._unshared += 1
            except Unwritable as error:
                self._failed_together(group, skeleton, str(error))

    def _failed_together(self, group: Group, skeleton: Skeleton, reason: str) -> None:
        """Give up a layer and what shares tensors with it: none of them may change."""
        leaves = set(group.leaves())
        for other in skeleton.layers:
            if other.index in self._chosen and leaves.intersection(other.leaves()):
                self._failed.setdefault(other.index, reason)


def _same(first: Array, second: Array, tensor: Tensor) -> bool:
    # Writing a part of a quantized tensor may move its neighbours by a rounding.
    slack = _ROUNDING * float(np.abs(first).max(initial=0)) if is_quantized(tensor) else 0.0
    return bool(np.allclose(first, second, rtol=1e-6, atol=slack, equal_nan=True))
