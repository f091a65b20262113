"""The search: every candidate is built, screened and judged; those that may win are timed until one clearly does."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

from onnxopt.allocation.forecast import Goal, Level
from onnxopt.contract import Site
from onnxopt.errors import OnnxOptError
from onnxopt.report.data import FloatLayer, Objective
from onnxopt.report.words import count
from onnxopt.search import decision, sensitivity
from onnxopt.search.candidates import KEEP, PRUNED, Proposal, pruned
from onnxopt.search.decision import Limits, Record, Speed
from onnxopt.search.lab import Lab
from onnxopt.search.progress import Labelled
from onnxopt.search.prospects import prospects
from onnxopt.search.state import State

RANKING_SECONDS = 45.0
"""Time for finding the layers that cost most, for each candidate that is relieved of them."""

RELIEVING_SECONDS = 120.0
"""After this time no other set of layers is judged, all candidates together."""

TRIES = 3
"""So many sets of layers left in floating point are judged for one candidate."""

RELIEVED = 2
"""So many candidates are tried with layers left in floating point, at most."""

PRUNED_TRIES = 3
"""So many pruned candidates are built: each that is judged takes something from what samples prove of the others."""

PRUNING_SECONDS = 600.0
"""After this time no other pruned candidate is begun."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A candidate, how it is built, and what is known about it."""

    proposal: Proposal
    spared: Mapping[Site, str]
    record: Record


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a search ends with.

    Attributes:
        winner: The candidate that was chosen.
        entries: All of them, in the order of trying.
        resumed: How many were known from before.
    """

    winner: Entry
    entries: tuple[Entry, ...]
    resumed: int


class Search:
    """One search. What it knows grows until it is clear what wins."""

    def __init__(
        self,
        lab: Lab,
        limits: Limits,
        objective: Objective,
        state: State,
        progress: Labelled,
        goal: Goal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is run yet.

        Args:
            lab: What candidates are built and judged with.
            limits: The budget.
            objective: What to look for.
            state: What is known from before, and remembers what is found out.
            progress: Told what is being done.
            goal: What pruning is to leave a part of; None where nothing is to be pruned.
            clock: Tells the time in seconds.
        """
        self._lab, self._limits, self._objective, self._goal = lab, limits, objective, goal
        self._state, self._progress, self._clock = state, progress, clock
        self._entries: list[Entry] = []
        self._resumed = 0

    def run(self, proposals: Sequence[Proposal], keep: Record) -> Found:
        """Try candidates and choose.

        Args:
            proposals: What to try.
            keep: What is known about keeping the model as it is.
        """
        self._entries = [Entry(KEEP, {}, keep)]
        wanted = [p for p in proposals if p.passes]
        for number, proposal in enumerate(wanted, 1):
            self._progress.label = f"candidate {number} of {len(wanted)}, {proposal.name}"
            self._entries.append(self._examined(proposal))
        self._settle()
        self._relieve()
        if self._goal is not None:
            self._prune(self._goal)
        return self.choose()

    def choose(self) -> Found:
        """Measure what may win until it is clear what does."""
        self._settle()
        winner = decision.choose(self._records(), self._limits, self._objective)
        return Found(self._entry(winner), tuple(self._entries), self._resumed)

    def confirm(self, found: Found, timed: Callable[[Entry], Speed]) -> Found:
        """Time the winner anew and choose again, until the choice falls on one that was.

        Who wins by a measurement was lucky in it more often than not.

        Args:
            found: What was chosen.
            timed: Times a candidate; called once for each that is chosen.
        """
        done: set[str] = set()
        while not found.winner.record.lossless and found.winner.record.name not in done:
            entry = found.winner
            done.add(entry.record.name)
            self._replace(entry, dataclasses.replace(entry.record, speed=timed(entry)))
            found = self.choose()
        return found

    def _records(self) -> list[Record]:
        return [e.record for e in self._entries]

    def _entry(self, record: Record) -> Entry:
        return next(e for e in self._entries if e.record is record)

    def _replace(self, entry: Entry, record: Record) -> None:
        index = next(i for i, e in enumerate(self._entries) if e is entry)
        self._entries[index] = dataclasses.replace(entry, record=record)
        self._state.remember(record.name, record, entry.spared)

    def _examined(self, proposal: Proposal) -> Entry:
        known = self._state.record(proposal.name)
        if known is not None and known.pipeline == proposal.spec:
            self._resumed += 1
            return Entry(proposal, {}, known)
        record = self._lab.examine(proposal, {})
        self._state.remember(record.name, record, {})
        return Entry(proposal, {}, record)

    def _settle(self) -> None:
        """Time candidates again, one by one, until timing more of them would not help to choose."""
        while True:
            record = decision.next_to_time(self._records(), self._limits, self._objective)
            if record is None:
                return
            entry = self._entry(record)
            self._progress.label = record.name
            effort = 1 if record.speed is None else record.speed.effort + 1
            speed = self._lab.measure(entry.proposal, entry.spared, effort)
            self._replace(entry, dataclasses.replace(record, speed=speed))

    def _relieve(self) -> None:
        """Try candidates over budget with layers left in floating point, the most promising first."""
        end = self._clock() + RELIEVING_SECONDS
        tried: set[str] = set()
        while len(tried) < RELIEVED:
            entry = next((e for e in self._worth_relieving() if e.record.name not in tried), None)
            if entry is None:
                return
            tried.add(entry.record.name)
            relieved = self._relieved(entry, end)
            if relieved is not None:
                self._entries.append(relieved)

    def _prune(self, goal: Goal) -> None:
        """Try pruned candidates where a forecast leaves hope: before the best that is quantized, and alone."""
        end = self._clock() + PRUNING_SECONDS
        self._progress.label = "looking for what can be pruned"
        try:
            levels = self._lab.forecast()
        except OnnxOptError as error:
            self._leave(PRUNED, str(error).rstrip("."), tried=True)
            return
        if not levels:
            self._leave(PRUNED, "no layer can be made much narrower", applies=False)
            return
        best = self._entry(decision.choose(self._records(), self._limits, self._objective))
        quantized = [best] if best.proposal.passes and not best.spared else []
        for base in (*quantized, self._entries[0]):
            self._prune_before(base, levels, goal, end)

    def _prune_before(self, base: Entry, levels: Sequence[Level], goal: Goal, end: float) -> None:
        """Find how much can be pruned before something else is done to a model, by halves of what is left to try."""
        left, begun = list(levels), len(self._entries)
        while left:
            best = decision.choose(self._records(), self._limits, self._objective)
            hopeful, closest, reason = prospects(
                left, base.record, best, self._records(), self._limits, self._objective
            )
            reason = reason or self._hindrance(best, end)
            if reason:
                if len(self._entries) == begun:
                    named = pruned(base.proposal, closest.left, goal, self._objective)
                    self._leave(named, reason, tried=False)
                return
            level = hopeful[len(hopeful) // 2]
            proposal = pruned(base.proposal, level.left, goal, self._objective)
            self._progress.label = proposal.name
            entry = self._examined(proposal)
            self._entries.append(entry)
            place = left.index(level)
            left = left[place + 1 :] if self._fits(entry.record) else left[:place]

    def _hindrance(self, best: Record, end: float) -> str:
        """Return why no further pruned candidate is to be tried; empty where one may be."""
        if sum(bool(e.proposal.first) and e.record.tried for e in self._entries) >= PRUNED_TRIES:
            return f"{count(PRUNED_TRIES, 'pruned candidate')} had been tried before"
        if not decision.withstands(best, self._records(), self._limits):
            return f"with one more to judge, the samples would not prove any more that {best.name} is within the budget"
        return "there was no time left to try it" if self._clock() >= end else ""

    def _leave(self, proposal: Proposal, reason: str, *, tried: bool = True, applies: bool = True) -> None:
        """Say of a candidate why it was not built."""
        record = Record(proposal.name, proposal.spec, failure=reason, applies=applies, tried=tried)
        self._entries.append(Entry(proposal, {}, record))

    def _fits(self, record: Record) -> bool:
        """Return whether a candidate runs, is not slower, and is within the budget."""
        runs = not record.failure and record.speed is not None and not record.slower
        return runs and decision.judged(self._records(), self._limits)[record.name].fit == "within"

    def _worth_relieving(self) -> list[Entry]:
        """Return the candidates over budget that are clearly faster, or smaller, than the best within it."""
        best = decision.choose(self._records(), self._limits, self._objective)
        missed = [e for e in self._entries if self._misses(e.record)]
        if self._objective == "size":
            worth = [e for e in missed if (e.record.bytes or 0) < decision.GAIN * (best.bytes or 0)]
            return sorted(worth, key=lambda e: (e.record.bytes or 0, e.record.name))
        worth = [e for e in missed if _ratio(e.record) < decision.GAIN * _ratio(best)]
        return sorted(worth, key=lambda e: (_ratio(e.record), e.record.name))

    def _misses(self, record: Record) -> bool:
        """Return whether a candidate runs, is not slower, and misses the budget by what it loses."""
        runs = not record.failure and record.speed is not None and not record.slower
        if not runs or record.loss <= 0:
            return False
        return decision.judged(self._records(), self._limits)[record.name].fit != "within"

    def _relieved(self, entry: Entry, end: float) -> Entry | None:
        """Return a candidate with the fewest layers left in floating point that meet the budget."""
        limits = self._limits
        key = f"{entry.record.name} | max_error {limits.max_error} | max_drop {limits.max_drop}"
        known = self._state.record(key)
        if known is not None:
            self._resumed += 1
            return Entry(entry.proposal, self._state.spared(key), known) if known.pipeline else None
        found = self._try_relieving(entry, end)
        if found is None:
            self._state.remember(key, Record(key, ""), {})
            return None
        self._state.remember(key, found.record, found.spared)
        return found

    def _try_relieving(self, entry: Entry, end: float) -> Entry | None:
        proposal = entry.proposal
        layers = self._lab.layers(proposal)
        if len(layers) < 2:
            return None
        ranked = min(end, self._clock() + RANKING_SECONDS)
        self._progress.label = f"looking for the layers that cost {entry.record.name} most"

        def distance(sites: frozenset[Site]) -> float:
            return self._lab.distance(proposal, dict.fromkeys(sites, "left in floating point"))

        groups = sensitivity.rank(layers, distance, in_time=lambda: self._clock() < ranked)
        judged: dict[int, Entry] = {}
        # The first of several tries that fits is more likely to fit by luck, and other candidates may as well.
        tests = TRIES + decision.open_tests(self._records(), self._limits)

        def good(chosen: tuple[sensitivity.Group, ...]) -> bool:
            if self._clock() >= end:
                return False
            spared = _reasons(chosen)
            self._progress.label = f"{entry.record.name} with {count(len(spared), 'layer')} left in floating point"
            record = self._lab.judge(proposal, spared)
            factor = decision.reach(record.metric.name, tests) if record.metric is not None else 1.0
            if record.failure or decision.fit(record, self._limits, factor) != "within":
                return False
            judged[len(chosen)] = Entry(proposal, spared, _named(record, spared))
            return True

        chosen = sensitivity.fewest(groups, good, tries=TRIES)
        return self._measured(judged[len(chosen)]) if chosen else None

    def _measured(self, entry: Entry) -> Entry:
        speed = self._lab.measure(entry.proposal, entry.spared, 1)
        return dataclasses.replace(entry, record=dataclasses.replace(entry.record, speed=speed))


def _ratio(record: Record) -> float:
    return math.inf if record.speed is None else record.speed.ratio


def _reasons(groups: Sequence[sensitivity.Group]) -> dict[Site, str]:
    """Say of each layer why it is left alone."""
    reasons = {}
    for group in groups:
        others = "" if len(group.sites) == 1 else f"together with {count(len(group.sites) - 1, 'neighbour')} "
        for site in group.sites:
            reasons[site] = f"left in floating point: {others}it causes {group.gain:.0%} of the deviation"
    return reasons


def _named(record: Record, spared: Mapping[Site, str]) -> Record:
    layers = tuple(FloatLayer(s.graph, s.output, reason) for s, reason in spared.items())
    name = f"{record.name}, {count(len(layers), 'layer')} in float"
    return dataclasses.replace(record, name=name, in_float=layers)
