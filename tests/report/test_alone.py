"""A pruned result beside quantization alone, in text and on the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from onnxopt.report import alone
from onnxopt.report.data import Comparison, Report
from onnxopt.report.html import to_html
from onnxopt.report.terminal import to_text


def test_each_has_a_line_with_speed_size_and_quality(beside: Comparison) -> None:
    titles, lines = alone.titles(beside), alone.lines(beside)
    assert titles[:3] == ("", "speed", "size")
    assert titles[3].startswith("drop of ")
    assert [line[:3] for line in lines] == [
        ("this result", "2.00x", "900 kB"),
        ("static [int8]", "2.50x", "400 kB"),
        ("half", "-", "-"),
    ]
    assert alone.sentences(beside) == ["half: it does not run.", beside.verdict]


def test_without_a_metric_the_worst_deviation_is_shown(beside: Comparison) -> None:
    assert beside.result is not None
    own = dataclasses.replace(beside.result, metric=None)
    plain = dataclasses.replace(beside, result=own, rivals=())
    assert alone.titles(plain)[3] == "worst deviation"
    assert alone.lines(plain)[0][3] == "deviates 2.0e-01"


def test_it_stands_in_the_text_and_on_the_page(make: Callable[..., Report], beside: Comparison) -> None:
    report = make(alone=beside)
    for told in (to_text(report), to_html(report)):
        assert alone.TITLE in told
        assert told.index("this result") < told.index("static [int8]")
        assert beside.verdict in told
    assert alone.TITLE not in to_text(make())
    assert alone.TITLE not in to_html(make())


def test_what_could_not_be_compared_has_no_table(make: Callable[..., Report]) -> None:
    failed = Comparison(None, (), "", None, None, None, "It could not be compared.")
    text = to_text(make(alone=failed))
    assert "It could not be compared." in text
    assert "this result" not in text
    assert "It could not be compared." in to_html(make(alone=failed))
