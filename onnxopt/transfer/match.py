"""Which layer of one model corresponds to which of another, and how sure that is.

First by hashes of everything before and everything after a layer: one that a single layer of each model has is
decisive. Then by either alone, which matches the trunks of models whose ends differ. Then by what is around a layer,
where neighbours that are settled are told apart, so that a match spreads along the sequence from its anchors. What
remains are layers that swap places without changing the graph; these are paired in order, one branch as a whole, and
stay ambiguous until outputs confirm them.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Literal

from onnxopt.transfer.colors import Colors, Painter
from onnxopt.transfer.skeleton import Group, Skeleton

Confidence = Literal["exact", "aligned", "ambiguous"]
_AROUND: tuple[tuple[tuple[str, ...], bool], ...] = (
    (("before", "after"), True),
    (("before", "after"), False),
    (("before",), False),
    (("after",), False),
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two layers that correspond.

    Attributes:
        source: The layer that parameters come from.
        target: The layer that they go to.
        confidence: "exact": everything before and after is the same, and no other layer of either model is like it.
            "aligned": what is before, after, or around it is. "ambiguous": others have the same place.
    """

    source: Group
    target: Group
    confidence: Confidence


def match(source: Skeleton, target: Skeleton, turn: int = 0) -> list[Pair]:
    """Return the corresponding layers of two models, in the order of the target's.

    Args:
        source: The model that parameters come from.
        target: The model that they go to.
        turn: By how many places layers that swap places are turned against each other.
    """
    found = _Matcher(source, target)
    found.exact("exact")
    found.one_sided()
    found.spread()
    found.symmetric(turn)
    return [
        Pair(source.groups[s], target.groups[t], confidence)
        for t, (s, confidence) in sorted(found.pairs.items())
        if target.groups[t].kind not in ("input", "output")
    ]


class _Matcher:
    """The matches so far.

    Attributes:
        pairs: Index in the target -> index in the source and confidence.
    """

    def __init__(self, source: Skeleton, target: Skeleton) -> None:
        self._skeletons = source, target
        keys = _interface_keys(source, target)
        self._painters = Painter(source, keys[0]), Painter(target, keys[1])
        self.pairs: dict[int, tuple[int, Confidence]] = {}
        self._marks: tuple[dict[int, object], dict[int, object]] = ({}, {})

    def exact(self, confidence: Confidence) -> bool:
        """Match what has the same ancestors and descendants, and is alone in that; return whether something did."""
        up, down = self._both("ancestors"), self._both("descendants")
        colors = [[f"{u}{d}" for u, d in zip(*pair, strict=True)] for pair in zip(up, down, strict=True)]
        return self._unique(colors[0], colors[1], confidence)

    def one_sided(self) -> None:
        """Match what has the same ancestors, or else the same descendants."""
        for way in ("ancestors", "descendants"):
            first, second = self._both(way)
            self._unique(first, second, "aligned")

    def spread(self) -> None:
        """Match what is around what is matched, until nothing is added."""
        going = True
        while going:
            going = False
            for sides, inputs in _AROUND:
                first, second = (
                    p.surroundings(m, sides, inputs=inputs) for p, m in zip(self._painters, self._marks, strict=True)
                )
                if self._unique(first, second, "aligned", anchored=True):
                    going = True
                    break

    def symmetric(self, turn: int) -> None:
        """Pair layers that swap places without changing the graph: one by fiat, then all that follows from it."""
        while True:
            up, down = self._both("ancestors"), self._both("descendants")
            classes = [
                self._classes([f"{u}{d}" for u, d in zip(*pair, strict=True)], side)
                for side, pair in enumerate(zip(up, down, strict=True))
            ]
            tied = [c for c in classes[0] if len(classes[0][c]) == len(classes[1].get(c, ()))]
            if not tied:
                return
            color = min(tied, key=lambda c: classes[0][c][0])
            theirs = classes[1][color]
            self._add(classes[0][color][0], theirs[turn % len(theirs)], "ambiguous")
            while self.exact("ambiguous"):
                pass

    def _both(self, way: str) -> tuple[Colors, Colors]:
        first, second = (getattr(p, way)(m) for p, m in zip(self._painters, self._marks, strict=True))
        return first, second

    def _classes(self, colors: Colors, side: int) -> dict[str, list[int]]:
        """Return color -> unmatched layers of it."""
        found: dict[str, list[int]] = collections.defaultdict(list)
        for group in self._skeletons[side].groups:
            if group.index not in self._marks[side]:
                found[colors[group.index]].append(group.index)
        return found

    def _unique(self, first: Colors, second: Colors, confidence: Confidence, *, anchored: bool = False) -> bool:
        ours, theirs = self._classes(first, 0), self._classes(second, 1)
        new = [
            (ours[color][0], theirs[color][0])
            for color in ours
            if len(ours[color]) == 1 and len(theirs.get(color, ())) == 1
        ]
        if anchored:
            new = [
                (s, t)
                for s, t in new
                if self._painters[0].marked_neighbours(s, self._marks[0])
                and self._painters[1].marked_neighbours(t, self._marks[1])
            ]
        before = len(self.pairs)
        for s, t in new:
            if confidence != "aligned" or self._is_consistent(s, t):
                self._add(s, t, confidence)
        return len(self.pairs) > before

    def _is_consistent(self, source: int, target: int) -> bool:
        """Whether matched neighbours of two layers are neighbours of both; inputs of the model do not count."""
        back = {s: t for t, (s, _) in self.pairs.items()}
        forth = {t: s for t, (s, _) in self.pairs.items()}
        for around in ("before", "after"):
            ours, theirs = (
                {i for i in getattr(p, around)(n) if k.groups[i].kind not in ("input", "output")}
                for p, n, k in zip(self._painters, (source, target), self._skeletons, strict=True)
            )
            if any(back.get(i, -1) not in theirs for i in ours if i in back):
                return False
            if any(forth.get(i, -1) not in ours for i in theirs if i in forth):
                return False
        return True

    def _add(self, source: int, target: int, confidence: Confidence) -> None:
        self.pairs[target] = source, confidence
        self._marks[0][source] = self._marks[1][target] = len(self.pairs)


def _interface_keys(source: Skeleton, target: Skeleton) -> list[dict[int, tuple[object, ...]]]:
    """Return keys of inputs and outputs: by name where all names are the same, else by position."""
    found: list[dict[int, tuple[object, ...]]] = [{}, {}]
    for kind in ("input", "output"):
        sides = [[g for g in s.groups if g.kind == kind] for s in (source, target)]
        named = {g.name for g in sides[0]} == {g.name for g in sides[1]}
        for keys, groups in zip(found, sides, strict=True):
            keys.update({g.index: (kind, g.name if named else number) for number, g in enumerate(groups)})
    return found
