"""Hashes of where a layer stands: what leads to it, what follows it, and what is around it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from onnxopt.transfer.skeleton import Group, Skeleton

Colors = list[str]
"""A hash per node of a skeleton, in its order."""


def digest(*parts: object) -> str:
    """Return a short hash of plain values; the same in every process."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()


def successors(skeleton: Skeleton) -> list[list[tuple[int, str]]]:
    """Return for each node which nodes it leads to, with the labels of the ways."""
    found: list[list[tuple[int, str]]] = [[] for _ in skeleton.groups]
    for group in skeleton.groups:
        for edge in group.edges:
            found[edge.source].append((group.index, edge.label))
    return found


class Painter:
    """Colors the nodes of one skeleton.

    Marks are given from outside: nodes of two skeletons that correspond carry the same one.
    """

    def __init__(self, skeleton: Skeleton, keys: Mapping[int, tuple[object, ...]] | None = None) -> None:
        """Take a skeleton, and other keys for some of its nodes."""
        self._groups = skeleton.groups
        self._keys = [(keys or {}).get(g.index, g.key) for g in self._groups]
        self._next = successors(skeleton)

    def ancestors(self, marks: Mapping[int, object]) -> Colors:
        """Return hashes of everything that leads to a node, and of the node."""
        found: Colors = []
        for group in self._groups:
            before = sorted((e.label, found[e.source]) for e in group.edges)
            found.append(digest(self._own(group, marks), before))
        return found

    def descendants(self, marks: Mapping[int, object]) -> Colors:
        """Return hashes of everything that follows a node, and of the node."""
        found = [""] * len(self._groups)
        for group in reversed(self._groups):
            after = sorted((label, found[index]) for index, label in self._next[group.index])
            found[group.index] = digest(self._own(group, marks), after)
        return found

    def surroundings(self, marks: Mapping[int, object], sides: Sequence[str], *, inputs: bool) -> Colors:
        """Return hashes of a node and its neighbours.

        Args:
            marks: Marks of nodes.
            sides: "before", "after" or both.
            inputs: Whether the inputs of the model count as neighbours.
        """
        own = [digest(self._own(g, marks)) for g in self._groups]
        found = []
        for group in self._groups:
            parts: list[object] = [own[group.index]]
            if "before" in sides:
                sources = [e for e in group.edges if inputs or self._groups[e.source].kind != "input"]
                parts.append(sorted((e.label, own[e.source]) for e in sources))
            if "after" in sides:
                parts.append(sorted((label, own[index]) for index, label in self._next[group.index]))
            found.append(digest(*parts))
        return found

    def before(self, index: int) -> set[int]:
        """Return what leads to a node."""
        return {e.source for e in self._groups[index].edges}

    def after(self, index: int) -> set[int]:
        """Return what a node leads to."""
        return {i for i, _ in self._next[index]}

    def marked_neighbours(self, index: int, marks: Mapping[int, object]) -> int:
        """Return how many layers around a node carry a mark."""
        around = self.before(index) | self.after(index)
        return sum(i in marks and self._groups[i].kind not in ("input", "output") for i in around)

    def _own(self, group: Group, marks: Mapping[int, object]) -> tuple[object, ...]:
        return (*self._keys[group.index], marks.get(group.index, ""))
