"""How a winner is confirmed."""

from __future__ import annotations

from typing import cast

import pytest

from onnxopt.measure import Measurement
from onnxopt.search.hunt import CONFIRMING_SECONDS, conclusive


def measurement(ratio: float, low: float, high: float) -> Measurement:
    verdict = "faster" if high < 1 else "slower" if low > 1 else "no difference shown"
    rest = (10, 1.0, ratio, 1.0, 1.0, None, None, 1, "cpu", {}, (), 4)
    return Measurement(ratio, low, high, verdict, *rest)


NOTHING_SAID = measurement(0.37, 0.016, 4.5)
SLOWER = measurement(1.1, 1.05, 1.15)
FASTER = measurement(0.4, 0.3, 0.5)
EQUAL = measurement(1.0, 0.98, 1.02)


@pytest.mark.parametrize(
    ("found", "last"),
    [
        ([FASTER], FASTER),
        ([EQUAL], EQUAL),
        ([NOTHING_SAID, FASTER], FASTER),
        ([SLOWER, EQUAL], EQUAL),
        ([SLOWER, NOTHING_SAID, SLOWER], SLOWER),
        ([NOTHING_SAID, NOTHING_SAID, NOTHING_SAID], NOTHING_SAID),
    ],
)
def test_a_measurement_that_says_nothing_or_slower_is_repeated_for_longer(
    found: list[Measurement], last: Measurement
) -> None:
    left, times = list(found), cast(list[float], [])

    def measure(seconds: float) -> Measurement:
        times.append(seconds)
        return left.pop(0)

    assert conclusive(measure) is last
    assert times == list(CONFIRMING_SECONDS[: len(found)])
