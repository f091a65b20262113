from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from onnxopt.contract import AppliedEdit, PassReport, Site
from onnxopt.passes.prune.channels import PruneChannels
from onnxopt.passes.prune.merge_channels import MergeChannels
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.pipeline import spec
from onnxopt.removed import Change, Damage, Removed
from onnxopt.report.data import Reached, Report
from onnxopt.report.removals import reached, tables
from onnxopt.report.summary import notes


def report_of(graph_pass: Any, *removed: Removed) -> PassReport:
    edits = tuple(AppliedEdit(Site(graph_pass.name, "", r.name), "x", r) for r in removed)
    status: Any = "kept" if edits else "dropped"
    return PassReport(graph_pass.name, spec(graph_pass), "approximate", status, "", edits, (), (), 0.1)


@pytest.fixture
def group(removals: Report) -> Removed:
    """A group: 16 of 200 channels go, and 32 of 1,000 parameters."""
    found = removals.passes[-1].applied[0].removed
    assert found is not None
    return found


def test_what_is_left_goes_from_the_first_edit_to_the_last(group: Removed) -> None:
    second = dataclasses.replace(group, channels=Change(184, 100), parameters=Change(968, 250))
    for graph_pass, of, asked, left in (
        (PruneChannels(ratio=0.5), "channels", 0.5, 0.5),
        (PruneChannels(params=0.3), "parameters", 0.3, 0.25),
    ):
        (found,) = reached([graph_pass], [report_of(graph_pass, group, second)], None)
        assert found == Reached(spec(graph_pass), of, asked, left)


def test_time_is_that_of_the_result(group: Removed, removals: Report) -> None:
    graph_pass = PruneChannels(latency=0.9)
    done = report_of(graph_pass, group)
    (found,) = reached([graph_pass], [done], removals.measurement)
    assert (found.of, found.asked, found.reached, found.low, found.high) == ("time", 0.9, 0.893, 0.87, 0.917)
    (unmeasured,) = reached([graph_pass], [done], None)
    assert (unmeasured.reached, unmeasured.low, unmeasured.high) == (None, None, None)


def test_passes_without_a_goal_or_whose_edits_do_not_stand_tell_nothing() -> None:
    prune, zeros = PruneChannels(), PruneWeights(ratio=0.5)
    reports = [report_of(zeros), report_of(prune)]
    assert list(reached([prune, zeros], reports, None)) == []
    assert list(reached([], [], None)) == []


def test_passes_are_found_by_what_they_are_wherever_they_stand(group: Removed) -> None:
    prune, zeros = PruneChannels(), PruneWeights(ratio=0.5)
    (found,) = reached([prune, zeros], [report_of(zeros), report_of(prune, group)], None)
    assert found.spec == spec(prune)


def test_parts_are_of_what_the_pass_found(group: Removed) -> None:
    second = dataclasses.replace(group, parameters=Change(968, 500), macs=Change(40_000, 20_000))
    (table,) = tables([report_of(PruneChannels(), group, second), report_of(PruneWeights(ratio=0.5))])
    assert [round(line.parameters, 3) for line in table.lines] == [0.032, 0.468]
    assert [line.macs for line in table.lines] == [0.2, 0.4]
    assert table.parameters == Change(1000, 500)


def test_of_a_pass_that_found_nothing_to_remove_it_is_said_that_all_is_left(removals: Report) -> None:
    graph_pass = PruneChannels(params=0.3)
    done = dataclasses.replace(report_of(graph_pass), status="unchanged")
    goals = tuple(reached([graph_pass], [done], None))
    assert goals == (Reached(spec(graph_pass), "parameters", 0.3, 1.0),)
    told = notes(dataclasses.replace(removals, passes=(done,), reached=goals))
    expected = (
        "prune-channels{params=0.3}: asked to leave 30.0% of the parameters; 100.0% is left. Nothing was removed."
    )
    assert told[0] == expected
    assert notes(removals)[0].startswith("Zeros alone")


@pytest.mark.parametrize(
    ("graph_pass", "why"),
    [
        (MergeChannels(), "-, because merge-channels fits no layers behind"),
        (PruneChannels(repair=False), "-, because without repair no layers are fitted"),
        (PruneChannels(), "-, because layers behind are measured when they are fitted, which needs data"),
    ],
)
def test_it_is_said_why_nothing_was_measured(group: Removed, graph_pass: Any, why: str) -> None:
    plain = dataclasses.replace(group, measured=None, unrepaired=None)
    (table,) = tables([report_of(graph_pass, plain, plain)])
    assert [line.cells[-1] for line in table.lines] == ["-", "-"]
    assert table.legend[-1].startswith(f"Measured: {why}")


def test_it_is_said_of_some_groups_why_they_were_not_measured(group: Removed) -> None:
    seen = dataclasses.replace(group, measured=Damage(0.1, "layers"))
    plain = dataclasses.replace(group, measured=None, unrepaired=None)
    (table,) = tables([report_of(PruneChannels(), seen, plain)])
    assert table.legend[-1] == "Measured: - where no layer behind the group could be fitted."
    (whole,) = tables([report_of(PruneChannels(), seen, seen)])
    assert not any("Measured: -" in text for text in whole.legend)
