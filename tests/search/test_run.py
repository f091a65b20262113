"""The search with a laboratory that only looks figures up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from onnxopt.allocation.forecast import Goal, Level
from onnxopt.contract import Silent, Site
from onnxopt.errors import RuntimeFailure
from onnxopt.metrics import MetricResult
from onnxopt.search.candidates import KEEP, Proposal
from onnxopt.search.decision import MOST_EFFORT, Limits, Record, Speed
from onnxopt.search.progress import Labelled
from onnxopt.search.run import Entry, Found, Search
from onnxopt.search.state import State
from onnxopt.search.summary import summarize

LIMITS = Limits(None, 0.01)
KEPT = Record(KEEP.name, "", bytes=1000, speed=Speed(0.95, 0.94, 0.96, 1), worst=1e-7)
SITES = [Site("quantize-static", "", f"conv{i}") for i in range(16)]


@dataclasses.dataclass
class Figures:
    """What a made-up candidate is like; its layers cost so much each, unless spared."""

    ratio: float
    layers: tuple[float, ...] = (0.001,)
    failure: str = ""
    noise: tuple[float, ...] = (0.1, 0.01, 0.01, 0.01)
    """Half the width of the interval relative to the ratio, by effort."""


class Desk:
    """A laboratory without instruments."""

    def __init__(self, figures: dict[str, Figures], interrupt_at: int = 10**9, levels: tuple[Level, ...] = ()) -> None:
        self.figures, self.calls, self.interrupt_at = figures, [], interrupt_at  # type: ignore[var-annotated]
        self.expected = levels

    def _call(self, what: str) -> None:
        if len(self.calls) >= self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(what)

    def _drop(self, proposal: Proposal, spared: Mapping[Site, str]) -> float:
        layers = self.figures[proposal.name].layers
        return sum(cost for cost, site in zip(layers, SITES, strict=False) if site not in spared)

    def examine(self, proposal: Proposal, spared: Mapping[Site, str]) -> Record:
        self._call(f"examine {proposal.name}")
        figures = self.figures[proposal.name]
        if figures.failure:
            return Record(proposal.name, proposal.spec, failure=figures.failure)
        ratio = figures.ratio
        record = self._judged(proposal, spared)
        return dataclasses.replace(record, speed=self._speed(proposal, ratio, 0))

    def judge(self, proposal: Proposal, spared: Mapping[Site, str]) -> Record:
        self._call(f"judge {proposal.name} without {len(spared)}")
        return self._judged(proposal, spared)

    def _judged(self, proposal: Proposal, spared: Mapping[Site, str]) -> Record:
        drop = self._drop(proposal, spared)
        metric = MetricResult("top1", 1, 1 - drop, drop, drop, drop * 1.1, 500, True)
        return Record(proposal.name, proposal.spec, bytes=300, worst=0.1, metric=metric, moved=drop)

    def measure(self, proposal: Proposal, spared: Mapping[Site, str], effort: int) -> Speed:
        self._call(f"measure {proposal.name}" + (f" with effort {effort}" if effort > 1 else ""))
        return self._speed(proposal, self.figures[proposal.name].ratio + 0.02 * len(spared), effort)

    def _speed(self, proposal: Proposal, ratio: float, effort: int) -> Speed:
        noise = self.figures[proposal.name].noise[effort]
        return Speed(ratio, (1 - noise) * ratio, (1 + noise) * ratio, effort)

    def layers(self, proposal: Proposal) -> list[Site]:
        return SITES[: len(self.figures[proposal.name].layers)]

    def distance(self, proposal: Proposal, spared: Mapping[Site, str]) -> float:
        self._call(f"distance {proposal.name}")
        return self._drop(proposal, spared)

    def forecast(self) -> tuple[Level, ...]:
        self._call("forecast")
        if not self.expected:
            raise RuntimeFailure("The model does not run on sample 3.")
        return self.expected


def proposals(desk: Desk) -> list[Proposal]:
    plain = [name for name in desk.figures if not name.startswith("pruned")]
    return [KEEP, *(Proposal(name, f"pass-{name}") for name in plain)]


def search(desk: Desk, state: State | None = None, limits: Limits = LIMITS, goal: Goal | None = None) -> Found:
    running = Search(desk, limits, "latency", state or State(None, ""), Labelled(Silent()), goal)
    return running.run(proposals(desk), KEPT)


def report(found: Found) -> Any:
    return summarize(
        found, LIMITS, "latency", metric="top1", metric_reason="", samples=500, calibration_samples=100, real=True
    )


def statuses(found: Found) -> dict[str, str]:
    return {c.name: c.status for c in report(found).candidates}


def test_the_fastest_within_the_budget_wins_and_only_contenders_are_measured_precisely() -> None:
    desk = Desk({"fast": Figures(0.4), "near": Figures(0.42), "slow": Figures(0.8)})
    found = search(desk)
    assert found.winner.record.name == "fast"
    assert [c for c in desk.calls if c.startswith("measure")] == ["measure fast", "measure near"]
    assert statuses(found) == {"fast": "winner", "keep as given": "kept", "near": "kept", "slow": "kept"}


def test_a_candidate_that_fails_is_reported_and_not_fatal() -> None:
    found = search(Desk({"broken": Figures(0.1, failure="Conv failed"), "fine": Figures(0.5)}))
    assert found.winner.record.name == "fine"
    told = next(c for c in report(found).candidates if c.name == "broken")
    assert (told.status, told.reason) == ("failed", "Conv failed")


def test_when_everything_misses_the_budget_the_model_is_kept() -> None:
    found = search(Desk({"a": Figures(0.4, (0.5,)), "b": Figures(0.3, (0.2,))}))
    assert found.winner.record.name == "keep as given"
    first = report(found).candidates[0]
    assert (first.name, first.status) == ("keep as given", "winner")
    assert first.reason == "no lossy candidate that is not slower is within the budget"
    assert statuses(found)["a"] == statuses(found)["b"] == "over budget"


def test_layers_that_cost_most_are_left_in_float() -> None:
    layers = tuple(0.2 if i == 5 else 0.0001 for i in range(16))
    desk = Desk({"static": Figures(0.4, layers), "safe": Figures(0.9, (0.0,))})
    found = search(desk)
    winner = found.winner.record
    assert winner.name == "static, 1 layer in float"
    assert [layer.output for layer in winner.in_float] == ["conv5"]
    assert "it causes 99% of the deviation" in winner.in_float[0].reason
    assert statuses(found)["static"] == "over budget"
    assert found.winner.spared == {SITES[5]: winner.in_float[0].reason}


def test_layers_are_looked_for_only_where_that_could_win() -> None:
    desk = Desk({"over": Figures(0.6, (0.2,) * 16), "good": Figures(0.4)})
    search(desk)
    assert not any(c.startswith("distance") for c in desk.calls)


def test_the_search_for_layers_ends_in_time() -> None:
    desk = Desk({"static": Figures(0.4, tuple(0.01 + 0.0001 * i for i in range(16)))})
    ticks = iter(range(0, 10**6, 30))
    running = Search(desk, LIMITS, "latency", State(None, ""), Labelled(Silent()), clock=lambda: next(ticks))
    assert running.run(proposals(desk), KEPT).winner.record.name == "keep as given"
    assert len([c for c in desk.calls if c.startswith("distance")]) <= 5


def test_where_wide_intervals_would_decide_those_in_question_are_timed_longer() -> None:
    desk = Desk(
        {
            "noisy": Figures(0.62, (0.004,), noise=(0.5, 0.5, 0.5, 0.04)),
            "good": Figures(0.93),
            "slow": Figures(1.0, noise=(0.5, 0.03)),
        }
    )
    found = search(desk)
    assert found.winner.record.name == "noisy"
    longer = ["measure noisy with effort 2", "measure noisy with effort 3"]
    assert [c for c in desk.calls if "effort" in c] == longer, "exactly what the decision stands by, and not for ever"


def confirmed(desk: Desk, ratios: dict[str, list[float]]) -> tuple[Found, list[str]]:
    """Search, and time what is chosen as the figures say."""
    running = Search(desk, LIMITS, "latency", State(None, ""), Labelled(Silent()))
    timed = []

    def time(entry: Entry) -> Speed:
        timed.append(entry.record.name)
        ratio = ratios[entry.record.name].pop()
        return Speed(ratio, 0.99 * ratio, 1.01 * ratio, MOST_EFFORT)

    return running.confirm(running.run(proposals(desk), KEPT), time), timed


def test_a_winner_that_turns_out_slower_gives_way() -> None:
    found, timed = confirmed(Desk({"fast": Figures(0.4), "next": Figures(0.6)}), {"fast": [1.2], "next": [0.61]})
    assert found.winner.record.name == "next"
    assert statuses(found)["fast"] == "slower"
    assert timed == ["fast", "next"]


def test_the_choice_falls_on_one_that_was_timed_anew_and_each_is_once() -> None:
    desk = Desk({"lucky": Figures(0.4), "next": Figures(0.6), "last": Figures(0.8)})
    found, timed = confirmed(desk, {"lucky": [0.65], "next": [0.7]})
    assert (found.winner.record.name, timed) == ("lucky", ["lucky", "next"])
    assert found.winner.record.speed == Speed(0.65, 0.99 * 0.65, 1.01 * 0.65, MOST_EFFORT)


def test_what_keeps_the_model_is_not_timed_anew() -> None:
    found, timed = confirmed(Desk({"a": Figures(0.97)}), {})
    assert (found.winner.record.name, timed) == ("keep as given", [])


@pytest.mark.parametrize("interrupt_at", [1, 2, 3, 6, 10])
def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path, interrupt_at: int) -> None:
    path = tmp_path / "state.json"
    figures = {
        "static": Figures(0.4, tuple(0.2 if i == 5 else 0.0001 for i in range(16))),
        "broken": Figures(0.1, failure="no"),
        "safe": Figures(0.9, (0.0,)),
    }
    whole = Desk(figures)
    expected = search(whole)
    first = Desk(figures, interrupt_at)
    with pytest.raises(KeyboardInterrupt):
        search(first, State(path, "key"))
    second = Desk(figures)
    found = search(second, State(path, "key"))
    assert [e.record for e in found.entries] == [e.record for e in expected.entries]
    assert found.winner.spared == expected.winner.spared
    examined = [c for c in first.calls + second.calls if c.startswith("examine")]
    assert len(examined) == len(set(examined)), "nothing is examined twice"
    third = Desk(figures, 0)
    assert search(third, State(path, "key")).winner.record == expected.winner.record
    assert report(search(third, State(path, "key"))).resumed == 4


def test_another_model_starts_anew(tmp_path: Path) -> None:
    desk = Desk({"fast": Figures(0.4)})
    search(desk, State(tmp_path / "s.json", "one"))
    again = Desk({"fast": Figures(0.4)})
    assert search(again, State(tmp_path / "s.json", "two")).resumed == 0
    assert "examine fast" in again.calls


def test_too_few_samples_are_said() -> None:
    found = search(Desk({"fast": Figures(0.4)}))
    few = summarize(
        found, LIMITS, "latency", metric="top1", metric_reason="", samples=12, calibration_samples=4, real=True
    )
    assert few.notes[0].startswith("Only 12 samples judged: what goes wrong with fewer than 25% of all inputs")
    made = summarize(
        found, Limits(0.1, None), "latency", metric="", metric_reason="", samples=3, calibration_samples=0, real=False
    )
    assert made.notes[0].startswith("Quality was judged by 3 sets of generated inputs")


LEVELS = tuple(Level(left, (1 - left) / 10) for left in (0.8, 0.6, 0.4, 0.2))


def pruned(**drops: float) -> dict[str, Figures]:
    """Return figures of int8 and of what is pruned before it, by what is left in hundredths; it costs so much."""
    before = {
        f"pruned to {left[1:]}% of the time, int8": Figures(0.005 * int(left[1:]), (drop,))
        for left, drop in drops.items()
    }
    return {"int8": Figures(0.5, (0.001,)), **before}


def test_as_much_is_pruned_as_the_budget_allows() -> None:
    desk = Desk(pruned(_40=0.002, _20=0.02), levels=LEVELS)
    found = search(desk, goal="latency")
    assert found.winner.record.name == "pruned to 40% of the time, int8"
    assert found.winner.record.pipeline == "prune-channels{latency=0.4,importance=loss},pass-int8"
    assert statuses(found)["pruned to 20% of the time, int8"] == "over budget"
    assert [call for call in desk.calls if call.startswith("examine pruned")] == [
        "examine pruned to 40% of the time, int8",
        "examine pruned to 20% of the time, int8",
    ]


def test_when_too_much_was_pruned_less_is_tried() -> None:
    found = search(Desk(pruned(_40=0.02, _60=0.02, _80=0.002), levels=LEVELS), goal="latency")
    assert found.winner.record.name == "pruned to 80% of the time, int8"


def test_what_could_not_win_is_named_with_the_reason() -> None:
    figures = pruned() | {"int4": Figures(0.4, (0.02,))}
    levels = tuple(Level(level.left, 10 * level.moved) for level in LEVELS)
    found = search(Desk(figures, levels=levels), goal="latency")
    assert found.winner.record.name == "int8"
    told = {c.name: (c.status, c.reason) for c in report(found).candidates}
    assert told["pruned to 80% of the time, int8"] == (
        "not tried",
        "with 80% left, outputs are expected to move by 20.0%, and int4, which moves them by 2.0%, is over the budget",
    )
    assert told["pruned to 40% of the time"][0] == "not tried"


def test_a_forecast_that_fails_ends_nothing() -> None:
    found = search(Desk(pruned()), goal="latency")
    assert found.winner.record.name == "int8"
    told = {c.name: (c.status, c.reason) for c in report(found).candidates}
    assert told["pruned"] == ("failed", "The model does not run on sample 3")


def test_nothing_is_pruned_unless_it_is_wanted() -> None:
    desk = Desk(pruned(), levels=LEVELS)
    search(desk)
    assert "forecast" not in desk.calls


def test_what_is_proven_is_not_put_at_risk() -> None:
    """The budget holds for int8 alone, and not when the error is shared out among two."""
    figures = pruned(_40=0.002)
    figures["int8"] = Figures(0.5, (0.009,))
    desk = Desk(figures, levels=LEVELS)
    found = search(desk, goal="latency")
    assert found.winner.record.name == "int8"
    told = {c.name: (c.status, c.reason) for c in report(found).candidates}
    assert told["pruned to 80% of the time, int8"] == (
        "not tried",
        "with one more to judge, the samples would not prove any more that int8 is within the budget",
    )


def test_only_a_few_pruned_candidates_are_tried() -> None:
    levels = tuple(Level(1 - left / 100, left / 1000) for left in range(1, 100))
    figures = {f"pruned to {100 - left}% of the time": Figures(1 - left / 100, (0.02,)) for left in range(1, 100)}
    desk = Desk(figures, levels=levels)
    found = search(desk, goal="latency")
    assert found.winner.record.lossless
    assert sum(call.startswith("examine pruned") for call in desk.calls) == 3
