"""Which pruned candidates are tried."""

from __future__ import annotations

from typing import Any

import pytest

from onnxopt.allocation.forecast import Level
from onnxopt.metrics import MetricResult
from onnxopt.search.decision import Limits, Record, Speed
from onnxopt.search.prospects import HOPE, prospects

LIMITS = Limits(None, 0.01)
LEVELS = [Level(0.8, 0.02), Level(0.5, 0.08), Level(0.2, 0.3)]


def record(name: str, ratio: float, drop: float, moved: float, **changes: Any) -> Record:
    metric = MetricResult("top1", 1.0, 1.0 - drop, drop, drop, drop, samples=100, labelled=False)
    speed = Speed(ratio, 0.99 * ratio, 1.01 * ratio, effort=1)
    return Record(name, "passes", **({"speed": speed, "metric": metric, "moved": moved, "bytes": 300} | changes))


KEEP = Record("keep fp32", "", speed=Speed(1.0, 0.99, 1.01, effort=1), moved=0.0, bytes=1000)
INT8 = record("int8", 0.4, 0.002, 0.03)
INT4 = record("int4", 0.35, 0.05, 0.1)


def test_without_anything_over_budget_all_that_would_win_is_tried() -> None:
    hopeful, _, reason = prospects(LEVELS, INT8, INT8, [KEEP, INT8], LIMITS, "latency")
    assert (hopeful, reason) == (LEVELS, "")


def test_what_would_not_be_faster_is_not_tried() -> None:
    hopeful, _, reason = prospects(LEVELS, KEEP, INT8, [KEEP, INT8], LIMITS, "latency")
    assert hopeful == LEVELS[2:]
    hopeful, closest, reason = prospects(LEVELS[:2], KEEP, INT8, [KEEP, INT8], LIMITS, "latency")
    assert (hopeful, closest) == ([], LEVELS[1])
    assert reason == "even in 50% of the time it would hardly be faster than int8"


def test_for_size_the_bytes_count() -> None:
    small = record("small", 0.9, 0.0, 0.0, bytes=250)
    hopeful, closest, reason = prospects(LEVELS[:2], KEEP, small, [KEEP, small], LIMITS, "size")
    assert (hopeful, closest) == ([], LEVELS[1])
    assert reason == "even with 50% of the parameters it would hardly be smaller than small"
    assert prospects(LEVELS, KEEP, small, [KEEP, small], LIMITS, "size")[0] == LEVELS[2:]


@pytest.mark.parametrize(("moved", "tried"), [(0.1, 2), (HOPE * 0.08, 1), (0.001, 0)])
def test_what_moves_outputs_farther_than_what_is_over_budget_is_not_tried(moved: float, tried: int) -> None:
    over = record("int4", 0.35, 0.05, moved)
    hopeful, closest, reason = prospects(LEVELS, INT8, INT8, [KEEP, INT8, over], LIMITS, "latency")
    if tried:
        assert hopeful == LEVELS[:tried]
    else:
        assert (hopeful, closest) == ([], LEVELS[0])
        # what both move: the root of .02 ** 2 + .03 ** 2
        assert reason == (
            "with 80% left, outputs are expected to move by 3.6%, and int4, which moves them by 0.1%, is over the budget"
        )


def test_a_failure_tells_nothing_about_the_budget() -> None:
    crashed = record("int4", 0.35, 0.05, 0.001, failure="an output is NaN")
    assert prospects(LEVELS, INT8, INT8, [KEEP, INT8, crashed], LIMITS, "latency")[0] == LEVELS


def test_a_worst_deviation_over_budget_counts_too() -> None:
    limits = Limits(0.1, None)
    inside, outside = record("int8", 0.4, 0.0, 0.03, worst=0.05), record("int4", 0.3, 0.0, 0.05, worst=0.2)
    assert prospects(LEVELS, inside, inside, [KEEP, inside, outside], limits, "latency")[0] == LEVELS[:2]
