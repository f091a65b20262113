"""How fast is a model compared with another, and how sure is that?

Both are loaded and timed in turns, in several pairs of sessions, until the confidence interval of the ratio is
narrow enough or the time is spent. Without a difference that stands out from the noise, none is claimed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import feeds as feeding
from onnxopt import model as models
from onnxopt.compare.narrowing import narrowed
from onnxopt.contract import Progress, Silent
from onnxopt.errors import DataError
from onnxopt.feeds import Feed
from onnxopt.runtime import RunOptions, open_session
from onnxopt.session.loaded import Session
from onnxopt.timing import stopwatch
from onnxopt.timing.memory import peak_mb

LOADING_SHARE = 0.3
"""At most this share of the time is spent on loading sessions again and again."""

BLOCK_ROUNDS = 4
"""Rounds that are timed with one pair of sessions, at least, while there is time."""

MIN_ROUNDS = 2
"""Rounds that are timed with one pair of sessions whatever they take."""

MIN_MATCHES = 2
"""Matches, of two pairs of sessions each, before an interval may count as narrow enough."""

Verdict = Literal["faster", "slower", "no difference shown"]
Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """How the times of two models compare.

    Attributes:
        ratio: Time of the candidate by time of the baseline; below 1 the candidate is faster. The median of the
            rounds, each of which compares the fastest runs (`onnxopt.timing.stopwatch` says why).
        low: Lower end of the 95% confidence interval of the ratio.
        high: Upper end.
        verdict: "faster" or "slower" when the interval leaves out 1, else "no difference shown".
        rounds: Rounds that were timed; each times both models twice.
        baseline_ms: Median milliseconds of one run of the baseline.
        candidate_ms: The same of the candidate.
        baseline_load_ms: Milliseconds ONNX Runtime takes to load and optimize the baseline; median of all loads.
        candidate_load_ms: The same of the candidate.
        baseline_peak_mb: Megabytes that loading the baseline and running it once take at most, in a process of its
            own; None where that was not asked for or could not be found out.
        candidate_peak_mb: The same of the candidate.
        threads: Threads within an operator.
        provider: Execution provider.
        placement: Provider -> number of nodes of the candidate that it runs.
        elsewhere: Nodes of the candidate that run on another provider than the chosen one.
        sessions: Pairs of sessions that were timed.
    """

    ratio: float
    low: float
    high: float
    verdict: Verdict
    rounds: int
    baseline_ms: float
    candidate_ms: float
    baseline_load_ms: float
    candidate_load_ms: float
    baseline_peak_mb: float | None
    candidate_peak_mb: float | None
    threads: int
    provider: str
    placement: dict[str, int]
    elsewhere: tuple[str, ...]
    sessions: int

    def sentence(self) -> str:
        """Return the result in words, e.g. "1.23x faster (95% interval 1.20-1.26)"."""
        if self.verdict == "faster":
            return f"{1 / self.ratio:.2f}x faster (95% interval {1 / self.high:.2f}-{1 / self.low:.2f})"
        if self.verdict == "slower":
            return f"{self.ratio:.2f}x slower (95% interval {self.low:.2f}-{self.high:.2f})"
        return f"no difference shown ({self.low:.2f}-{self.high:.2f})"


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """How long one model takes.

    Attributes:
        median_ms: Median milliseconds of one run.
        p10_ms: One run in ten is faster.
        p90_ms: One run in ten is slower.
        per_second: Runs per second, one after the other.
        runs: Runs that were timed.
        load_ms: Milliseconds ONNX Runtime takes to load and optimize the model.
        peak_mb: Megabytes that loading it and running it once take at most, in a process of its own; None where
            that could not be found out.
        threads: Threads within an operator.
        provider: Execution provider.
        placement: Provider -> number of nodes that it runs.
        elsewhere: Nodes that run on another provider than the chosen one.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    per_second: float
    runs: int
    load_ms: float
    peak_mb: float | None
    threads: int
    provider: str
    placement: dict[str, int]
    elsewhere: tuple[str, ...]

    def sentence(self) -> str:
        """Return the result in words, e.g. "4.03 ms (10% below 3.98, 10% above 4.21), 248 runs per second"."""
        return (
            f"{self.median_ms:.3g} ms (10% below {self.p10_ms:.3g}, 10% above {self.p90_ms:.3g}), "
            f"{self.per_second:.3g} runs per second"
        )


