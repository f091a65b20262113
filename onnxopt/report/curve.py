"""The picture of accuracy against labelled samples per class, as SVG made by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxopt.report.markup import Html, drawing, lettering, tag

if TYPE_CHECKING:
    from onnxopt.probe.validation import Step

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 84, 16, 44
_BAND = 0.18

_STYLE = """
svg { background: #ffffff; } text { fill: #5f6872; font: 11px system-ui, sans-serif; } .rail { stroke: #e3e5e8; }
.reference { stroke: #5f6872; stroke-dasharray: 2 2; } .curve { fill: none; stroke-width: 2; }
.better { fill: #0f766e; } .worse { fill: #b42331; } .same { fill: #7d8894; } .stage { fill: #5b7fb5; }
g.better { stroke: #0f766e; } g.worse { stroke: #b42331; } g.same { stroke: #7d8894; } g.stage { stroke: #5b7fb5; }
"""
"""Of a picture outside of a page."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One way to get a classifier.

    Attributes:
        label: What stands at the end of the line.
        steps: Its accuracy, by ascending number of samples.
        style: Class of the style sheet: "better", "worse", "same" or "stage".
    """

    label: str
    steps: Sequence[Step]
    style: str


class _Scale:
    def __init__(self, lines: Sequence[Line], floor: float) -> None:
        sizes = [s.per_class for line in lines for s in line.steps]
        self.first, self.last = math.log(min(sizes)), math.log(max(sizes))
        lowest = min([floor, *(s.low for line in lines for s in line.steps)])
        self.bottom = min(0.9, math.floor(lowest * 10) / 10)

    def x(self, per_class: int) -> float:
        width = _WIDTH - _LEFT - _RIGHT
        span = self.last - self.first
        return _LEFT + width * ((math.log(per_class) - self.first) / span if span else 0.5)

    def y(self, share: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (share - self.bottom) / (1 - self.bottom)


def picture(lines: Sequence[Line], *, guessing: float) -> Html:
    """Draw accuracy against labelled samples, which stand on a logarithmic scale.

    Args:
        lines: At least one, each with at least one step.
        guessing: Accuracy of always answering the most frequent class, drawn as a dashed line.
    """
    scale = _Scale(lines, guessing)
    parts = _frame(scale, sorted({s.per_class for line in lines for s in line.steps}))
    y = scale.y(guessing)
    parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="reference"))
    parts.append(lettering("guessing", _WIDTH - _RIGHT + 6, y + 4, "start"))
    for line in lines:
        parts += _line(scale, line)
    parts += _labels(scale, lines)
    description = "Accuracy against labelled samples per class: " + "; ".join(
        f"{line.label} " + ", ".join(f"{s.mean:.1%} at {s.per_class}" for s in line.steps) for line in lines
    )
    return drawing(description, parts, _WIDTH, _HEIGHT)


def standalone(drawn: Html) -> str:
    """Return a picture as an SVG file of its own."""
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"'
    return drawn.replace("<svg", opened, 1).replace("</title>", f"</title><style>{_STYLE}</style>", 1) + "\n"


def _frame(scale: _Scale, sizes: Sequence[int]) -> list[Html]:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    step = 0.1 if 1 - scale.bottom <= 0.6 else 0.2
    for i in range(round((1 - scale.bottom) / step) + 1):
        share = 1 - i * step
        y = scale.y(share)
        if y > floor + 1:
            break
        parts.append(tag("line", x1=_LEFT, x2=right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rail"))
        parts.append(lettering(f"{share:.0%}", _LEFT - 8, y + 4, "end"))
    parts += [lettering(f"{size:,}", scale.x(size), floor + 16, "middle") for size in sizes]
    parts.append(lettering("labelled samples per class", (_LEFT + right) / 2, _HEIGHT - 8, "middle"))
    return parts


def _line(scale: _Scale, line: Line) -> list[Html]:
    places = [(scale.x(s.per_class), s) for s in line.steps]
    upper = [f"{x:.1f} {scale.y(s.high):.1f}" for x, s in places]
    lower = [f"{x:.1f} {scale.y(s.low):.1f}" for x, s in reversed(places)]
    middle = " L ".join(f"{x:.1f} {scale.y(s.mean):.1f}" for x, s in places)
    dots = [
        tag(
            "g",
            tag("title", f"{line.label}, {s.per_class} per class: {s.mean:.1%} ({s.low:.1%} to {s.high:.1%})"),
            tag("circle", cx=f"{x:.1f}", cy=f"{scale.y(s.mean):.1f}", r=3.5),
        )
        for x, s in places
    ]
    return [
        tag("path", d=f"M {' L '.join([*upper, *lower])} Z", class_=line.style, fill_opacity=_BAND),
        tag(
            "g",
            tag("path", d=f"M {middle}", class_="curve"),
            *dots,
            class_=line.style,
        ),
    ]


def _labels(scale: _Scale, lines: Sequence[Line]) -> list[Html]:
    """Write each line's name behind its end, from the top down, so that none covers another."""
    parts: list[Html] = []
    last = -math.inf
    for line in sorted(lines, key=lambda n: -n.steps[-1].mean):
        end = line.steps[-1]
        last = max(scale.y(end.mean) + 4, last + 13)
        parts.append(lettering(line.label, scale.x(end.per_class) + 8, last, "start"))
    return parts
