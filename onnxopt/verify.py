"""Does a model compute what another computes? Structure first, then the outputs of both in ONNX Runtime.

Exact results are compared with the runtime's own optimizations off on both sides, so that only the edits differ,
against a tolerance derived from types and depth (`onnxopt.compare.tolerance`) that is never below what the
original itself differs by between optimizations off and on. Lossy results are compared as they will run.
Deviations are given relative to the range of the reference output, over all feeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Generator, Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import feeds as feeding
from onnxopt import model as models
from onnxopt.compare import structure, ties
from onnxopt.compare.deviation import difference, differing, extent, nbytes
from onnxopt.compare.narrowing import narrowed
from onnxopt.compare.tally import Tally
from onnxopt.compare.tolerance import Rounding, roundings
from onnxopt.compare.verdict import Verification, refused, sizes
from onnxopt.compare.yardstick import Original, Outputs, Ruler, make_ruler
from onnxopt.contract import Guarantee
from onnxopt.errors import DataError, OnnxOptError, RuntimeFailure, UsageError
from onnxopt.feeds import Data, Feed
from onnxopt.runtime import RunOptions, open_session

EXACT_FEEDS = 8
"""An exact comparison needs no more feeds than this; the rest is not run."""

LOSSY_FEEDS = 64
"""A lossy comparison runs at most this many feeds."""

FEED_BYTES = 256 << 20
"""No more feeds are held in memory than this, or one."""

CACHE_BYTES = 512 << 20
"""Reference outputs are kept up to this size and computed again beyond it."""

_OPTIMIZED = "with the runtime's optimizations on"
_UNSTABLE = "differs between two runs of the original"

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


def verify(
    reference: Source,
    candidate: Source,
    *,
    feeds: Sequence[Feed] | Data | None = None,
    guarantee: Guarantee | None = None,
    options: RunOptions | None = None,
    seed: int = 0,
    shape: Mapping[str, int] | None = None,
    max_error: float | None = None,
) -> Verification:
    """Verify one model against another.

    Axes of inputs that only one of them leaves open are fixed as the other has them, which a note then says.

    Args:
        reference: The model as it should be: a path, an ONNX proto or an `onnx_ir` model.
        candidate: The model to judge.
        feeds: Inputs to run both on; generated from the reference's inputs by default.
        guarantee: How to judge. By default exact, and approximate when `max_error` is given.
        options: Provider, threads and custom operators to run with.
        seed: Seeds generated inputs.
        shape: Sizes of dynamic axes for generated inputs.
        max_error: Largest allowed deviation relative to the range of the output; `inf` for any.

    Returns:
        The verdict, with the deviation of every output.

    Raises:
        ModelError: If a model cannot be read.
        DataError: If the feeds do not fit the reference.
        RuntimeFailure: If the reference itself cannot be run.
        UsageError: If `max_error` is given for an exact comparison.
    """
    if guarantee is None:
        guarantee = Guarantee.EXACT if max_error is None else Guarantee.APPROXIMATE
    if guarantee is not Guarantee.APPROXIMATE and max_error is not None:
        raise UsageError("max_error applies to lossy results alone: leave it out, or judge as approximate.")
    pair = narrowed(models.load(reference), models.load(candidate))
    original = pair.reference
    if feeds is None:
        with open_session(original, options, optimized=True) as session:
            feeds = feeding.generate_runnable(original, session.run, seed=seed, shape=shape)
    found = Verifier(original, feeds, options).check(pair.candidate, guarantee, max_error)
    return dataclasses.replace(found, notes=(pair.note, *found.notes)) if pair.note else found


class Verifier:
    """Judges candidates against one reference, whose outputs it computes once and keeps.

    Nothing is run before the first `check`. The reference must not be changed afterwards.
    """

    def __init__(
        self,
        reference: ir.Model,
        feeds: Sequence[Feed] | Data,
        options: RunOptions | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Prepare to judge.

        Args:
            reference: The model as it should be.
            feeds: Inputs to run both on. Those that the reference cannot run are left out, and noted.
            options: Provider, threads and custom operators to run with.
            cache_bytes: Reference outputs up to this size are kept in memory, for each way of running.

        Raises:
            DataError: If there are no feeds.
        """
        self._reference = reference
        self._options = options or RunOptions()
        self._feeds = _first(feeds)
        if not self._feeds:
            raise DataError("There are no inputs to verify with: give at least one sample.")
        self._cache_bytes = cache_bytes
        self._originals: dict[tuple[RunOptions, bool, int], Original | RuntimeFailure] = {}
        self._rulers: dict[tuple[RunOptions, bool], Ruler] = {}
        self._rankings: dict[str, ties.Ranking | None] = {}
        self._level: structure.Level | None = None
        self._rounding: dict[str, Rounding] | None = None

    def check(
        self, candidate: ir.Model, guarantee: Guarantee = Guarantee.EXACT, max_error: float | None = None
    ) -> Verification:
        """Judge a candidate.

        Args:
            candidate: The model to judge; it is not changed.
            guarantee: EXACT allows rounding alone; APPROXIMATE judges by `max_error`; REDEFINES asks only that the
                candidate is well formed and runs.
            max_error: For APPROXIMATE: largest allowed deviation relative to the range of the output. None allows
                any; new NaN and infinities, and other shapes and types, are never allowed.

        Raises:
            RuntimeFailure: If the reference itself cannot be run.
        """
        complaint = self._complaint(candidate, guarantee)
        if complaint:
            return refused(complaint, "exact" if guarantee is Guarantee.EXACT else "as run")
        if guarantee is Guarantee.REDEFINES:
            return self._runs(candidate)
        if guarantee is Guarantee.APPROXIMATE:
            return self._lossy(candidate, math.inf if max_error is None else max_error)
        return self._exact(candidate)

    def _complaint(self, candidate: ir.Model, guarantee: Guarantee) -> str:
        """Return what is wrong with the structure; the checker is as strict as the reference survives."""
        if guarantee is not Guarantee.REDEFINES:
            change = structure.signature_change(self._reference, candidate)
            if change:
                return change
        if self._level is None:
            self._level = structure.checker_level(self._reference)
        complaint = structure.checker_complaint(candidate, self._level)
        return f"the ONNX checker rejects the model: {complaint}" if complaint else ""

    def _runs(self, candidate: ir.Model) -> Verification:
        """Ask only that the candidate runs, with optimizations off and on."""
        feeds = self._feeds[:EXACT_FEEDS]
        if not structure.same_inputs(self._reference, candidate):
            feeds = []
        try:
            for optimized in (True, False):
                with open_session(candidate, self._options, optimized=optimized) as session:
                    feeds = feeds or feeding.generate_runnable(candidate, session.run)
                    for feed in feeds:
                        session.run(feed)
        except (RuntimeFailure, DataError) as failure:
            return refused(_clause(failure), "as run")
        return Verification(True, "", "as run", (), len(feeds), 0.0, sizes(candidate, feeds))

    def _lossy(self, candidate: ir.Model, max_error: float) -> Verification:
        """Compare with optimizations on; integers that are no index count by their distance."""
        original = self._original(self._options, True, LOSSY_FEEDS)
        if isinstance(original, RuntimeFailure):
            raise original
        tallies = self._tallies(original, dict.fromkeys(original.names, max_error), max_error)
        try:
            for _, reference, outputs in _pairs(original, candidate):
                for name, tally in tallies.items():
                    if name in original.unstable:
                        tally.add_layout(reference[name], outputs[name], _UNSTABLE)
                    else:
                        tally.add(difference(reference[name], outputs[name], tally.allowed))
        except RuntimeFailure as failure:
            return refused(_clause(failure), "as run")
        return self._verdict(tallies, original)

    def _exact(self, candidate: ir.Model) -> Verification:
        """Compare in the first setting that both models run in."""
        refusal: Verification | None = None
        failed: RuntimeFailure | None = None
        for options, optimized in self._settings():
            original = self._original(options, optimized, EXACT_FEEDS)
            if isinstance(original, RuntimeFailure):
                failed = original
                continue
            try:
                return self._exact_in(candidate, original)
            except RuntimeFailure as failure:
                refusal = refusal or refused(_clause(failure), original.mode)
                if options == self._options:
                    break
        if refusal is None:
            assert failed is not None, "there is at least one setting"
            raise failed
        return refusal

    def _settings(self) -> list[tuple[RunOptions, bool]]:
        """How an exact comparison may be run, best first.

        The CPU provider computes in full precision, which GPUs do not by default; but a model can hold operators
        that only the chosen provider has, or that only the runtime's own optimizations make runnable.
        """
        on_cpu = dataclasses.replace(self._options, provider="cpu")
        return list(dict.fromkeys([(on_cpu, False), (self._options, False), (self._options, True)]))

    def _exact_in(self, candidate: ir.Model, original: Original) -> Verification:
        ruler = self._ruler(original)
        tallies = self._tallies(original, ruler.tolerance, 0.0)
        for number, reference, outputs in _pairs(original, candidate):
            for tally in tallies.values():
                self._exact_output(tally, ruler, original, number, reference, outputs)
        verdict = self._verdict(tallies, original)
        if not verdict.ok or original.optimized:
            return verdict
        return self._as_it_will_run(candidate, verdict, ruler)

    def _as_it_will_run(self, candidate: ir.Model, verdict: Verification, ruler: Ruler) -> Verification:
        """Run an exact result once with optimizations on, on the chosen provider, and see that it is sane."""
        original = self._original(self._options, True, EXACT_FEEDS)
        if isinstance(original, RuntimeFailure):
            note = f"the original does not run {_OPTIMIZED}, so neither was the result: {original}"
            return dataclasses.replace(verdict, notes=(*verdict.notes, note))
        tallies = self._tallies(original, ruler.loose, 0.0)
        try:
            with contextlib.closing(_pairs(original, candidate)) as pairs:
                number, reference, outputs = next(pairs)
        except RuntimeFailure as failure:
            return refused(f"{_OPTIMIZED} it does not run: {_clause(failure)}", "as run")
        for tally in tallies.values():
            self._exact_output(tally, ruler, original, number, reference, outputs)
            if not tally.ok:
                reason, worst = f"{_OPTIMIZED}, {tally.reason}", max(verdict.worst, tally.relative)
                return dataclasses.replace(verdict, ok=False, reason=reason, worst=worst)
        return verdict

    def _exact_output(
        self,
        tally: Tally,
        ruler: Ruler,
        original: Original,
        number: int,
        reference: Outputs,
        outputs: Outputs,
    ) -> None:
        """Compare one output of one feed; discrete elements may differ only where there is an excuse."""
        one, two = reference[tally.name], outputs[tally.name]
        incomparable = ruler.incomparable.get(tally.name)
        if incomparable is not None:
            tally.add_layout(one, two, incomparable.reason, same_shape=incomparable.same_shape)
            return
        found = difference(one, two, tally.allowed)
        excuse = ""
        if found.exceeded and not found.broken and found.kind != "float" and isinstance(one, np.ndarray):
            excuse = self._excuse(tally.name, ruler, original, number, one, two)
        tally.add(found, excuse)

    def _excuse(
        self,
        name: str,
        ruler: Ruler,
        original: Original,
        number: int,
        reference: np.ndarray,
        output: np.ndarray,
    ) -> str:
        """Return why discrete elements that are not equal are no fault, or an empty string."""
        where = differing(reference, output)
        flips = ruler.flips.get((name, number))
        if flips is not None and flips.cover(where):
            return "differs only where the original does between optimizations off and on"
        ranking = self._ranking(name)
        if ranking is not None:
            scores = self._scores(ranking, original, number)
            seen = extent(scores)
            allowed = 2 * self._roundings()[name].tolerance * seen.amplification * seen.scale
            tie = ties.all_tie(scores, ranking, reference, output, allowed)
            return "differs only where the ranked values tie" if tie else ""
        found = difference(reference, output)
        if flips is not None and found.kind == "integer" and flips.outweigh(where, found.max_abs):
            return "differs by no more than the original does between optimizations off and on"
        return ""

    def _scores(self, ranking: ties.Ranking, original: Original, number: int) -> np.ndarray:
        """Return the values that an index output ranks; runs the reference once more for them."""
        feed = self._feeds[number]
        if ranking.scores in feed:
            return np.asarray(feed[ranking.scores])
        telling = ties.with_scores(self._reference, ranking)
        with open_session(telling, original.options, optimized=original.optimized) as session:
            return np.asarray(session.run(feed)[ranking.scores])

    def _original(self, options: RunOptions, optimized: bool, feeds: int) -> Original | RuntimeFailure:
        """Return the reference's outputs in one setting, or why it does not run in it."""
        feeds = min(feeds, len(self._feeds))
        key = (options, optimized, feeds)
        if key not in self._originals:
            try:
                self._originals[key] = Original(
                    self._reference,
                    self._feeds[:feeds],
                    options,
                    optimized=optimized,
                    cache_bytes=self._cache_bytes,
                )
            except RuntimeFailure as failure:
                self._originals[key] = failure
        return self._originals[key]

    def _ruler(self, original: Original) -> Ruler:
        """Return what exact results are measured by in this setting."""
        key = (original.options, original.optimized)
        if key not in self._rulers:
            optimized = self._original(original.options, True, EXACT_FEEDS)
            target = self._original(self._options, True, EXACT_FEEDS)
            self._rulers[key] = make_ruler(
                self._roundings(),
                original,
                None if isinstance(optimized, RuntimeFailure) else optimized,
                None if isinstance(target, RuntimeFailure) else target,
            )
        return self._rulers[key]

    def _roundings(self) -> dict[str, Rounding]:
        if self._rounding is None:
            self._rounding = roundings(self._reference)
        return self._rounding

    def _ranking(self, name: str) -> ties.Ranking | None:
        if name not in self._rankings:
            self._rankings[name] = ties.ranking(self._reference, name)
        return self._rankings[name]

    def _tallies(self, original: Original, tolerances: Mapping[str, float], discrete: float) -> dict[str, Tally]:
        return {
            name: Tally(
                name,
                extent=original.extents[name],
                tolerance=tolerances[name],
                discrete_tolerance=discrete,
                is_index=self._ranking(name) is not None,
            )
            for name in original.names
        }

    def _verdict(self, tallies: Mapping[str, Tally], original: Original) -> Verification:
        outputs = tuple(tally.deviation for tally in tallies.values())
        reason = next((tally.reason for tally in tallies.values() if not tally.ok), "")
        return Verification(
            ok=not reason,
            reason=reason,
            mode=original.mode,
            outputs=outputs,
            feeds=len(original.numbers),
            worst=max((o.relative for o in outputs), default=0.0),
            shapes=sizes(self._reference, original.feeds),
            notes=original.notes,
        )


def _first(feeds: Iterable[Feed]) -> list[Feed]:
    """Return as many feeds as are needed and fit into memory."""
    found: list[Feed] = []
    room = FEED_BYTES
    for feed in itertools.islice(feeds, LOSSY_FEEDS):
        room -= sum(nbytes(value) for value in feed.values())
        if found and room < 0:
            break
        found.append(feed)
    return found


def _pairs(original: Original, candidate: ir.Model) -> Generator[tuple[int, Outputs, Outputs]]:
    """Yield the number of each feed, the reference's outputs and the candidate's.

    Raises:
        RuntimeFailure: If the candidate cannot be loaded or run.
    """
    with open_session(candidate, original.options, optimized=original.optimized) as session:
        for number, feed, reference in zip(original.numbers, original.feeds, original, strict=True):
            yield number, reference, session.run(feed)


def _clause(failure: OnnxOptError) -> str:
    """Turn the sentence of an error into a clause that others can follow."""
    return str(failure).rstrip(".")
