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
    MOST_EFFORT,
    SAME_SPEED,
    Limits,
    Record,
    Speed,
    choose,
    eligible,
    fit,
    judged,
    next_to_time,
    open_tests,
    reach,
)
from onnxopt.search.outcome import describe, needed_samples


def metric(drop: float, high: float, samples: int = 100, name: str = "top1") -> MetricResult:
    return MetricResult(name, 1.0, 1.0 - drop, drop, 2 * drop - high, high, samples, False)


def speed(ratio: float, spread: float = 0.01, effort: int = 1) -> Speed:
    return Speed(ratio, ratio - spread, ratio + spread, effort)


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
    assert describe(KEEP, [KEEP, over], LIMITS, "latency").reason.endswith("is within the budget")
    assert outcome(over).status == "over budget"
    assert outcome(over).reason == "top1 drops by 0.1 (95% interval 0 to 0.2), and 0.01 is allowed"


def test_what_the_samples_cannot_prove_does_not_win_and_says_how_many_would() -> None:
    unsure = candidate("unsure", 0.3, 0.0, 0.03)
    assert choose([KEEP, unsure], LIMITS, "latency") is KEEP
    found = outcome(unsure)
    assert found.status == "not proven"
    assert "top1 does not drop, but 100 samples cannot rule out a drop of 0.03" in found.reason
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
        "cannot rule out a drop of 0.0125, and 0.01 is allowed, where several candidates are to be right together"
        in told.reason
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


PLAIN = dataclasses.replace(KEEP, speed=speed(1.0))


def test_a_wide_interval_is_timed_again_before_it_counts_as_a_tie() -> None:
    """A candidate at 1.06x must not win beside one at 1.6x because the interval of that one is wide."""
    good = candidate("good", 0.94)
    fast = candidate("fast", drop=0.004, speed=Speed(0.62, 0.4, 0.97, 1))
    slow = candidate("slow", speed=Speed(0.99, 0.95, 1.03, 1))
    assert next_to_time([PLAIN, good, fast, slow], LIMITS, "latency") is fast
    narrow = dataclasses.replace(fast, speed=Speed(0.63, 0.6, 0.66, 2))
    assert next_to_time([PLAIN, good, narrow, slow], LIMITS, "latency") is None
    assert choose([PLAIN, good, narrow, slow], LIMITS, "latency") is narrow


def test_timing_again_ends_and_then_the_ratio_counts() -> None:
    good = candidate("good", 0.94)
    wide = candidate("wide", drop=0.004, speed=Speed(0.62, 0.4, 0.97, MOST_EFFORT))
    assert next_to_time([PLAIN, good, wide], LIMITS, "latency") is None
    assert choose([PLAIN, good, wide], LIMITS, "latency") is wide
    told = describe(good, [PLAIN, good, wide], LIMITS, "latency").reason
    assert told == "wide measured faster, though their intervals overlap"


def test_what_was_not_shown_to_be_faster_than_the_original_displaces_none_that_was() -> None:
    good = candidate("good", 0.94)
    unsure = candidate("unsure", drop=0.004, speed=Speed(0.62, 0.4, 1.05, MOST_EFFORT))
    assert choose([PLAIN, good, unsure], LIMITS, "latency") is good
    assert choose([PLAIN, unsure], LIMITS, "latency") is PLAIN
    assert (
        describe(unsure, [PLAIN, good, unsure], LIMITS, "latency").reason
        == "how fast it is stayed too uncertain to choose it: 0.62 times as long as the original (95% interval 0.40 to "
        "1.05)"
    )


def test_small_differences_need_no_more_timing() -> None:
    good, fast = candidate("good", 0.51), candidate("fast", 0.5, 0.004)
    assert next_to_time([KEEP, good, fast], LIMITS, "latency") is None
    # A wide interval is left alone where both ways of reading it choose the same.
    best = candidate("best", speed=Speed(0.5, 0.3, 0.8, 1), bytes=100)
    assert next_to_time([KEEP, good, best], LIMITS, "latency") is None
    assert choose([KEEP, good, best], LIMITS, "latency") is best


