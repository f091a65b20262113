"""The values inside of a model, and whether others are equal to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxopt import feeds as feeding
from onnxopt.compare.deviation import Difference, Extent, difference, extent
from onnxopt.compare.tolerance import Rounding, roundings
from onnxopt.errors import DataError, RuntimeFailure
from onnxopt.feeds import Data, Feed
from onnxopt.graft.reasons import RefusedError
from onnxopt.graph import copied
from onnxopt.runtime import RunOptions, open_session

FEEDS = 4
"""Of the user's data, this many samples are run."""

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """How far a value lies from the one it should be equal to, over all inputs that were run.

    Attributes:
        name: Name of the value.
        max_abs: Largest absolute difference.
        relative: The same relative to the range of the value.
        tolerance: What `relative` may be; rounding alone.
        ok: Whether it is that.
        note: What is wrong, in words; empty when nothing is.
    """

    name: str
    max_abs: float
    relative: float
    tolerance: float
    ok: bool
    note: str = ""

    @property
    def equal(self) -> bool:
        """Whether not a bit differs."""
        return self.ok and self.max_abs == 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """How far an output moved.

    Attributes:
        name: Name of the output.
        relative: Largest difference relative to the range it had; infinite where its type or shape changed, or NaN
            or infinity is new.
    """

    name: str
    relative: float


class Probe:
    """Runs a model, with the runtime's optimizations off, and returns values from inside of it.

    Attributes:
        model: The model; it must not be changed.
        feeds: What it is run on.
        options: How it is run.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feed], options: RunOptions | None = None) -> None:
        """Nothing is run yet."""
        self.model = model
        self.feeds = list(feeds)
        self.options = options or RunOptions()
        self._known: list[Values] = [dict(feed) for feed in self.feeds]
        self._names = set(self.feeds[0]) if self.feeds else set()

    def values(self, names: Iterable[str]) -> list[Values]:
        """Return values of the main graph, by name, once for each feed.

        Raises:
            RefusedError: If the model does not run.
        """
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if name not in self._names]
        if missing:
            try:
                with open_session(_revealing(self.model, missing), self.options, optimized=False) as session:
                    for known, feed in zip(self._known, self.feeds, strict=True):
                        known.update(session.run(feed))
            except RuntimeFailure as error:
                raise RefusedError("does not run", str(error)) from error
            self._names.update(missing)
        return [{name: known[name] for name in wanted} for known in self._known]


def outputs_of(probe: Probe) -> list[Values]:
    """Return the outputs of the model that a probe runs."""
    return probe.values(v.name or "" for v in probe.model.graph.outputs)


def find_feeds(
    model: ir.Model,
    data: Data | None,
    options: RunOptions,
    *,
    seed: int = 0,
    shape: Mapping[str, int] | None = None,
) -> list[Feed]:
    """Return what a model is run on: samples of the user's, or generated inputs.

    Raises:
        RefusedError: If the model does not run on any.
    """
    if data is not None:
        return list(data.take(FEEDS))
    try:
        with open_session(model, options, optimized=False) as session:
            return feeding.generate_runnable(model, session.run, seed=seed, shape=shape)
    except (RuntimeFailure, DataError) as error:
        raise RefusedError("does not run", str(error)) from error


def run(model: ir.Model, feeds: Sequence[Feed], options: RunOptions) -> list[Values]:
    """Return the outputs of a model for each feed, with the runtime's optimizations off.

    Raises:
        RefusedError: If it does not run.
    """
    try:
        with open_session(model, options, optimized=False) as session:
            return [session.run(feed) for feed in feeds]
    except RuntimeFailure as error:
        raise RefusedError("does not run", str(error)) from error


def matches(
    model: ir.Model, expected: Sequence[Values], found: Sequence[Values], names: Mapping[str, str]
) -> tuple[Match, ...]:
    """Compare values with what they should be.

    Args:
        model: What computes the expected values: its types and depth say what rounding may do.
        expected: Its outputs, for each feed.
        found: What to judge, for each feed.
        names: Output of the model -> name of the value to judge.
    """
    rounding = roundings(model)
    return tuple(
        _match(other, [e[name] for e in expected], [f[other] for f in found], rounding[name])
        for name, other in names.items()
    )


def distance(name: str, before: Sequence[Values], after: Sequence[Values]) -> Change:
    """Return how far a value moved."""
    seen, total = Extent(), Difference("empty")
    for one, other in zip(before, after, strict=True):
        seen |= extent(one[name])
        total |= difference(one[name], other[name])
    return Change(name, math.inf if total.broken else total.max_abs / seen.scale)


def _match(name: str, expected: Sequence[Any], found: Sequence[Any], rounding: Rounding) -> Match:
    seen = Extent()
    for value in expected:
        seen |= extent(value)
    tolerance = rounding.tolerance * seen.amplification
    total = Difference("empty")
    for one, two in zip(expected, found, strict=True):
        total |= difference(one, two, tolerance * seen.scale)
    note = ""
    if total.broken:
        note = f'"{name}" {total.broken}'
    elif total.exceeded:
        note = f'"{name}" differs by up to {total.max_abs:.1e}, which rounding does not explain'
    return Match(name, total.max_abs, total.max_abs / seen.scale, tolerance, not note, note)


def _revealing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy whose outputs are these values of the main graph."""
    copy = copied(model)
    values = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    return copy
