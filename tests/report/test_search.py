"""How a search is told: the table, the words below it, and the picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.report import names, pareto, summary
from onnxopt.report.data import Report, SearchReport
from onnxopt.report.html import to_html
from onnxopt.report.json import to_json
from onnxopt.report.terminal import to_text

Make = Callable[..., Report]


@pytest.fixture
def search(make: Make) -> SearchReport:
    found = make(search={}).search
    assert found is not None
    return found


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def picture(search: SearchReport) -> ElementTree.Element:
    drawn = pareto.picture(search)
    assert drawn is not None
    return ElementTree.fromstring(drawn)


def discs(search: SearchReport) -> dict[str, tuple[float, float, float]]:
    """Return place and radius of each candidate's disc."""
    found = {}
    for group in picture(search).iter("g"):
        circle, title = group.find("circle"), group.findtext("title") or ""
        assert circle is not None
        found[title.partition(":")[0]] = tuple(float(circle.attrib[k]) for k in ("cx", "cy", "r"))
    return found  # type: ignore[return-value]


def test_the_terminal_lists_every_candidate_and_says_why(make: Make) -> None:
    text = flat(to_text(make(search={})))
    assert (
        "6 candidates; wanted: the fastest with a drop of top1 up to 0.005; judged by 872 samples, learnt from 128 "
        "others." in text
    )
    for words in (
        "2.50x 740 kB 0.001 (-0.001 to 0.002) winner",
        "over budget",
        "4-bit <b>blocks</b>: MatMulNBits failed: no kernel.",
        "in float: /encoder/layer.11/",
        "The metric is top1, because the labels are whole numbers.",
        "Only 12 samples judged.",
        "2 candidates known from before the interruption.",
    ):
        assert words in text, words
    assert "it costs much" not in text
    assert "because it is kept" not in text, "the table says as much"
    verbose = flat(to_text(make(search={}), verbose=True))
    assert "/b: it costs much." in verbose
    assert "quantize-static,quantize-weights" in verbose


def test_what_is_the_same_of_several_candidates_is_said_once(make: Make, search: SearchReport) -> None:
    first, *rest = search.candidates
    twins = [dataclasses.replace(first, name=f"twin {i}", in_float=(), status="not proven") for i in range(3)]
    other = dataclasses.replace(twins[0], name="other", status="over budget")
    found = dataclasses.replace(search, candidates=(first, *rest, twins[0], other, *twins[1:]))
    report = make(search={"candidates": found.candidates})
    assert "twin 0; twin 1; twin 2: because it is winner." in flat(to_text(report))
    assert "; other" not in flat(to_text(report))
    assert "; twin" not in flat(to_text(report, verbose=True))


def test_without_a_search_nothing_is_said_of_one(report: Report) -> None:
    assert "candidate" not in to_text(report)
    assert "pareto" not in to_html(report).partition("</style>")[2]
    assert json.loads(to_json(report))["search"] is None


def test_json_holds_all_of_it(make: Make) -> None:
    content = json.loads(to_json(make(search={})))["search"]
    assert content["candidates"][0]["in_float"][1] == {
        "graph": "If_3.then_branch",
        "output": "/b",
        "reason": "it costs much",
    }
    assert content["candidates"][5]["ratio"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "size"}, "wanted: the smallest that is not slower with"),
        ({"max_drop": None, "max_error": 0.1}, "with a deviation up to 0.1 of the range;"),
        ({"max_drop": None, "max_error": math.inf}, "with any deviation;"),
        ({"max_error": 0.1}, "a drop of top1 up to 0.005 and a deviation up to 0.1 of the range;"),
        ({"calibration_samples": 0}, "judged by 872 samples"),
    ],
)
def test_what_was_wanted_in_words(search: SearchReport, changes: dict[str, object], words: str) -> None:
    assert words in summary.searched(dataclasses.replace(search, **changes)) + ";"  # type: ignore[arg-type]


def test_the_page_has_the_picture_the_table_and_the_layers(make: Make) -> None:
    page = to_html(make(search={}))
    assert 'class="pareto"' in page
    assert "4-bit &lt;b&gt;blocks&lt;/b&gt;" in page
    assert "static int8, 2 layers in float: which layers, and why" in page
    assert "It costs much." in page or "it costs much." in page


def test_the_picture_places_by_latency_and_loss_and_sizes_by_size(search: SearchReport) -> None:
    found = discs(search)
    assert len(found) == 5, "what failed has no place"
    winner, over, keep = (found[n] for n in ("static int8, 2 layers in float", "static int8", "keep fp32"))
    assert over[0] < winner[0] < keep[0] < found["dynamic int8"][0]
    assert over[1] < winner[1] < keep[1], "less loss is lower"
    assert winner[2] < keep[2] < found["dynamic int8"][2]
    for x, y, _ in found.values():
        assert 0 < x < 760
        assert 0 < y < 340


def test_the_picture_says_what_it_shows(search: SearchReport) -> None:
    drawn = picture(search)
    assert drawn.attrib["role"] == "img"
    assert drawn.attrib["aria-label"] == "Latency and drop of top1 of 5 candidates"
    titles = [t.text or "" for t in drawn.iter("title")]
    assert "static int8: 3.33x, 555 kB, 0.02 (-0.02 to 0.04), over budget" in titles


def test_the_front_holds_what_no_other_beats_in_both(search: SearchReport) -> None:
    front = [d.candidate.name for d in pareto.front(pareto._dots(search.candidates))]
    assert front == ["static int8", "static int8, 2 layers in float", "keep fp32"]


@pytest.mark.parametrize("limit", [None, 0.0, math.inf, 1e-9, 10.0])
def test_any_budget_and_any_loss_can_be_drawn(search: SearchReport, limit: float | None) -> None:
    changed = dataclasses.replace(search, max_drop=limit)
    assert discs(changed)
    alike = tuple(dataclasses.replace(c, metric=None, worst=0.0) for c in search.candidates)
    assert discs(dataclasses.replace(changed, candidates=alike))


def test_one_candidate_alone_makes_no_picture(search: SearchReport) -> None:
    assert pareto.picture(dataclasses.replace(search, candidates=search.candidates[:1])) is None


@pytest.mark.parametrize("count", [2, 9, 40])
def test_names_stand_below_each_other_within_the_picture(search: SearchReport, count: int) -> None:
    crowd = tuple(
        dataclasses.replace(search.candidates[2], name=f"candidate {i}", ratio=0.3 + 0.001 * i) for i in range(count)
    )
    drawn = picture(dataclasses.replace(search, candidates=crowd))
    places = sorted(float(t.attrib["y"]) for t in drawn.iter("text") if (t.text or "").startswith("candidate "))
    assert len(places) == count
    assert places[0] > 0
    assert places[-1] < 340
    assert min(b - a for a, b in itertools.pairwise(places)) > (10 if count < 10 else 5)


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=30).map(sorted), st.floats(0.1, 20))
def test_places_are_spread_in_order_between_the_ends(places: list[float], gap: float) -> None:
    found = names.spread(places, gap, 0.0, 100.0)
    narrow = min(gap, 100 / max(len(places) - 1, 1)) - 1e-9
    assert all(b - a >= narrow for a, b in itertools.pairwise(found))
    assert found[0] >= -1e-9
    assert found[-1] <= 100 + 1e-9