def measure(
    baseline: Source,
    candidate: Source,
    *,
    feed: Feed | None = None,
    options: RunOptions | None = None,
    budget_seconds: float = 10.0,
    precision: float = 0.02,
    seed: int = 0,
    shape: Mapping[str, int] | None = None,
    memory: bool = True,
    progress: Progress | None = None,
) -> Measurement:
    """Time a candidate against a baseline, with the runtime's own optimizations on.

    Args:
        baseline: The model to compare with: a path, an ONNX proto or an `onnx_ir` model.
        candidate: The model to judge.
        feed: What both are run on; generated by default.
        options: Provider, threads and custom operators to run with.
        budget_seconds: Time to spend on loading and timing. A few rounds are timed whatever they take.
        precision: Stop when the confidence interval is at most this wide, relative to the ratio.
        seed: Seeds the generated feed and the bootstrap.
        shape: Sizes of dynamic axes for the generated feed.
        memory: Also find out how much memory each takes, which takes about a second each on top of the budget.
        progress: Told what is being done.

    Returns:
        The ratio of the times with its interval, and the time, the load time and the memory of both.

    Raises:
        ModelError: If a model cannot be read.
        RuntimeFailure: If a model cannot be loaded or run, or would run on another provider.
        DataError: If no feed can be generated, or the models need different inputs.
    """
    options, progress = options or RunOptions(), progress or Silent()
    before, after = models.load(baseline), models.load(candidate)
    _require_same_inputs(before, after, _called(baseline, "the baseline"), _called(candidate, "the candidate"))
    if feed is None:
        feed = _generated(narrowed(before, after).reference, options, seed, shape)
    duel = _Duel(before, after, feed, options, seed)
    duel.run(budget_seconds, precision, progress)
    if not memory:
        return duel.result(None, None)
    progress.stage("measuring memory")
    return duel.result(
        peak_mb(_file_or(baseline, before), feed, options),
        peak_mb(_file_or(candidate, after), feed, options),
    )


def _called(source: Source, role: str) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else role


def _require_same_inputs(before: ir.Model, after: ir.Model, baseline: str, candidate: str) -> None:
    """Raise when one model needs an input that the other lacks: there is nothing to run both on."""
    for one, other, needs, lacks in ((before, after, baseline, candidate), (after, before, candidate, baseline)):
        known = {v.name for v in other.graph.inputs}
        missing = [f'"{v.name}"' for v in one.graph.inputs if v.name not in known and not v.is_initializer()]
        if missing:
            inputs = f"input{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            raise DataError(f"{needs} needs the {inputs}, which {lacks} lacks; compare models with the same inputs.")


