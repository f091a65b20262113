"""Samples to learn from and samples to judge by."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.inputs.data import Data
from onnxopt.inputs.split import split


def samples(count: int) -> Data:
    return Data("made", lambda: iter([{"x": np.array(i)} for i in range(count)]), count)


def numbers(data: Data) -> list[int]:
    return [int(s["x"]) for s in data]


@pytest.mark.parametrize("count", [2, 3, 16, 1000])
def test_the_two_parts_are_disjoint_and_cover_everything(count: int) -> None:
    found = split(samples(count), seed=0)
    learnt, judged = numbers(found.calibration), numbers(found.evaluation)
    assert sorted(learnt + judged) == list(range(count))
    assert (len(found.calibration), len(found.evaluation)) == (len(learnt), len(judged))
    assert len(learnt) == min(max(count // 4, 1), 128)
    assert tuple(judged) == found.evaluated
    assert found.note == ""


def test_the_seed_decides() -> None:
    one, same, other = (numbers(split(samples(100), seed=s).calibration) for s in (1, 1, 2))
    assert one == same != other


def test_a_single_sample_serves_for_both_and_the_report_says_so() -> None:
    found = split(samples(1), seed=0)
    assert numbers(found.calibration) == numbers(found.evaluation) == [0]
    assert "single sample" in found.note


def test_labels_go_with_their_samples() -> None:
    found = split(samples(8), seed=0)
    assert found.labels(np.arange(8)).tolist() == numbers(found.evaluation)
    pairs = np.arange(16)  # a fixed batch of two
    assert found.labels(pairs).tolist() == [j for i in numbers(found.evaluation) for j in (2 * i, 2 * i + 1)]
    assert found.labels(np.arange(3)).tolist() == [0, 1, 2]
