"""Inputs that were learnt from against those that judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxopt.inputs.likeness import unlike

RNG = np.random.default_rng(0)


def images(count: int, scale: float = 1.0, shift: float = 0.0) -> list[dict[str, Any]]:
    return [{"image": (RNG.random((1, 3, 8, 8)) * scale + shift).astype(np.float32)} for _ in range(count)]


def tokens(count: int, longest: int, vocabulary: int = 1000) -> list[dict[str, Any]]:
    return [{"ids": RNG.integers(vocabulary, size=(1, int(RNG.integers(4, longest))))} for _ in range(count)]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 100), (16, 48), (128, 1000)])
def test_samples_of_one_kind_are_alike(sizes: tuple[int, int]) -> None:
    assert unlike(images(sizes[0]), images(sizes[1])) == []
    assert unlike(tokens(sizes[0], 64), tokens(sizes[1], 64)) == []


def test_other_ranges_are_named() -> None:
    (found,) = unlike(images(32, 255.0), images(96))
    assert found.startswith('What was learnt from looks unlike what judged: the mean of the input "image" is 12')
    assert found.endswith(" in the median against 0.4979.") or "against 0." in found


def test_other_lengths_are_named() -> None:
    (found,) = unlike(tokens(32, 16), tokens(96, 512))
    assert 'the size of the input "ids"' in found


def test_few_samples_tell_nothing_and_text_is_passed_over() -> None:
    assert unlike(images(1, 255.0), images(1)) == []
    words = [{"text": np.array(["a"], object), "list": [np.ones(2)], "none": None}] * 30
    assert unlike(words, words) == []
    assert unlike([], []) == []


def test_constant_inputs_are_alike() -> None:
    ones = [{"mask": np.ones((1, 4), np.int64)}] * 50
    assert unlike(ones, ones) == []
