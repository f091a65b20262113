"""The choice: plain values in, plain values out."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxopt.metrics import MetricResult
from onnxopt.report.data import OBJECTIVES, Objective
from onnxopt.search.decision import (
    Limits,
    Record,
    Speed,
    choose,
    describe,
    eligible,
    fit,
    judged,
    needed_samples,
    open_tests,
    reach,
)


def metric(drop: float, high: float, samples: int = 100, name: str = "top1") -> MetricResult:
    return MetricResult(name, 1.0, 1.0 - drop, drop, 2 * drop - high, high, samples, False)


def speed(ratio: float, spread: float = 0.01, *, precise: bool = True) -> Speed:
    return Speed(ratio, ratio - spread, ratio + spread, precise)


KEEP = Record("keep fp32", "", bytes=1000, speed=speed(0.9), worst=1e-7, metric=metric(0.0, 0.03))
LIMITS = Limits(None, 0.01)


def candidate(name: str, ratio: float = 0.5, drop: float = 0.0, high: float = 0.005, **changes: Any) -> Record:
    record = Record(name, f"pass-{name}", bytes=250, speed=speed(ratio), worst=0.02, metric=metric(drop, high))
    return dataclasses.replace(record, **changes)


def outcome(record: Record, *others: Record, limits: Limits = LIMITS, objective: Objective = "latency") -> Any:
    return describe(record, [KEEP, record, *others], limits, objective)


def test_the_fastest_within_the_budget_wins() -> None:
    fast, slow = candidate("fast", 0.4), candidate("slow", 0.6)
    assert choose([KEEP, slow, fast], LIMITS, "latency") is fast
    assert outcome(slow, fast).status == "kept"
    assert outcome(slow, fast).reason == "fast is faster"
    assert outcome(fast, slow).reason == "it is the fastest within the budget"


def test_of_equally_fast_ones_the_better_and_then_the_smaller_wins() -> None:
    good, poor = candidate("good", 0.505, 0.0), candidate("poor", 0.5, 0.004)
    assert choose([KEEP, good, poor], LIMITS, "latency") is good
    assert "costs less quality" in outcome(poor, good).reason
    assert outcome(good, poor).reason == "of those within the budget that are about as fast, it costs least quality"
    alike = candidate("alike", 0.5, 0.0002, bytes=200)
    assert choose([KEEP, good, alike], LIMITS, "latency") is alike, "a fiftieth of the budget makes no difference"
    assert (
        outcome(alike, good).reason
        == "of those within the budget that are about as fast and as good, it is the smallest"
    )


def test_the_smallest_that_is_not_slower_wins() -> None:
    small, fast = candidate("small", 1.0, bytes=100), candidate("fast", 0.3)
    assert choose([KEEP, small, fast], LIMITS, "size") is small
    assert outcome(fast, small, objective="size").reason == "small is smaller"
    slow = candidate("small", 1.2, bytes=100)
    assert choose([KEEP, slow, fast], LIMITS, "size") is fast
    assert outcome(slow, fast, objective="size").status == "slower"
    assert "1.20 times as long" in outcome(slow, fast, objective="size").reason


def test_without_anything_better_the_model_is_kept_and_said_so() -> None:
    over = candidate("over", 0.3, 0.1, 0.2)
    assert choose([KEEP, over], LIMITS, "latency") is KEEP
    assert describe(KEEP, [KEEP, over], LIMITS, "latency").reason.endswith("within the budget is clearly faster")
    assert outcome(over).status == "over budget"
    assert outcome(over).reason == "top1 drops by 0.1 (95% interval 0 to 0.2), and 0.01 is allowed"


def test_what_the_samples_cannot_prove_does_not_win_and_says_how_many_would() -> None:
    unsure = candidate("unsure", 0.3, 0.0, 0.03)
    assert choose([KEEP, unsure], LIMITS, "latency") is KEEP
    found = outcome(unsure)
    assert found.status == "not proven"
    assert "100 samples cannot rule out 0.03" in found.reason
    assert found.reason.endswith("about 300 samples to judge by would show it")


def test_the_error_allowed_is_shared_out_among_tests() -> None:
    assert [round(reach("top1", n), 2) for n in (1, 2, 3, 8)] == [1.0, 1.23, 1.37, 1.69]
    assert [round(reach("cosine", n), 2) for n in (1, 2, 3, 8)] == [1.0, 1.0, 1.09, 1.27]


def test_a_candidate_that_just_fits_alone_does_not_among_others_that_may_not() -> None:
    close = candidate("close", drop=0.004, high=0.0095)
    assert judged([KEEP, close], LIMITS)["close"].fit == "within"
    many = [candidate(f"over{i}", drop=0.02, high=0.03) for i in range(4)]
    verdict = judged([KEEP, close, *many], LIMITS)["close"]
    assert (verdict.fit, round(verdict.reach, 2)) == ("unproven", 1.54)
    assert choose([KEEP, close, *many], LIMITS, "latency") is KEEP
    told = outcome(close, *many)
    assert told.status == "not proven"
    assert (
        "cannot rule out 0.01245, and 0.01 is allowed, where several candidates are to be right together" in told.reason
    )
    assert "about 200 samples" in told.reason
    assert open_tests([KEEP, close, *many], LIMITS) == 5


def test_those_with_room_to_spare_leave_the_rest_their_share() -> None:
    close = candidate("close", drop=0.004, high=0.0095)
    clear = [candidate(f"clear{i}", drop=0.0, high=0.001) for i in range(4)]
    verdicts = judged([KEEP, close, *clear], LIMITS)
    assert {v.fit for v in verdicts.values()} == {"within"}
    assert verdicts["close"].reach == 1.0
    # What was shown to be slower, or did not run, cannot win by a wrong interval.
    slower = [candidate(f"slower{i}", ratio=1.5, drop=0.02, high=0.03) for i in range(4)]
    assert judged([KEEP, close, *slower], LIMITS)["close"].fit == "within"


def test_after_one_that_fails_none_is_within() -> None:
    first = candidate("first", drop=0.0, high=0.0085)
    second = candidate("second", drop=0.0, high=0.0095)
    assert [judged([KEEP, first, second], LIMITS)[n].fit for n in ("first", "second")] == ["unproven", "unproven"]


def test_needed_samples() -> None:
    assert needed_samples(metric(0.0, 0.03, 100), 0.005) == 600
    assert needed_samples(metric(0.002, 0.008, 100), 0.005) == 400
    assert needed_samples(metric(0.005, 0.008, 100), 0.005) is None
    assert needed_samples(metric(0.0, math.inf, 1), 0.005) is None
    assert needed_samples(metric(0.0, 0.06, 100), 1e-308) is None


def test_a_budget_of_error_counts_every_sample_and_inf_is_no_limit() -> None:
    record = candidate("a", metric=None, worst=0.02)
    assert fit(record, Limits(0.02, None)) == "within"
    assert fit(record, Limits(0.019, None)) == "over"
    assert fit(record, Limits(math.inf, None)) == "within"
    assert fit(candidate("a", worst=math.nan), Limits(math.inf, None)) == "over"
    assert "deviates by 2.0e-02 of its range, and 0.01 is allowed" in outcome(record, limits=Limits(0.01, None)).reason


def test_both_budgets_count() -> None:
    assert fit(candidate("a"), Limits(0.02, 0.01)) == "within"
    assert fit(candidate("a"), Limits(0.01, 0.01)) == "over"
    assert fit(candidate("a", drop=0.02, high=0.03), Limits(0.02, 0.01)) == "over"


def test_failures_keep_their_reason() -> None:
    broken = Record("broken", "p", failure="Conv failed")
    found = outcome(broken)
    assert (found.status, found.reason, found.ratio) == ("failed", "Conv failed", None)
    idle = Record("idle", "p", failure="quantize-static finds nothing to do", applies=False)
    found = outcome(idle)
    assert (found.status, found.reason) == ("not applicable", "quantize-static finds nothing to do")


def test_of_equal_speed_and_size_the_better_quality_wins_without_a_limit() -> None:
    better, worse = candidate("b", drop=0.0, high=0.0), candidate("a", drop=0.5, high=0.6)
    for order in ([KEEP, better, worse], [KEEP, worse, better]):
        assert choose(order, Limits(None, None), "latency") is better


numbers = st.one_of(st.floats(0, 0.1), st.sampled_from([0.0, math.nan, math.inf]))


@st.composite
def records(draw: st.DrawFn) -> Record:
    ratio = draw(st.floats(0.1, 3))
    spread = draw(st.floats(0, 0.5)) * ratio
    drop = draw(numbers)
    name = draw(st.sampled_from("abcdefgh"))
    return Record(
        name,
        f"pass-{name}",
        failure=draw(st.sampled_from(["", "", "", "crash"])),
        bytes=draw(st.one_of(st.none(), st.integers(1, 1000))),
        speed=draw(st.one_of(st.none(), st.just(Speed(ratio, ratio - spread, ratio + spread, draw(st.booleans()))))),
        worst=draw(st.one_of(st.none(), numbers)),
        metric=draw(st.one_of(st.none(), st.just(metric(drop, drop + draw(st.floats(0, 0.1)))))),
    )


budgets = st.one_of(st.none(), st.floats(0, 0.1), st.just(math.inf))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other work may share the processor
@given(
    st.lists(records(), max_size=8, unique_by=lambda r: r.name),  # what is known is kept by name
    budgets,
    budgets,
    st.sampled_from(OBJECTIVES),
    st.randoms(),
)
def test_the_winner_is_within_the_budget_not_slower_and_always_the_same(
    found: list[Record], max_error: float | None, max_drop: float | None, objective: Objective, rng: random.Random
) -> None:
    limits = Limits(max_error, max_drop)
    winner = choose([KEEP, *found], limits, objective)
    if winner is not KEEP:
        assert not winner.failure
        assert winner.speed is not None
        assert winner.speed.low <= 1.0
        if max_drop is not None:
            assert winner.metric is not None
            assert winner.metric.high <= max_drop
        if max_error is not None:
            assert winner.worst is not None
            assert winner.worst <= max_error
    best = [r for r in eligible([KEEP, *found], limits) if r.speed is not None]
    if objective == "latency" and winner.speed is not None:
        assert winner.speed.low <= min((r.speed.high for r in best if r.speed), default=math.inf)
    shuffled = [KEEP, *found]
    rng.shuffle(shuffled)
    assert choose(shuffled, limits, objective) == winner
    for record in [KEEP, *found]:
        told = describe(record, [KEEP, *found], limits, objective)
        assert told.reason
        assert (told.status == "winner") == (record is winner)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_keeps_the_model_needs_no_measurement(objective: Objective) -> None:
    bare = Record("keep fp32", "", bytes=10)
    assert choose([bare], LIMITS, objective) is bare
