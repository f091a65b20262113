"""How far values lie apart: every type, NaN and infinity, shapes, sequences, maps, optionals."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.compare.deviation import Extent, blank, difference, extent, kind_of, nbytes

NAN, INF = math.nan, math.inf


def floats(*values: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(values, dtype)


def test_equal_arrays_do_not_differ() -> None:
    found = difference(floats(1, NAN, INF, -INF, 0.0), floats(1, NAN, INF, -INF, -0.0))
    assert (found.max_abs, found.share, found.first, found.broken, found.exceeded) == (0.0, 0.0, None, "", False)
    assert found.cosine == 1.0


def test_the_worst_and_the_first_element_beyond_what_is_allowed_are_found() -> None:
    reference = np.zeros((2, 3), np.float32)
    other = np.array([[0.01, 0, 0], [0, 0.5, 2]], np.float32)
    found = difference(reference, other, allowed=0.1)
    assert found.max_abs == 2.0
    assert found.first == (1, 1)
    assert found.share == pytest.approx(0.5)
    assert found.exceeded


def test_within_what_is_allowed_the_first_element_that_differs_is_told() -> None:
    found = difference(floats(1, 2, 3), floats(1, 2.25, 3), allowed=0.25)
    assert (found.first, found.exceeded) == ((1,), False)


@pytest.mark.parametrize(
    ("reference", "other", "words"),
    [
        (floats(1, 2), floats(1, NAN), "is NaN where the original has 2"),
        (floats(1, NAN), floats(1, 2), "is 2 where the original has NaN"),
        (floats(1, 2), floats(1, INF), "is inf where the original has 2"),
        (floats(1, INF), floats(1, -INF), "is -inf where the original has inf"),
        (floats(1, NAN), floats(1, INF), "is inf where the original has NaN"),
    ],
)
def test_nan_and_infinity_must_stand_in_the_same_places(reference: np.ndarray, other: np.ndarray, words: str) -> None:
    found = difference(reference, other, allowed=INF)
    assert found.broken == words
    assert found.max_abs == INF
    assert found.first == (1,)


def test_the_place_of_a_new_nan_is_told_even_when_numbers_before_it_are_off() -> None:
    assert difference(floats(1, 2, 3), floats(9, 2, NAN), allowed=0.1).first == (2,)


@pytest.mark.parametrize(
    ("reference", "other", "words"),
    [
        (floats(1, 2), floats(1, 2, 3), "has shape [3] instead of [2]"),
        (floats(1, 2), floats(1, 2).reshape(2, 1), "has shape [2, 1] instead of [2]"),
        (floats(1, 2), floats(1, 2, dtype=np.float64), "has type float64 instead of float32"),
        (np.array([1, 2]), np.array([1, 2], np.int32), "has type int32 instead of int64"),
        (floats(1), None, "is empty where the original has a value"),
        (None, floats(1), "has a value where the original is empty"),
        ([floats(1)], [floats(1), floats(2)], "has 2 elements instead of 1"),
        ([floats(1)], floats(1), "is no sequence"),
        (floats(1), [floats(1)], "is no tensor"),
        ({1: 0.5}, {2: 0.5}, "has other keys than the original"),
    ],
)
def test_what_cannot_be_compared_is_said(reference: Any, other: Any, words: str) -> None:
    found = difference(reference, other, allowed=INF)
    assert found.broken == words
    assert found.exceeded


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_narrow_floats_are_compared_in_float64(dtype: Any) -> None:
    found = difference(floats(200, 1, dtype=dtype), floats(-200, 1, dtype=dtype))
    assert found.kind == "float"
    # 200 - (-200) overflows some of these types
    assert found.max_abs == 2 * float(np.array(200).astype(dtype).astype(np.float64))


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8, np.uint64, np.int64])
def test_integers_must_be_equal(dtype: Any) -> None:
    found = difference(np.array([1, 7, 3]).astype(dtype), np.array([1, 2, 3]).astype(dtype), allowed=100)
    assert (found.kind, found.max_abs, found.first, found.exceeded) == ("integer", 5.0, (1,), True)
    assert found.share == pytest.approx(1 / 3)


def test_integers_beyond_the_precision_of_float64_are_told_apart() -> None:
    found = difference(np.array([2**53 + 1]), np.array([2**53]))
    assert found.exceeded
    assert found.max_abs == 1.0


def test_booleans_and_strings_must_be_equal() -> None:
    booleans = difference(np.array([True, False]), np.array([True, True]))
    strings = difference(np.array(["a", "b"], object), np.array(["a", "c"], object))
    for found, kind in ((booleans, "boolean"), (strings, "string")):
        assert (found.kind, found.first, found.exceeded, found.cosine) == (kind, (1,), True, None)
    assert not difference(np.array(["a"], object), np.array(["a"], object)).exceeded


def test_complex_numbers_are_compared_part_by_part() -> None:
    reference = np.array([1 + 2j, 3 + 4j], np.complex64)
    found = difference(reference, reference + np.array([0, 0.5j], np.complex64), allowed=0.1)
    assert (found.max_abs, found.first) == (0.5, (1,))


def test_positions_inside_sequences_and_maps_lead_the_index() -> None:
    found = difference([floats(1, 2), floats(3, 4)], [floats(1, 2), floats(3, 5)])
    assert (found.first, found.max_abs) == ((1, 1), 1.0)
    maps = difference([{"a": 0.25, "b": 0.75}], [{"a": 0.25, "b": 0.5}])
    assert (maps.first, maps.max_abs) == ((0, "b"), 0.25)
    shape = difference([floats(1)], [floats(1, 2)])
    assert (shape.first, shape.broken) == ((0,), "has shape [2] instead of [1]")


def test_scalars_and_empty_arrays_compare() -> None:
    found = difference(np.float32(1).reshape(()), np.float32(2).reshape(()))
    assert (found.first, found.max_abs) == ((), 1.0)
    assert not difference(np.empty((0, 3), np.float32), np.empty((0, 3), np.float32)).exceeded


def test_chunks_join_to_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((7, 11)).astype(np.float32)
    other = reference + rng.standard_normal((7, 11)).astype(np.float32) * 0.1
    whole = difference(reference, other, allowed=0.2)
    monkeypatch.setattr("onnxopt.compare.deviation._CHUNK", 5)
    parts = difference(reference, other, allowed=0.2)
    assert (parts.max_abs, parts.first, parts.exceeded) == (whole.max_abs, whole.first, whole.exceeded)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.share == pytest.approx(whole.share)


def test_later_feeds_add_to_earlier_ones() -> None:
    good = difference(floats(1, 2), floats(1, 2.125), allowed=0.5)
    bad = difference(floats(1, 2), floats(3, 2), allowed=0.5)
    for both in (good | bad, bad | good):
        assert (both.max_abs, both.first, both.exceeded, both.elements) == (2.0, (0,), True, 4)
        assert both.share == pytest.approx(0.5)


def test_cosine_is_zero_against_zeros_and_undefined_between_them() -> None:
    assert difference(floats(0, 0), floats(1, 0)).cosine == 0.0
    assert difference(floats(0, 0), floats(0, 0)).cosine is None
    assert difference(floats(1, 0), floats(0, 1)).cosine == 0.0


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((1, 3), 2.0),
        ((5, 5), 5.0),
        ((-4,), 4.0),
        ((0, 0), 1.0),
        ((NAN, INF), 1.0),
        ((1, NAN, 2, INF), 1.0),
        ((), 1.0),
    ],
)
def test_the_scale_is_the_range_or_what_stands_in_for_it(values: tuple[float, ...], scale: float) -> None:
    assert extent(floats(*values)).scale == scale


def test_extents_join_and_know_how_rounding_is_amplified() -> None:
    joined = extent(floats(1000.0)) | extent([floats(1000.5), np.array(["text"], object)])
    assert (joined.low, joined.high) == (1000.0, 1000.5)
    assert joined.amplification == pytest.approx(2001)
    assert Extent(-1, 1).amplification == 1.0


def test_a_blank_value_keeps_types_and_shapes_alone() -> None:
    value = {"a": [floats(1, 2), None], "b": np.array(["x"], object)}
    found = blank(value)
    assert not difference(found, blank({"a": [floats(7, NAN), None], "b": np.array(["y"], object)})).exceeded
    assert difference(found, blank({"a": [floats(1), None], "b": np.array(["x"], object)})).broken


def test_sizes_and_kinds() -> None:
    assert nbytes([floats(1, 2), np.zeros(3, np.int64), None, {"k": floats(1)}]) == 8 + 24 + 4
    assert kind_of(np.dtype(ml_dtypes.float4_e2m1fn)) == "float"
    assert kind_of(np.dtype(ml_dtypes.int2)) == "integer"
    assert kind_of(np.dtype("U3")) == "string"


def test_what_is_lost_is_the_norm_of_the_difference_by_that_of_the_reference() -> None:
    assert difference(floats(3, 4), floats(3, 4)).lost == 0.0
    assert difference(floats(3, 4), floats(0, 0)).lost == pytest.approx(1.0)
    assert difference(floats(3, 4), floats(3, 4.5)).lost == pytest.approx(0.1)
    assert (difference(floats(3, 0), floats(0, 0)) | difference(floats(0, 4), floats(0, 4))).lost == pytest.approx(0.6)
    assert difference(floats(0, 0), floats(1, 0)).lost is None
    assert difference(np.array(["a"]), np.array(["b"])).lost is None
