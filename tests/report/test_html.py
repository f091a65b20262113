from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from onnxopt.contract import AppliedEdit, DroppedEdit, Site
from onnxopt.removed import Change, Removed, Width
from onnxopt.report import charts
from onnxopt.report.data import Report
from onnxopt.report.html import EDITS, to_html
from onnxopt.report.markup import Html, tag

Make = Callable[..., Report]

ALLOWED = frozenset(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "footer",
        "div",
        "p",
        "h1",
        "h2",
        "ul",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "span",
        "code",
        "svg",
        "rect",
        "line",
        "circle",
        "text",
    ]
)
VOID = frozenset({"meta", "rect", "line", "circle"})


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f" {data}"


def test_the_page_is_well_formed_and_self_contained(report: Report) -> None:
    page = to_html(report)
    parsed = Page(page)
    assert parsed.tags <= ALLOWED
    assert page.startswith("<!doctype html>")
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in parsed.attributes}
    assert "url(" not in page and "@import" not in page and "http" not in page.replace("http-equiv", "")
    assert "default-src &#x27;none&#x27;" in page


@pytest.mark.parametrize(
    "expected",
    [
        "encoder.onnx",
        "1.12x faster",
        "95% interval 1.09 to 1.15",
        "34 edits",
        "/Slice_33_output_0",
        "in If_3.then_branch",
        "output logits deviates by 3.4e-02.",
        "Dropout in training mode.",
        "crashed with ValueError: no.",
        "12 edits taken back",
        "89.3% (87.0% to 91.7%)",
        "ratio 0.893",
        "2.1e-07 of 1.0e-05",
        "[0, 3]",
        "Zeros alone bring no speed in this runtime.",
        "onnxruntime 1.32.0",
    ],
)
def test_what_is_said(report: Report, expected: str) -> None:
    assert expected in " ".join(Page(to_html(report)).text.split())


def test_what_is_missing_is_said(make: Make) -> None:
    text = Page(to_html(make(verification=None, not_verified="no feeds", measurement=None, not_measured="off"))).text
    assert "NOT VERIFIED: no feeds." in text
    assert "NOT MEASURED: off." in text
    assert "not verified" in text and "not measured" in text


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&</title></style>]]>\x1b[2J\u202e"


def removed(name: str, before: int, after: int, unit: str = "channels") -> Removed:
    """What an edit takes out of a group."""
    widths = (Width(name, "outputs", before, after),) * 8
    return Removed(name, unit, Change(before, after), widths, None, Change(900, 450), Change(10, 9), behind=(name,))


def test_names_from_strangers_are_text(make: Make, report: Report, logits: Any) -> None:
    site = Site(EVIL, EVIL, EVIL)
    hostile = dataclasses.replace(
        report.passes[0],
        name=EVIL,
        spec=EVIL,
        reason=EVIL,
        applied=(AppliedEdit(site, EVIL, removed(EVIL, 8, 4, EVIL)),),
        dropped=(DroppedEdit(site, EVIL, EVIL),),
        refusals=((EVIL, 1),),
    )
    skipped = dataclasses.replace(hostile, status="skipped", applied=(), dropped=())
    environment = dataclasses.replace(
        report.environment, versions=((EVIL, EVIL),), python=EVIL, machine=EVIL, provider=EVIL
    )
    page = to_html(
        make(
            model=f"/models/{EVIL}",
            output=EVIL,
            recipe=EVIL,
            pipeline=EVIL,
            target=EVIL,
            data=EVIL,
            notes=(EVIL,),
            environment=environment,
            passes=(hostile, skipped),
            verification={
                "ok": False,
                "reason": EVIL,
                "outputs": (dataclasses.replace(logits, name=EVIL, note=EVIL, kind=EVIL, first_index=(EVIL,)),),
                "notes": (EVIL,),
                "shapes": ((EVIL, (1,)),),
            },
            measurement={"placement": {EVIL: 1}, "elsewhere": (EVIL,), "provider": EVIL},
            metric={"name": EVIL},
            seconds=((EVIL, 1.0),),
        )
    )
    parsed = Page(page)
    assert parsed.tags <= ALLOWED
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "<script" not in page and "<img" not in page
    assert "\x1b" not in page and "\u202e" not in page
    assert "<script>alert(1)</script>" in parsed.text


def test_many_edits_are_cut_with_a_word(make: Make, report: Report) -> None:
    edits = tuple(AppliedEdit(Site("p", "", f"edit_{i}"), "x") for i in range(EDITS + 7))
    page = to_html(make(passes=(dataclasses.replace(report.passes[0], applied=edits),)))
    assert f"edit_{EDITS - 1}<" in page and f"edit_{EDITS}<" not in page
    assert "And 7 more; the JSON report has all." in page


def test_widths_are_drawn_from_the_first_to_the_last_edit(make: Make, report: Report) -> None:
    found = (removed("conv1", 64, 48), removed("conv2", 32, 30), removed("conv1", 48, 32))
    edits = tuple(AppliedEdit(Site("p", "", r.name), "x", r) for r in found)
    page = to_html(make(passes=(dataclasses.replace(report.passes[0], applied=edits),)))
    assert "<h2>Widths</h2>" in page
    assert "conv1: 64 -&gt; 32" in page and "conv2: 32 -&gt; 30" in page


def test_of_a_block_that_is_left_out_the_layers_are_drawn(make: Make, report: Report) -> None:
    widths = (Width("u1", "outputs", 16, 0), Width("v1", "outputs", 8, 0))
    block = dataclasses.replace(removed("a1 to a2", 1, 0, "residual block"), widths=widths)
    edits = (AppliedEdit(Site("p", "", "a2"), "x", block),)
    page = to_html(make(passes=(dataclasses.replace(report.passes[0], applied=edits),)))
    assert "u1: 16 -&gt; 0" in page and "v1: 8 -&gt; 0" in page


def test_each_group_that_was_removed_is_listed_with_its_layers_and_what_it_costs(removals: Report) -> None:
    text = " ".join(Page(to_html(removals)).text.split())
    assert "asked for 85.0% of the time, reached 86.2% (95% interval 84.0% to 88.0%)." in text
    assert "Gone: 80.0% of the channels that could go, 50.0% of the parameters, 20.0% of the multiply-adds." in text
    assert (
        "conv1.weight 64 -> 48 channels -3.2% -32 -20.0% -10,000 2.1% 50.0% -> 3.4% conv1.weight outputs: 64 -> 48"
    ) in text
    assert "attention.weight 12 -> 3 blocks of 16 channels -46.8% -468 <0.1% -10 - -" in text


def test_without_removals_there_is_no_picture_of_widths(make: Make, report: Report, removals: Report) -> None:
    assert "<h2>Widths</h2>" in to_html(removals)
    assert "<h2>Widths</h2>" not in to_html(make(passes=(report.passes[1],)))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7, 1.0, 1e9, math.inf, math.nan])
