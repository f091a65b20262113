"""The statistics of timing, on made-up clocks: no assertion here depends on how fast this machine is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from onnxopt.timing import stopwatch
from onnxopt.timing.stopwatch import Round, Run, interval, one_round, repetitions, rounds, series, timing


class Time:
    """A clock that only moves when something runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, seconds: Callable[[float], float]) -> Run:
        def run() -> None:
            self.ran.append(name)
            self.now += seconds(self.now)

        return run


def constantly(seconds: float) -> Callable[[float], float]:
    return lambda _: seconds


def test_short_runs_are_repeated_until_a_timing_lasts_long_enough() -> None:
    clock = Time()
    assert repetitions(clock.runner("a", constantly(0.001)), clock) == 10
    assert repetitions(clock.runner("a", constantly(0.0000625)), clock) == 160
    assert repetitions(clock.runner("a", constantly(0.008)), clock) == stopwatch.FEWEST_RUNS
    assert repetitions(clock.runner("a", constantly(3.0)), clock) == 1


def test_alike_sides_run_equally_often() -> None:
    assert stopwatch.leveled(3, 12) == stopwatch.leveled(12, 3) == (12, 12)
    assert stopwatch.leveled(3, 13) == (3, 13)


def test_the_first_run_of_all_is_not_timed() -> None:
    clock = Time()
    times = iter([64.0, *[2.0**-9] * 100])
    assert repetitions(clock.runner("a", lambda _: next(times)), clock) == 6


def test_a_hiccup_does_not_count() -> None:
    clock = Time()
    times = iter([1.0, 1.0, 90.0, 1.0, 1.0, 80.0])
    found = one_round(clock.runner("a", lambda _: next(times)), clock.runner("b", constantly(2.0)), 3, 1, clock)
    assert found.a == (1.0, 1.0, 90.0, 1.0, 1.0, 80.0)
    assert found.ratio == 2.0


def test_the_garbage_collector_rests_while_timing_and_works_afterwards() -> None:
    states = []
    timing(lambda: states.append(gc.isenabled()), 2)
    assert states == [False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing(lambda: 1 // 0, 1)  # type: ignore[arg-type]
    assert gc.isenabled()


def test_a_round_takes_turns() -> None:
    clock = Time()
    timed = rounds(clock.runner("a", constantly(2.0)), clock.runner("b", constantly(3.0)), 1, 2, clock)
    for found in (next(timed), next(timed)):
        assert (found.a, found.b, found.ratio) == ((2.0, 2.0), (3.0,) * 4, 1.5)
    assert "".join(clock.ran) == "abbbba" + "bbaabb"


def test_a_machine_that_slows_down_evenly_shows_no_difference() -> None:
    clock = Time()
    slowing: Callable[[float], float] = lambda now: 0.01 * (1 + now)  # noqa: E731
    timed = rounds(clock.runner("a", slowing), clock.runner("b", slowing), 1, 1, clock)
    found = [next(timed) for _ in range(40)]
    assert found[-1].a[0] > 2 * found[0].a[0]
    assert np.median([r.ratio for r in found]) == pytest.approx(1.0, abs=0.001)


def test_a_series_lasts_as_long_as_it_may_and_has_ten_runs() -> None:
    clock = Time()
    assert len(series(clock.runner("a", constantly(0.25)), 5.0, clock)) == 20
    assert series(clock.runner("a", constantly(9.0)), 1.0, clock) == [9.0] * 10


def test_the_interval_holds_the_median_and_is_reproducible() -> None:
    rng = np.random.default_rng(0)
    blocks = [list(rng.normal(0.8, 0.02, 20)) for _ in range(5)]
    found = interval(blocks, seed=1)
    assert found == interval(blocks, seed=1)
    assert found.low < found.ratio < found.high
    assert found.ratio == pytest.approx(np.median(blocks))
    assert found.width < 0.05


def test_blocks_of_different_lengths_are_taken() -> None:
    found = interval([[1.0, 1.1], [1.2], [0.9, 1.0, 1.1]], seed=0)
    assert found.ratio == pytest.approx(1.05)


def test_more_matches_narrow_the_interval() -> None:
    equal = [interval([[1.0, 1.0]] * count, seed=0).width for count in (1, 4, 16)]
    assert equal == pytest.approx([2 * stopwatch.PLACEMENT / count**0.5 for count in (1, 4, 16)])


def test_sessions_that_disagree_widen_it() -> None:
    alike = interval([[1.0, 1.01, 0.99]] * 4, seed=0)
    apart = interval([[0.9, 0.91, 0.89], [1.1, 1.11, 1.09]] * 2, seed=0)
    assert apart.width > 4 * alike.width


def test_few_rounds_widen_it() -> None:
    """Of three rounds the bootstrap alone gives no more than their own range."""
    few, many = interval([[0.9, 1.0, 1.1]], seed=0), interval([[0.9, 1.0, 1.1] * 20], seed=0)
    assert few.low < 0.85 < 0.95 < many.low < many.high < 1.05 < 1.15 < few.high


def test_loading_first_or_last_makes_no_difference() -> None:
    later_is_faster = [[Round((1.0,), (0.96,))] * 3, [Round((0.96,), (1.0,))] * 2]
    assert stopwatch.match(*later_is_faster) == pytest.approx([1.0, 1.0])


def comparisons(ratio: float, count: int) -> Iterator[stopwatch.Interval]:
    """Compare made-up timings: lucky and unlucky sessions, noise, and hiccups now and then."""
    rng = np.random.default_rng(7)
    for number in range(count):
        blocks = []
        for _ in range(4):
            session = rng.normal(1.0, 0.008)
            noise = rng.lognormal(0.0, 0.02, 4)
            hiccups = np.where(rng.random(4) < 0.05, rng.uniform(0.5, 2.0, 4), 1.0)
            blocks.append(list(ratio * session * noise * hiccups))
        yield interval(blocks, seed=number)


def test_equal_models_are_called_different_in_at_most_one_case_of_twenty() -> None:
    called = sum(found.high < 1 or found.low > 1 for found in comparisons(1.0, 200))
    assert called <= 10


def test_real_differences_are_seen() -> None:
    assert all(found.low > 1 for found in comparisons(1.1, 100))
    assert all(found.high < 1 for found in comparisons(0.9, 100))
