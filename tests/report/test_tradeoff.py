from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest

from onnxopt.removed import Change, Damage
from onnxopt.report import removals
from onnxopt.report.data import Report
from onnxopt.report.html import to_html
from onnxopt.report.tradeoff import picture

Groups = list[tuple[int, float | None]]


@pytest.fixture
def table(removals: Report) -> Any:
    """Return a maker of tables of groups: what each saves of 1,000 parameters, and what is expected of it."""
    plain = removals.passes[-1].applied[0].removed
    assert plain is not None

    def make(groups: Groups, of: Any = "outputs") -> Any:
        return _table(plain, groups, of)

    return make


def _table(plain: Any, groups: Groups, of: Any) -> removals.Table:
    lines = []
    for index, (saved, share) in enumerate(groups):
        predicted = None if share is None else Damage(share, of)
        done = dataclasses.replace(plain, name=f"g{index}", parameters=Change(1000, 1000 - saved), predicted=predicted)
        lines.append(removals.Line(done, saved / 1000, 0.1))
    return removals.Table("prune-channels", tuple(lines))


def discs(page: str) -> dict[str, tuple[float, float]]:
    """Return where each group stands."""
    found = re.findall(r'<title>(g\d+): [^<]*</title><circle cx="([\d.]+)" cy="([\d.]+)"', page)
    return {name: (float(x), float(y)) for name, x, y in found}


def test_more_saved_is_further_right_and_more_damage_is_higher(table: Any) -> None:
    page = picture(table([(10, 0.001), (300, 0.002), (200, 0.5)]))
    places = discs(page)
    assert places["g0"][0] < places["g2"][0] < places["g1"][0]
    assert places["g2"][1] < places["g1"][1] < places["g0"][1]
    assert "expected damage" in page


@pytest.mark.parametrize("share", [0.0, 1e-30, 1e-4, 0.1, 1.0, 7.5])
def test_every_damage_stands_inside_the_picture(table: Any, share: float) -> None:
    for x, y in discs(picture(table([(1, share), (999, 0.01)]))).values():
        assert 0 < x < 640
        assert 0 < y < 300


@pytest.mark.parametrize(
    "groups", [[], [(10, 0.1)], [(10, None), (20, 0.1)], [(10, 0.0), (20, 0.0)], [(0, 0.1), (5, 0.1)]]
)
def test_what_cannot_be_compared_is_not_drawn(table: Any, groups: Groups) -> None:
    assert picture(table([(s, c) for s, c in groups])) is None


def test_where_outputs_are_not_foretold_what_was_measured_is_drawn(table: Any) -> None:
    page = picture(table([(10, 0.3), (20, math.nan)], of="weights"))
    assert "measured damage" in page
    assert len(discs(page)) == 2  # both measured alike


def test_names_do_not_cover_one_another(table: Any) -> None:
    page = picture(table([(50 + i, 0.1) for i in range(6)]))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="(?:start|end)">g\d', page))
    assert len(heights) == 6
    assert all(b - a >= 13 - 1e-6 for a, b in itertools.pairwise(heights))


def test_the_page_shows_it(table: Any, removals: Report) -> None:
    done = removals.passes[-1]
    edits = tuple(
        dataclasses.replace(done.applied[0], removed=line.removed) for line in table([(10, 0.1), (20, 0.2)]).lines
    )
    shown = dataclasses.replace(removals, passes=(dataclasses.replace(done, applied=edits),))
    assert "Parameters saved and expected damage of 2 groups" in to_html(shown)
