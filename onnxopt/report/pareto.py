"""The picture of a search: how fast the candidates are against what they cost, and how large they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxopt.report import names, summary, words
from onnxopt.report.markup import Html, drawing, lettering, tag

if TYPE_CHECKING:
    from onnxopt.report.data import Candidate, SearchReport

_WIDTH, _HEIGHT = 760, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, names.ROOM, 18, 46
_SMALLEST, _LARGEST = 5.0, 16.0
"""Radii; the area of a disc goes with the size of the file."""

_STYLE = {"winner": "better", "over budget": "worse"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Dot:
    """A candidate in the picture; `loss` is what it costs, at least 0."""

    candidate: Candidate
    ratio: float
    loss: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Scale:
    """From figures to places. The losses stand on a logarithmic scale that begins with 0."""

    right: float
    lowest: int
    highest: int

    def x(self, ratio: float) -> float:
        """Return where a latency stands."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ratio / self.right

    def y(self, loss: float) -> float:
        """Return where a loss stands; less is lower."""
        floor, height = _HEIGHT - _BOTTOM, _HEIGHT - _TOP - _BOTTOM
        if loss < 10.0**self.lowest:
            return floor - 0.06 * height
        part = (math.log10(loss) - self.lowest) / (self.highest - self.lowest)
        return floor - (0.14 + 0.86 * min(part, 1.0)) * height


def picture(search: SearchReport) -> Html | None:
    """Draw latency against loss; None when fewer than two candidates have both.

    The line joins the candidates that none of the others beats in both; the shaded part is within the budget. Whoever
    does not see the picture finds all of it in the table below.
    """
    dots = _dots(search.candidates)
    if len(dots) < 2:
        return None
    limit = search.max_drop if search.metric and search.max_drop is not None else search.max_error
    scale = _scale(dots, limit)
    parts = [*_frame(scale, summary.quality_title(search)), *_budget(scale, limit), _line(scale, front(dots))]
    winner = next((d.candidate.name for d in dots if d.candidate.status == "winner"), "")
    places = [(d.candidate.name, scale.x(d.ratio), scale.y(d.loss)) for d in dots]
    parts += names.beside(places, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM, winner)
    biggest = max(d.candidate.bytes or 1 for d in dots)
    for dot in sorted(dots, key=lambda d: -(d.candidate.bytes or 0)):
        parts.append(_disc(scale, dot, biggest))
    description = f"Latency and {summary.quality_title(search)} of {words.count(len(dots), 'candidate')}"
    return drawing(description, parts, _WIDTH, _HEIGHT)


def _dots(candidates: Sequence[Candidate]) -> list[_Dot]:
    found = []
    for candidate in candidates:
        loss = candidate.worst if candidate.metric is None else candidate.metric.drop
        loss = loss if candidate.pipeline else 0.0
        if candidate.ratio is not None and loss is not None and math.isfinite(loss):
            found.append(_Dot(candidate, candidate.ratio, max(loss, 0.0)))
    return found


def front(dots: Sequence[_Dot]) -> list[_Dot]:
    """Return the candidates that no other is at least as good as in both, and better in one; fastest first."""
    best: list[_Dot] = []
    for dot in sorted(dots, key=lambda d: (d.ratio, d.loss)):
        if not best or dot.loss < best[-1].loss:
            best.append(dot)
    return best


def _scale(dots: Sequence[_Dot], limit: float | None) -> _Scale:
    losses = [d.loss for d in dots if d.loss > 0]
    if limit is not None and 0 < limit < math.inf:
        losses.append(limit)
    lowest = math.floor(math.log10(min(losses))) if losses else -3
    highest = math.ceil(math.log10(max(losses))) if losses else 0
    lowest = max(lowest, highest - 6)
    return _Scale(max(1.05, 1.08 * max(d.ratio for d in dots)), lowest, max(highest, lowest + 1))


def _frame(scale: _Scale, title: str) -> list[Html]:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [tag("line", x1=_LEFT, x2=right, y1=floor, y2=floor, class_="rail")]
    step = next(s for s in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, math.ceil(scale.right)) if scale.right / s <= 6)
    for i in range(int(scale.right / step) + 1):
        parts.append(lettering(f"{i * step:.0%}", scale.x(i * step), floor + 16, "middle"))
    parts.append(lettering("latency, of the original's", (_LEFT + right) / 2, _HEIGHT - 8, "middle"))
    x = scale.x(1.0)
    parts.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=_TOP, y2=floor, class_="reference"))
    parts.append(lettering("0", _LEFT - 8, scale.y(0.0) + 4, "end"))
    for power in range(scale.lowest, scale.highest + 1):
        y = scale.y(10.0**power)
        parts.append(tag("line", x1=_LEFT, x2=right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rail"))
        parts.append(lettering(f"1e{power:+03d}", _LEFT - 8, y + 4, "end"))
    parts.append(lettering(title, _LEFT, _TOP - 6, "start"))
    return parts


def _budget(scale: _Scale, limit: float | None) -> list[Html]:
    if limit is None or not math.isfinite(limit):
        return []
    top, floor = scale.y(limit), _HEIGHT - _BOTTOM
    width = scale.x(1.0) - _LEFT
    return [
        tag("rect", x=_LEFT, y=f"{top:.1f}", width=f"{width:.1f}", height=f"{floor - top:.1f}", class_="allowed"),
        lettering("budget", _LEFT + 6, top + 13, "start"),
    ]


def _line(scale: _Scale, dots: Sequence[_Dot]) -> Html:
    places = " L ".join(f"{scale.x(d.ratio):.1f} {scale.y(d.loss):.1f}" for d in dots)
    return tag("path", d=f"M {places}", class_="front")


def _disc(scale: _Scale, dot: _Dot, biggest: int) -> Html:
    candidate = dot.candidate
    radius = max(_SMALLEST, _LARGEST * math.sqrt((candidate.bytes or 0) / biggest))
    speed, size, quality = summary.candidate_cells(candidate)
    text = f"{candidate.name}: {speed}, {size}, {quality}, {candidate.status}"
    return tag(
        "g",
        tag("title", text),
        tag(
            "circle",
            cx=f"{scale.x(dot.ratio):.1f}",
            cy=f"{scale.y(dot.loss):.1f}",
            r=f"{radius:.1f}",
            class_=f"disc {_STYLE.get(candidate.status, 'same')}",
        ),
    )