@pytest.mark.parametrize("allowed", [0.0, 1e-5, math.inf])
def test_every_deviation_can_be_drawn(value: float, allowed: float) -> None:
    page = charts.deviation_chart([charts.Point("x", value, allowed, ok=True, text="t")])
    for position in re.findall(r'(?:cx|x1|x2|x|width)="([^"]+)%"', page):
        assert 0 <= float(position) <= 100


def test_a_larger_deviation_lies_further_right() -> None:
    points = [charts.Point(str(v), v, 1e-3, ok=True, text="") for v in (0.0, 1e-9, 1e-6, 1e-2, math.inf)]
    centres = [float(c) for c in re.findall(r'cx="([^%]+)%"', charts.deviation_chart(points))]
    assert centres == sorted(set(centres))


@pytest.mark.parametrize("ratio", [0.0, 0.001, 1.0, 3.7, 1234.5, math.inf])
def test_every_ratio_can_be_drawn(ratio: float) -> None:
    page = charts.ratio_chart([charts.Bar("x", ratio, "v"), charts.Bar("y", 0.9, "v", 0.8, 1.1)])
    for position in re.findall(r'(?:x1|x2|x|width)="([^"]+)%"', page):
        assert 0 <= float(position) <= 100.01


def test_a_ratio_is_coloured_only_when_its_interval_leaves_out_one() -> None:
    def style(ratio: float, low: float | None = None, high: float | None = None) -> str:
        page = charts.ratio_chart([charts.Bar("x", ratio, "v", low, high)])
        return next(s for s in ("better", "worse", "same") if f'class="{s}"' in page)

    assert style(0.9, 0.8, 0.95) == "better"
    assert style(1.2, 1.1, 1.3) == "worse"
    assert style(0.9, 0.8, 1.1) == "same"
    assert style(1.0) == "same"
    assert 'class="same"' in charts.ratio_chart([charts.Bar("x", 0.5, "v", certain=False)])


def test_a_timeline_puts_one_after_the_other() -> None:
    spans = [charts.Span(str(i), s, "", "stage") for i, s in enumerate((1.0, 0.0, 3.0))]
    rects = re.findall(r'<rect x="([^%]+)%" y="4" width="([^%]+)%"', charts.timeline(spans))
    assert [(float(x), float(w)) for x, w in rects] == [(0, 25), (25, 0.4), (25, 75)]
    assert charts.timeline([charts.Span("x", 0.0, "", "stage")])


def test_markup_escapes_text_but_not_markup() -> None:
    assert tag("p", "<b>", tag("i", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert isinstance(tag("p"), Html)
    assert tag("rect", x=1, class_="a", aria_hidden="true") == '<rect x="1" class="a" aria-hidden="true"/>'