def bench(
    model: Source,
    *,
    feed: Feed | None = None,
    options: RunOptions | None = None,
    budget_seconds: float = 5.0,
    seed: int = 0,
    shape: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Latency:
    """Time one model by itself, with the runtime's own optimizations on.

    Args:
        model: A path, an ONNX proto or an `onnx_ir` model.
        feed: What it is run on; generated by default.
        options: Provider, threads and custom operators to run with.
        budget_seconds: Time to spend on timing; it is run ten times at least.
        seed: Seeds the generated feed.
        shape: Sizes of dynamic axes for the generated feed.
        progress: Told what is being done.

    Raises:
        ModelError: If the model cannot be read.
        RuntimeFailure: If it cannot be loaded or run, or would run on another provider.
        DataError: If no feed can be generated.
    """
    options, progress = options or RunOptions(), progress or Silent()
    loaded = models.load(model)
    if feed is None:
        feed = _generated(loaded, options, seed, shape)
    progress.stage("measuring")
    with open_session(loaded, options, optimized=True) as session:
        bound = session.bind(feed)
        times = np.array(stopwatch.series(bound.run, budget_seconds)) * 1e3
        placement, elsewhere = _placement(session)
        load_ms = session.load_seconds * 1e3
    p10, median, p90 = np.quantile(times, [0.1, 0.5, 0.9])
    return Latency(
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        per_second=1e3 / float(times.mean()),
        runs=len(times),
        load_ms=load_ms,
        peak_mb=peak_mb(_file_or(model, loaded), feed, options),
        threads=options.threads,
        provider=options.provider,
        placement=placement,
        elsewhere=elsewhere,
    )


@dataclasses.dataclass(slots=True)
class _Side:
    """One of two models and what is known about running it."""

    model: ir.Model
    loads: list[float] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def opened(self, feed: Feed, options: RunOptions) -> Iterator[tuple[Session, stopwatch.Run, int]]:
        """Give a session, what runs the feed in it, and how often that is to be run for one timing."""
        with open_session(self.model, options, optimized=True) as session:
            self.loads.append(session.load_seconds)
            run = session.bind(feed).run
            yield session, run, stopwatch.repetitions(run)


class _Duel:
    """Two models, timed in turns."""

    def __init__(self, baseline: ir.Model, candidate: ir.Model, feed: Feed, options: RunOptions, seed: int) -> None:
        self._baseline, self._candidate = _Side(baseline), _Side(candidate)
        self._feed, self._options, self._seed = feed, options, seed
        self._rounds: list[stopwatch.Round] = []
        self._matches: list[list[float]] = []
        self._placement: tuple[dict[str, int], tuple[str, ...]] = ({}, ())

    def run(self, budget_seconds: float, precision: float, progress: Progress) -> None:
        """Time pairs of sessions until the interval is narrow enough or the time is spent."""
        end = time.perf_counter() + budget_seconds
        progress.stage("measuring")
        while True:
            start = time.perf_counter()
            first = self._block((start + end) / 2, candidate_first=False)
            second = self._block(end, candidate_first=True)
            self._rounds += first + second
            self._matches.append(stopwatch.match(first, second))
            progress.advance()
            now = time.perf_counter()
            narrow = len(self._matches) >= MIN_MATCHES and self._interval().width <= precision
            if narrow or now + (now - start) > end:
                return

    def _block(self, end: float, *, candidate_first: bool) -> list[stopwatch.Round]:
        """Load both models and time some rounds; one of them comes first in everything."""
        start = time.perf_counter()
        sides = [self._baseline, self._candidate]
        if candidate_first:
            sides.reverse()
        with (
            sides[0].opened(self._feed, self._options) as (first_session, first, first_count),
            sides[1].opened(self._feed, self._options) as (second_session, second, second_count),
        ):
            if not self._rounds:
                self._placement = _placement(first_session if candidate_first else second_session)
            loaded = time.perf_counter()
            # so that loading takes up its share of the block at most
            worth = min(end, loaded + (loaded - start) * (1 - LOADING_SHARE) / LOADING_SHARE)
            counts = stopwatch.leveled(first_count, second_count)
            found: list[stopwatch.Round] = []
            for one in stopwatch.rounds(first, second, *counts):
                found.append(one.swapped if candidate_first else one)
                now = time.perf_counter()
                if now >= (worth if len(found) >= BLOCK_ROUNDS else end) and len(found) >= MIN_ROUNDS:
                    break
            return found

    def _interval(self) -> stopwatch.Interval:
        return stopwatch.interval(self._matches, self._seed)

    def result(self, baseline_peak_mb: float | None, candidate_peak_mb: float | None) -> Measurement:
        """Return what was found."""
        found = self._interval()
        return Measurement(
            ratio=found.ratio,
            low=found.low,
            high=found.high,
            verdict=_verdict(found),
            rounds=len(self._rounds),
            baseline_ms=1e3 * statistics.median(t for r in self._rounds for t in r.a),
            candidate_ms=1e3 * statistics.median(t for r in self._rounds for t in r.b),
            baseline_load_ms=1e3 * statistics.median(self._baseline.loads),
            candidate_load_ms=1e3 * statistics.median(self._candidate.loads),
            baseline_peak_mb=baseline_peak_mb,
            candidate_peak_mb=candidate_peak_mb,
            threads=self._options.threads,
            provider=self._options.provider,
            placement=self._placement[0],
            elsewhere=self._placement[1],
            sessions=2 * len(self._matches),
        )


def _generated(model: ir.Model, options: RunOptions, seed: int, shape: Mapping[str, int] | None) -> Feed:
    with open_session(model, options, optimized=True) as session:
        return feeding.generate_runnable(model, session.run, seed=seed, sets=1, shape=shape)[0]


def _file_or(source: Source, loaded: ir.Model) -> Path | ir.Model:
    """Return the file a model came from, or the model."""
    return Path(source) if isinstance(source, (str, os.PathLike)) else loaded


def _verdict(found: stopwatch.Interval) -> Verdict:
    if found.high < 1.0:
        return "faster"
    return "slower" if found.low > 1.0 else "no difference shown"


def _placement(session: Session) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return how many nodes each provider runs, and the nodes that not the chosen one runs."""
    placed = session.placement()
    counts = {provider: len(nodes) for provider, nodes in placed.items()}
    elsewhere = [node for provider, nodes in placed.items() if provider != session.provider for node in nodes]
    return counts, tuple(elsewhere)
