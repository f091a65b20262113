"""Names of what a picture shows, one below the other beside it, so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence

from onnxopt.report import words
from onnxopt.report.markup import Html, lettering, tag

ROOM = 216
"""Width that a picture has to leave for them."""
_LINE, _LETTERS = 13, 34
"""Height of a line, and letters on it."""


def beside(
    places: Sequence[tuple[str, float, float]], start: float, top: float, bottom: float, mark: str = ""
) -> list[Html]:
    """Write names from the top down, each with a line to its place.

    Args:
        places: Names with where they belong, as (name, x, y).
        start: Where the room for names begins.
        top: Where the first one may stand.
        bottom: Where the last one may stand.
        mark: The name that is the winner's.
    """
    parts: list[Html] = []
    ordered = sorted(places, key=lambda place: (place[2], -place[1]))
    for (name, x, y), line in zip(ordered, spread([y for *_, y in ordered], _LINE, top, bottom), strict=True):
        end = " (winner)" if mark and name == mark else ""
        path = f"M {x:.1f} {y:.1f} L {start + 4:.1f} {line:.1f} L {start + 11:.1f} {line:.1f}"
        parts.append(tag("path", d=path, class_="leader"))
        text = words.fold(name, _LETTERS - len(end)) + end
        parts.append(lettering(text, start + 14, line + 4, "start"))
    return parts


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart, in their order, and keep them between two ends.

    Args:
        places: In ascending order.
        gap: Between neighbours; less where there is no room for it.
        low: The lower end.
        high: The upper end.
    """
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    found: list[float] = []
    for i, place in enumerate(places):
        least = found[-1] + gap if found else low
        found.append(min(max(place, least), high - gap * (len(places) - 1 - i)))
    return found
