from __future__ import annotations

import math

import pytest

from onnxopt.report import words


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 edits"), (1, "1 edit"), (2, "2 edits"), (12345, "12,345 edits")]
)
def test_count_agrees_with_its_number(number: int, expected: str) -> None:
    assert words.count(number, "edit") == expected


def test_count_takes_an_irregular_plural() -> None:
    assert words.count(1, "near miss", "near misses") == "1 near miss"
    assert words.count(3, "near miss", "near misses") == "3 near misses"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (1852000, "1.85 MB"),
        (9996, "10.0 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (2_600_000_000, "2.60 GB"),
        (1_234_000_000_000_000, "1,234 TB"),
    ],
)
def test_size_has_three_digits(number: int, expected: str) -> None:
    assert words.size(number) == expected


def test_sizes_share_the_larger_unit() -> None:
    assert words.sizes(1_850_000, 470_000) == "1.85 -> 0.470 MB"
    assert words.sizes(120, 1) == "120 -> 1 bytes"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (0.893, "0.893"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (-0.0123, "-0.0123"),
        (1e-9, "1.00e-09"),
        (math.nan, "NaN"),
        (math.inf, "infinite"),
    ],
)
def test_digits(number: float, expected: str) -> None:
    assert words.digits(number) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0.0, "0"), (2.1e-7, "2.1e-07"), (1.5, "1.5e+00"), (math.nan, "NaN"), (math.inf, "infinite")],
)
def test_deviation(number: float, expected: str) -> None:
    assert words.deviation(number) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0001, "<1 ms"),
        (0.0123, "12 ms"),
        (0.9996, "1.00 s"),
        (7.216, "7.22 s"),
        (59.999, "1 min 00 s"),
        (125, "2 min 05 s"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert words.duration(seconds) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (4, 3, "-25.0%"),
        (3, 3, "unchanged"),
        (0, 3, ""),
        (100_000, 100_008, "+0.008%"),
        (10_000_000, 9_999_999, "under 0.001%"),
    ],
)
def test_change(before: float, after: float, expected: str) -> None:
    assert words.change(before, after) == expected


def test_fold_keeps_both_ends() -> None:
    folded = words.fold("/encoder/layer.11/attention/self/query/Add_output_0", 30)
    assert len(folded) == 30
    assert folded.startswith("/encoder/") and "..." in folded and folded.endswith("Add_output_0")


def test_fold_leaves_short_names() -> None:
    assert words.fold("logits", 6) == "logits"


def test_only_long_words_are_folded() -> None:
    assert words.fold_words("removed Expand of /a/b/c/d/e/f/g", 10) == "removed Expand of /a/.../f/g"


@pytest.mark.parametrize("width", range(1, 12))
def test_fold_never_exceeds_the_width(width: int) -> None:
    assert len(words.fold("abcdefghijklmnop", width)) == max(width, 5)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\nlines", r"two\nlines"),
        ("left\u202eright", r"left\u202eright"),
        ("größe/権重", "größe/権重"),
        ("lone\ud800", r"lone\ud800"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(name: str, shown: str) -> None:
    assert words.printable(name) == shown


def test_sentence_ends_with_one_full_stop() -> None:
    assert words.sentence("it differs") == "it differs."
    assert words.sentence("it\n  differs.") == "it differs."
    assert words.sentence("") == ""


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0.0, "0%"),
        (0.0003, "<0.1%"),
        (0.1234, "12.3%"),
        (1.5, "150.0%"),
        (9.994, "999.4%"),
        (1e30, ">999%"),
        (math.inf, ">999%"),
        (math.nan, "NaN"),
    ],
)
def test_a_share_is_short_whatever_it_is(part: float, text: str) -> None:
    assert words.share(part) == text


@pytest.mark.parametrize(("part", "text"), [(0.0, "0%"), (0.0003, "<0.1%"), (0.25, "-25.0%"), (-0.25, "+25.0%")])
def test_what_is_saved_is_a_change(part: float, text: str) -> None:
    assert words.saved(part) == text