def test_first_looks_are_followed_by_longer_ones_the_fastest_first() -> None:
    first, second = candidate("first", speed=speed(0.5, 0.05, 0)), candidate("second", speed=speed(0.52, 0.05, 0))
    far = candidate("far", speed=speed(0.8, 0.05, 0))
    assert next_to_time([KEEP, second, first, far], LIMITS, "latency") is first
    assert next_to_time([KEEP, second, candidate("first"), far], LIMITS, "latency") is second
    assert next_to_time([KEEP, candidate("first"), far], LIMITS, "latency") is None


def test_the_smallest_is_timed_again_while_it_seems_slower_and_then_does_not_win() -> None:
    small, other = candidate("small", speed=Speed(1.3, 0.9, 1.8, 1), bytes=100), candidate("other", 0.9)
    assert next_to_time([KEEP, small, other], LIMITS, "size") is small
    small = dataclasses.replace(small, speed=Speed(1.3, 0.9, 1.8, MOST_EFFORT))
    other = dataclasses.replace(other, speed=speed(0.9, effort=MOST_EFFORT))
    assert next_to_time([KEEP, small, other], LIMITS, "size") is None
    assert choose([KEEP, small, other], LIMITS, "size") is other
    told = outcome(small, other, objective="size").reason
    assert told == "it measured slower: 1.30 times as long as the original (95% interval 0.90 to 1.80)"


def test_needed_samples() -> None:
    assert needed_samples(metric(0.0, 0.03, 100), 0.005) == 600
    assert needed_samples(metric(0.002, 0.008, 100), 0.005) == 400
    assert needed_samples(metric(0.005, 0.008, 100), 0.005) is None
    assert needed_samples(metric(0.0, math.inf, 1), 0.005) is None
    assert needed_samples(metric(0.0, 0.06, 100), 1e-308) is None
    assert needed_samples(metric(0.002, 0.008, 100), 0.00275) == 6_500
    assert needed_samples(metric(0.002, 0.008, 100), 0.0025) is None, "nobody has 14,400 where there were 100"
    assert needed_samples(metric(0.002, 0.008, 1000), 0.0025) is None
    assert needed_samples(metric(0.002, 0.008, 1000), 0.0035) == 16_000


def test_a_drop_too_near_the_budget_is_said_in_words() -> None:
    near = candidate("near", 0.3, 0.00999, 0.03)
    told = outcome(near)
    assert told.status == "not proven"
    assert (
        told.reason
        == "top1 drops by 0.01, but 100 samples cannot rule out a drop of 0.03, and 0.01 is allowed; with a "
        "drop so near the budget no reasonable number of samples would show it"
    )


def test_why_the_model_is_kept() -> None:
    def told(*others: Record) -> str:
        return describe(KEEP, [KEEP, *others], LIMITS, "latency").reason

    assert told(candidate("a", 0.895, 0.004)) == "no lossy candidate within the budget is clearly faster"
    unproven, over = candidate("u", 0.3, 0.0, 0.03), candidate("o", 0.3, 0.1, 0.2)
    assert told(unproven, over) == "the samples do not prove of any lossy candidate that it is within the budget"
    assert told(over) == "no lossy candidate that is not slower is within the budget"
    slow = candidate("s", 1.5)
    assert told(over, slow) == "no lossy candidate that is not slower is within the budget"
    assert told(slow, candidate("f", failure="crashed")) == "every lossy candidate is slower or does not run"
    assert told() == "there is no other candidate"


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
        speed=draw(
            st.one_of(
                st.none(), st.just(Speed(ratio, ratio - spread, ratio + spread, draw(st.integers(0, MOST_EFFORT))))
            )
        ),
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
        assert winner.speed.ratio <= max(1.0, 1 + SAME_SPEED) or winner is KEEP
    again = next_to_time([KEEP, *found], limits, objective)
    assert again is None or (again.pipeline and again.speed is not None and again.speed.effort < MOST_EFFORT)
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
