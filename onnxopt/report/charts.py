"""The pictures of the page, as SVG made by hand.

Every chart is a grid of rows: a label, a track, a value. Positions inside a track are percentages, so that the
page can be as narrow as a phone without shrinking the text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from onnxopt.report.markup import Html, joined, tag

_HEIGHT = 22
_MIDDLE = _HEIGHT / 2


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """A quantity of the result as a part of the original's.

    Attributes:
        label: What it is.
        ratio: Result over original.
        value: What is written next to it.
        low: Lower end of the ratio's interval; None where there is none.
        high: Upper end.
        certain: Whether the ratio is exact, or has an interval; others are drawn in a neutral colour.
    """

    label: str
    ratio: float
    value: str
    low: float | None = None
    high: float | None = None
    certain: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """A deviation and what is allowed of it."""

    label: str
    value: float
    allowed: float
    ok: bool
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time, in seconds."""

    label: str
    seconds: float
    text: str
    style: str


def ratio_chart(bars: Sequence[Bar]) -> Html:
    """Draw ratios against the original, which is the line at 100%."""
    drawn = [b for b in bars if math.isfinite(b.ratio)]
    top = max([1.0, *(max(b.ratio, b.high or 0.0) for b in drawn)]) * 1.04
    rows = [_row(b.label, _ratio_track(b, top), b.value) for b in drawn]
    axis = [(value, f"{value:.0%}") for value in _round_steps(top)]
    return tag("div", *rows, _row("", _axis([(v / top, text) for v, text in axis]), ""), class_="chart")


def _round_steps(top: float) -> list[float]:
    """Return at most six round values from 0 to `top`."""
    step = next(s for s in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, math.ceil(top)) if top / s <= 5)
    return [i * step for i in range(int(top / step) + 1)]


def _ratio_track(bar: Bar, top: float) -> Html:
    low, high = (bar.low, bar.high) if bar.low is not None and bar.high is not None else (bar.ratio, bar.ratio)
    style = "same" if not bar.certain else "better" if high < 1 else "worse" if low > 1 else "same"
    parts = [
        tag("rect", x=0, y=3, width=_percent(1 / top), height=_HEIGHT - 6, class_="original"),
        tag("rect", x=0, y=5, width=_percent(bar.ratio / top), height=_HEIGHT - 10, rx=2, class_=style),
        _vertical(1 / top, 0, _HEIGHT, "reference"),
    ]
    if bar.low is not None and bar.high is not None:
        parts += [
            tag("line", x1=_percent(low / top), x2=_percent(high / top), y1=_MIDDLE, y2=_MIDDLE, class_="whisker"),
            _vertical(low / top, 7, 15, "whisker"),
            _vertical(high / top, 7, 15, "whisker"),
        ]
    return _track(f"{bar.label}: {bar.value}", parts)


def deviation_chart(points: Sequence[Point]) -> Html:
    """Draw deviations against what is allowed, on a logarithmic scale; "equal" stands at its left end."""
    finite = [v for p in points for v in (p.value, p.allowed) if 0 < v < math.inf]
    first = max(-16, math.floor(math.log10(min(finite)))) - 1 if finite else -9
    last = min(2, max(first + 3, math.ceil(math.log10(max(finite))))) if finite else 0

    def position(value: float) -> float:
        if math.isnan(value) or value == math.inf:
            return 0.99
        if value <= 0:
            return 0.012
        return min(0.98, max(0.05, 0.05 + 0.93 * (math.log10(value) - first) / (last - first)))

    rows = [_row(p.label, _deviation_track(p, position(p.value), position(p.allowed)), p.text) for p in points]
    step = max(1, (last - first) // 5)
    marks = [(0.012, "0")] + [(position(10.0**e), f"1e{e:+03d}") for e in range(first + step, last + 1, step)]
    return tag("div", *rows, _row("", _axis(marks), ""), class_="chart")


def _deviation_track(point: Point, value: float, allowed: float) -> Html:
    parts = [tag("line", x1="0", x2="100%", y1=_MIDDLE, y2=_MIDDLE, class_="rail")]
    if point.allowed > 0:
        end = _percent(1.0 if point.allowed == math.inf else allowed)
        parts.append(tag("rect", x=0, y=6, width=end, height=_HEIGHT - 12, class_="allowed"))
    if 0 < point.allowed < math.inf:
        parts.append(_vertical(allowed, 3, _HEIGHT - 3, "limit"))
    parts.append(tag("circle", cx=_percent(value), cy=_MIDDLE, r=5, class_="better" if point.ok else "worse"))
    return _track(f"{point.label}: {point.text}", parts)


def timeline(spans: Sequence[Span]) -> Html:
    """Draw stretches of time one after the other."""
    total = sum(s.seconds for s in spans) or 1.0
    rows, start = [], 0.0
    for span in spans:
        width = max(span.seconds / total, 0.004)
        left = min(start / total, 1 - width)
        parts = [
            tag("line", x1="0", x2="100%", y1=_MIDDLE, y2=_MIDDLE, class_="rail"),
            tag("rect", x=_percent(left), y=4, width=_percent(width), height=_HEIGHT - 8, rx=2, class_=span.style),
        ]
        rows.append(_row(span.label, _track(f"{span.label}: {span.text}", parts), span.text))
        start += span.seconds
    return tag("div", *rows, class_="chart")


def _row(label: str, track: Html, value: str) -> Html:
    return joined(
        (
            tag("div", label, class_="label", title=label) if label else tag("div"),
            track,
            tag("div", value, class_="value"),
        )
    )


def _track(description: str, parts: Sequence[Html]) -> Html:
    return tag(
        "svg",
        tag("title", description),
        *parts,
        class_="track",
        width="100%",
        height=_HEIGHT,
        role="img",
        aria_label=description,
    )


def _axis(marks: Sequence[tuple[float, str]]) -> Html:
    """Draw labels below the tracks; the outermost are pulled inside."""
    drawn = []
    for position, text in marks:
        anchor = "start" if position < 0.04 else "end" if position > 0.96 else "middle"
        drawn.append(tag("text", text, x=_percent(position), y=12, text_anchor=anchor))
    return tag("svg", *drawn, class_="axis", width="100%", height=16, aria_hidden="true")


def _vertical(position: float, top: float, bottom: float, style: str) -> Html:
    return tag("line", x1=_percent(position), x2=_percent(position), y1=top, y2=bottom, class_=style)


def _percent(part: float) -> str:
    return f"{100 * part:.2f}%"
