"""The picture of what each removed group saves against what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from onnxopt.removed import Damage
from onnxopt.report import names, removals, words
from onnxopt.report.markup import Html, drawing, lettering, tag

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, names.ROOM, 18, 46
_RADIUS = 5
_NAMED = 6
"""Groups with their names: those that cost most and those that save most, half of each."""
_DECADES = 4
"""Smaller costs stand at the lower end of the logarithmic scale."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Dot:
    name: str
    saved: float
    cost: float


def picture(table: removals.Table) -> Html | None:
    """Draw parameters saved against damage; None when fewer than two groups have both.

    Where it was foretold how far the outputs deviate, that is the damage, else what was measured. Whoever does not see
    the picture finds all of it in the table.
    """
    axis, damages = _damages(table)
    dots = [
        _Dot(line.removed.name, line.parameters, damage.share)
        for line, damage in zip(table.lines, damages, strict=True)
        if damage is not None and line.parameters > 0 and math.isfinite(damage.share)
    ]
    highest = max((dot.cost for dot in dots), default=0.0)
    if len(dots) < 2 or highest <= 0:
        return None
    top = math.ceil(math.log10(highest) + 1e-9)
    right = 1.08 * max(dot.saved for dot in dots)
    places = [(dot, _x(dot.saved, right), _y(dot.cost, top)) for dot in dots]
    description = f"Parameters saved and {axis} of {words.count(len(dots), 'group')}"
    return drawing(
        description, [*_frame(right, top, axis), *_names(places), *(_disc(*place) for place in places)], _WIDTH, _HEIGHT
    )


def _damages(table: removals.Table) -> tuple[str, list[Damage | None]]:
    """Return what the damage is called, and that of each group."""
    predicted = [line.removed.predicted for line in table.lines]
    if any(damage is not None and damage.of == "outputs" for damage in predicted):
        return "expected damage", predicted
    measured = [line.removed.measured or line.removed.unrepaired for line in table.lines]
    return "measured damage", measured


def _x(saved: float, right: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * saved / right


def _y(cost: float, top: int) -> float:
    part = (math.log10(max(cost, 10.0 ** (top - _DECADES))) - top) / _DECADES + 1
    return _HEIGHT - _BOTTOM - (0.04 + 0.96 * part) * (_HEIGHT - _TOP - _BOTTOM)


def _frame(right: float, top: int, axis: str) -> list[Html]:
    floor, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [tag("line", x1=_LEFT, x2=end, y1=floor, y2=floor, class_="rail")]
    step = next(s * 10.0**e for e in range(-6, 3) for s in (1, 2, 5) if right / (s * 10.0**e) <= 6)
    parts += [
        lettering(words.share(i * step), _x(i * step, right), floor + 16, "middle")
        for i in range(int(right / step) + 1)
    ]
    for exponent in range(top - _DECADES, top + 1):
        y = _y(10.0**exponent, top)
        parts.append(tag("line", x1=_LEFT, x2=end, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rail"))
        parts.append(lettering(f"{100 * 10.0**exponent:g}%", _LEFT - 8, y + 4, "end"))
    parts.append(lettering("parameters saved, of all", (_LEFT + end) / 2, _HEIGHT - 8, "middle"))
    parts.append(lettering(axis, _LEFT, _TOP - 6, "start"))
    return parts


def _disc(dot: _Dot, x: float, y: float) -> Html:
    text = f"{dot.name}: saves {words.share(dot.saved)} of the parameters, damage {words.share(dot.cost)}"
    disc = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=_RADIUS, class_="disc same")
    return tag("g", tag("title", text), disc)


def _names(places: Sequence[tuple[_Dot, float, float]]) -> list[Html]:
    """Name the groups that stand out."""
    by_cost = sorted(places, key=lambda place: -place[0].cost)
    by_saved = sorted(places, key=lambda place: -place[0].saved)
    chosen = dict.fromkeys((*by_cost[: _NAMED // 2], *by_saved[: _NAMED // 2]))
    return names.beside([(dot.name, x, y) for dot, x, y in chosen], _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM)
