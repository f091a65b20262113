"""Layers that cost most are found with few evaluations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.contract import Site
from onnxopt.search.sensitivity import MOST_EVALUATIONS, Group, fewest, rank

SITES = [Site("quantize-static", "", f"conv{i}") for i in range(50)]


class Costs:
    """Layers whose deviations add up."""

    def __init__(self, costs: dict[int, float], rest: float = 0.001) -> None:
        self.costs = {site: costs.get(i, rest) for i, site in enumerate(SITES)}
        self.calls = 0

    def __call__(self, left: frozenset[Site]) -> float:
        self.calls += 1
        return sum(cost for site, cost in self.costs.items() if site not in left)


def test_the_guilty_layers_are_singled_out() -> None:
    costs = Costs({7: 1.0, 31: 2.0})
    groups = rank(SITES, costs)
    assert [g.sites for g in groups[:2]] == [(SITES[31],), (SITES[7],)]
    assert groups[0].gain == pytest.approx(2.0 / 3.048)
    assert costs.calls <= MOST_EVALUATIONS


@given(st.dictionaries(st.integers(0, 49), st.floats(0, 10), max_size=6), st.integers(0, 30))
def test_every_layer_is_in_one_group_and_evaluations_are_limited(costs: dict[int, float], most: int) -> None:
    distance = Costs(costs)
    groups = rank(SITES, distance, evaluations=most)
    assert sorted(s for g in groups for s in g.sites) == sorted(SITES)
    assert distance.calls <= max(most, 1)


def test_without_time_or_a_difference_nothing_is_told_apart() -> None:
    assert rank(SITES, Costs({}), in_time=lambda: False) == [Group(tuple(SITES), 1.0)]
    assert rank(SITES, lambda left: 0.0) == [Group(tuple(SITES), 1.0)]
    assert rank(SITES, lambda left: math.inf) == [Group(tuple(SITES), 1.0)]
    assert rank([], lambda left: 1.0) == []


def test_the_shortest_beginning_that_is_good_is_found() -> None:
    groups = [Group((s,), 0.1) for s in SITES[:9]]
    asked: list[int] = []

    def good(chosen: tuple[Group, ...]) -> bool:
        asked.append(len(chosen))
        return len(chosen) >= 3

    assert fewest(groups, good, tries=9) == tuple(groups[:3])
    assert len(asked) <= 4
    assert fewest(groups, lambda chosen: False, tries=9) == ()
    assert fewest(groups, good, tries=0) == ()
    assert fewest(groups[:1], lambda chosen: True, tries=9) == (), "all in float is no candidate"
