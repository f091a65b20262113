"""What a reference model computes, and how exactly another model must compute the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.compare.deviation import Difference, Extent, blank, difference, differing, extent, nbytes
from onnxopt.compare.tolerance import Rounding
from onnxopt.errors import RuntimeFailure
from onnxopt.feeds import Feed
from onnxopt.runtime import RunOptions, open_session
from onnxopt.session.loaded import Session

SPREAD_FACTOR = 3.0
"""An exact result may differ by this many times what the original differs by between optimizations off and on."""

OPTIMIZED_FACTOR = 10.0
"""With optimizations on, an exact result may differ by this many times what it may with them off: the runtime
fuses what it finds, and finds other things in another graph."""

Outputs = dict[str, Any]
Mode = Literal["exact", "as run"]


class Original:
    """A reference's outputs in one setting: computed once, and kept while they fit the cache.

    Attributes:
        options: Provider, threads and custom operators it runs with.
        optimized: Whether the runtime's optimizations are on.
        names: Names of the outputs, in order.
        numbers: Which of the given feeds it runs; the others fail.
        extents: Which values each output takes, over all feeds.
        unstable: Outputs that differ between two runs, by how much relative to their range.
        notes: Feeds that were left out, in words.
    """

    def __init__(
        self, model: ir.Model, feeds: Sequence[Feed], options: RunOptions, *, optimized: bool, cache_bytes: int
    ) -> None:
        """Run the model once on every feed.

        Raises:
            RuntimeFailure: If it cannot be loaded, or runs on none of the feeds.
        """
        self.options, self.optimized = options, optimized
        self.names = [v.name or "" for v in model.graph.outputs]
        self.numbers: list[int] = []
        self.extents = dict.fromkeys(self.names, Extent())
        self.notes: tuple[str, ...] = ()
        self._model, self._feeds = model, feeds
        self._kept: list[Outputs] | None = []
        self._room = cache_bytes
        with open_session(model, options, optimized=optimized) as session:
            first = self._first_pass(session)
            again = session.run(feeds[self.numbers[0]])
        self.unstable = {
            name: found.max_abs / self.extents[name].scale
            for name in self.names
            if (found := difference(first[name], again[name])).exceeded
        }

    @property
    def mode(self) -> Mode:
        """What a comparison in this setting is called."""
        return "as run" if self.optimized else "exact"

    @property
    def feeds(self) -> list[Feed]:
        """The feeds it runs."""
        return [self._feeds[number] for number in self.numbers]

    def __iter__(self) -> Iterator[Outputs]:
        """Yield the outputs of one feed after the other."""
        if self._kept is not None:
            yield from self._kept
            return
        with open_session(self._model, self.options, optimized=self.optimized) as session:
            for number in self.numbers:
                yield session.run(self._feeds[number])

    def _first_pass(self, session: Session) -> Outputs:
        """Run all feeds and return the outputs of the first that runs."""
        first: Outputs | None = None
        failure: RuntimeFailure | None = None
        for number, feed in enumerate(self._feeds):
            try:
                outputs = session.run(feed)
            except RuntimeFailure as error:
                failure = failure or error
                continue
            self.numbers.append(number)
            self._take(outputs)
            first = outputs if first is None else first
        if first is None:
            assert failure is not None, "there is at least one feed"
            raise failure
        if failure is not None:
            left_out = len(self._feeds) - len(self.numbers)
            self.notes = (f"the original does not run on {left_out} of {len(self._feeds)} feeds: {failure}",)
        return first

    def _take(self, outputs: Outputs) -> None:
        for name in self.names:
            self.extents[name] |= extent(outputs[name])
        self._room -= sum(nbytes(value) for value in outputs.values())
        if self._room < 0:
            self._kept = None
        if self._kept is not None:
            self._kept.append(outputs)


@dataclasses.dataclass(frozen=True, slots=True)
class Flips:
    """Where a discrete output differs between optimizations off and on.

    Attributes:
        where: Flat positions.
        distance: Largest difference there.
    """

    where: np.ndarray
    distance: float

    def cover(self, where: np.ndarray) -> bool:
        """Whether all of these positions flip."""
        return np.setdiff1d(where, self.where).size == 0

    def outweigh(self, where: np.ndarray, distance: float) -> bool:
        """Whether so many flips of at most this distance are nothing new."""
        return distance <= self.distance and where.size <= SPREAD_FACTOR * self.where.size


@dataclasses.dataclass(frozen=True, slots=True)
class Incomparable:
    """Why the values of an output cannot be compared, and whether its shape can."""

    reason: str
    same_shape: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Ruler:
    """What exact results are measured by.

    Attributes:
        tolerance: Output -> allowed deviation relative to its range, in the setting of the comparison.
        loose: The same for the run with optimizations on.
        flips: (output, number of the feed) -> what the original itself flips, for discrete outputs.
        incomparable: Outputs of which only type and shape can be compared.
    """

    tolerance: dict[str, float]
    loose: dict[str, float]
    flips: dict[tuple[str, int], Flips]
    incomparable: dict[str, Incomparable]


def make_ruler(
    rounding: Mapping[str, Rounding], original: Original, optimized: Original | None, target: Original | None
) -> Ruler:
    """Find out how exactly the outputs of a reference can be reproduced.

    Args:
        rounding: What rounding may do to each output.
        original: The reference in the setting of the comparison.
        optimized: The same with optimizations on; None when it does not run.
        target: With optimizations on and on the provider the result is for; None when it does not run.
    """
    ruler = Ruler({}, {}, {}, {})
    for name in original.names:
        derived = rounding[name].tolerance * original.extents[name].amplification
        between_runs = original.unstable.get(name, 0.0)
        ruler.tolerance[name] = max(derived, SPREAD_FACTOR * min(between_runs, derived))
        if rounding[name].random:
            ruler.incomparable[name] = Incomparable("depends on a random operator")
        elif between_runs > derived:
            ruler.incomparable[name] = Incomparable("differs between two runs of the original")
    for name, spread in _spread(original, optimized, ruler).items():
        ruler.tolerance[name] = max(ruler.tolerance[name], SPREAD_FACTOR * spread)
    ruler.loose.update({n: OPTIMIZED_FACTOR * tolerance for n, tolerance in ruler.tolerance.items()})
    if target is not optimized:
        for name, spread in _spread(original, target, ruler).items():
            ruler.loose[name] = max(ruler.loose[name], SPREAD_FACTOR * spread)
    return ruler


def _spread(original: Original, other: Original | None, ruler: Ruler) -> dict[str, float]:
    """Return by how much two settings of the reference differ, and note what flips or cannot be compared."""
    worst = dict.fromkeys(original.names, 0.0)
    if other is None:
        return worst
    common = set(original.numbers) & set(other.numbers)
    pairs = zip(
        (outputs for number, outputs in zip(original.numbers, original, strict=True) if number in common),
        (outputs for number, outputs in zip(other.numbers, other, strict=True) if number in common),
        sorted(common),
        strict=True,
    )
    for one, two, number in pairs:
        for name in original.names:
            found = difference(one[name], two[name])
            if found.broken:
                layout = difference(blank(one[name]), blank(two[name]))
                ruler.incomparable.setdefault(name, Incomparable(_in_itself(found), not layout.broken))
            elif found.kind == "float":
                worst[name] = max(worst[name], found.max_abs / original.extents[name].scale)
            elif found.exceeded and isinstance(one[name], np.ndarray):
                ruler.flips.setdefault((name, number), Flips(differing(one[name], two[name]), found.max_abs))
    return worst


def _in_itself(found: Difference) -> str:
    return f"is not the same in the original with the runtime's optimizations off and on: it {found.broken}"
