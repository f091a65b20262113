"""The report as one self-contained page: no scripts, nothing loaded, dark or light as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from onnxopt.report import alone, charts, pareto, removals, summary, tradeoff, words
from onnxopt.report.markup import Html, joined, tag
from onnxopt.report.page import page, section
from onnxopt.report.terminal import environment_line

if TYPE_CHECKING:
    from onnxopt.compare.tally import OutputDeviation
    from onnxopt.compare.verdict import Verification
    from onnxopt.contract import PassReport, Site
    from onnxopt.removed import Removed
    from onnxopt.report.data import Candidate, Comparison, Report, SearchReport

EDITS = 500
"""Edits listed per pass; the JSON report has all."""

OUTPUTS = 40
"""Outputs drawn and listed, the worst of them."""

LAYERS = 6
"""Layers named of a group that was removed."""


def to_html(report: Report) -> str:
    """Return a report as a page."""
    parts = filter(None, (_top(report), *_sections(report), _footer(report)))
    return page(f"{summary.title(report)} - onnxopt report", *parts)


def _top(report: Report) -> Html:
    recipe = "custom pipeline" if report.recipe == "custom" else f"recipe {report.recipe}"
    warnings = [
        tag("p", w, class_="warning failed" if w.startswith("FAILED") else "warning") for w in summary.warnings(report)
    ]
    return tag(
        "header",
        tag("p", f"onnxopt report, {recipe}, target {report.target}", class_="kicker"),
        tag("h1", summary.title(report)),
        *warnings,
        tag("div", *_tiles(report), class_="tiles"),
        tag("p", "Pipeline: ", tag("code", report.pipeline.replace(",", ", ")), class_="dim"),
        tag("p", f"Written to {report.output}" if report.output else "Not written to a file", class_="dim"),
    )


def _tiles(report: Report) -> Iterable[Html]:
    """Yield the four figures a reader looks for first."""
    before, after = report.before, report.after
    yield _tile("Nodes", f"{after.nodes:,}", f"of {before.nodes:,}; {words.count(report.applied, 'edit')}")
    size = words.change(before.bytes, after.bytes)
    size = size if before.bytes == after.bytes else f"{size} from {words.size(before.bytes)}"
    yield _tile(
        "File size",
        words.size(after.bytes),
        size,
    )
    yield _verified_tile(report)
    measurement = report.measurement
    if measurement is None:
        yield _tile("Speed", "not measured", "", "warn")
    elif measurement.verdict == "no difference shown":
        low, high = 1 / measurement.high, 1 / measurement.low
        yield _tile("Speed", "no difference", f"{low:.2f}x to {high:.2f}x at 95%")
    else:
        faster = measurement.verdict == "faster"
        text = summary.speed(measurement).partition(" (")
        yield _tile("Speed", text[0], text[2].rstrip(")"), "good" if faster else "bad")


def _verified_tile(report: Report) -> Html:
    verification = report.verification
    if verification is None:
        return _tile("Outputs", "not verified", "", "warn")
    if not verification.ok:
        return _tile("Outputs", "failed", f"worst deviation {words.deviation(verification.worst)}", "bad")
    worst = words.deviation(verification.worst)
    how = f"worst deviation {worst} of the range" if verification.worst else "equal"
    if summary.is_off_target(report):
        return _tile("Outputs", f"not verified on {report.target}", f"only on the cpu: {how}", "warn")
    return _tile("Outputs", "verified", how, "good")


def _tile(label: str, figure: str, detail: str, style: str = "") -> Html:
    return tag(
        "div",
        tag("div", label, class_="tile-label"),
        tag("div", figure, class_="figure"),
        tag("div", detail, class_="dim"),
        class_=f"tile {style}".strip(),
    )


def _sections(report: Report) -> Iterable[Html]:
    yield section("Result against original", charts.ratio_chart(_bars(report)), _comparison(report))
    if report.search is not None:
        yield section("Search", *_search(report.search))
    removed = list(removals.tables(report.passes))
    if removed:
        yield section("Widths", *_widths([line.removed for table in removed for line in table.lines]))
    for table in removed:
        yield section("Removed", *_removed(table, report))
    if report.alone is not None:
        yield section(alone.TITLE, *_alone(report.alone))
    if report.verification is not None:
        yield section("Outputs", *_outputs(report.verification, report.data))
    if report.passes:
        yield section("Passes", *_passes(report))
    notes = summary.notes(report)
    if notes:
        yield section("Notes", tag("ul", *(tag("li", n) for n in notes)))
    if report.seconds:
        spans = [charts.Span(s, t, words.duration(t), "stage") for s, t in report.seconds]
        yield section("Where the time went", charts.timeline(spans))


def _bars(report: Report) -> list[charts.Bar]:
    before, after, measurement = report.before, report.after, report.measurement
    pairs = [
        ("Nodes", before.nodes, after.nodes),
        ("Parameters", before.parameters, after.parameters),
        ("File size", before.bytes, after.bytes),
    ]
    bars = [charts.Bar(label, b / a, f"{b / a:.1%}") for label, a, b in pairs if a]
    if measurement is None:
        return bars
    ratio, low, high = measurement.ratio, measurement.low, measurement.high
    bars.append(charts.Bar("Latency", ratio, f"{ratio:.1%} ({low:.1%} to {high:.1%})", low, high))
    costs = [
        ("Load time", measurement.baseline_load_ms, measurement.candidate_load_ms),
        ("Peak memory", measurement.baseline_peak_mb, measurement.candidate_peak_mb),
    ]
    bars += [charts.Bar(label, b / a, f"{b / a:.1%}", certain=False) for label, a, b in costs if a and b is not None]
    return bars


def _comparison(report: Report) -> Html:
    rows = [
        tag(
            "tr",
            tag("th", r.label, scope="row"),
            *(tag("td", c, class_="number") for c in (r.before, r.after)),
            tag("td", r.change),
        )
        for r in summary.rows(report)
    ]
    return _table(("", "original", "result", "change"), rows, numbers=(1, 2))


def _table(titles: Sequence[str], rows: Iterable[Html], numbers: Sequence[int] = ()) -> Html:
    heads = (tag("th", t, scope="col", class_="number" if i in numbers else "") for i, t in enumerate(titles))
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows)), class_="scroll")


def _outputs(verification: Verification, data: str) -> Iterable[Html]:
    yield tag("p", f"{summary.compared(verification, data).capitalize()}.", class_="dim")
    shown, rest = summary.shown_outputs(verification, OUTPUTS)
    if shown:
        yield charts.deviation_chart([_point(o) for o in shown])
        yield tag(
            "p",
            "Deviation relative to the output's range, on a logarithmic scale. Shaded: allowed.",
            class_="dim caption",
        )
        titles = ("output", "kind", "max abs", "of range", "allowed", "cosine", "first difference", "")
        yield _table(titles, [_output_row(o) for o in shown], numbers=(2, 3, 4, 5))
    if rest:
        yield tag("p", f"And {words.count(rest, 'output')} that deviate less.", class_="dim")
    remarks = [f"{o.name}: {o.note}" for o in shown if o.note] + list(verification.notes)
    if remarks:
        yield tag("ul", *(tag("li", words.sentence(r)) for r in remarks))


def _point(output: OutputDeviation) -> charts.Point:
    allowed = "any" if output.tolerance == float("inf") else words.deviation(output.tolerance)
    text = f"{words.deviation(output.relative)} of {allowed}" if allowed != "any" else words.deviation(output.relative)
    return charts.Point(output.name, output.relative, output.tolerance, output.ok, text)


def _output_row(output: OutputDeviation) -> Html:
    numbers = (
        words.deviation(output.max_abs),
        words.deviation(output.relative),
        "any" if output.tolerance == float("inf") else words.deviation(output.tolerance),
        "-" if output.cosine is None else f"{output.cosine:.6f}",
    )
    first = "-" if output.first_index is None else f"[{', '.join(str(i) for i in output.first_index)}]"
    return tag(
        "tr",
        tag("th", output.name, scope="row", class_="name"),
        tag("td", output.kind, class_="first"),
        *(tag("td", n, class_="number") for n in numbers),
        tag("td", first, class_="first"),
        tag("td", "ok" if output.ok else "differs", class_="good" if output.ok else "bad"),
    )


def _widths(removed: Sequence[Removed]) -> Iterable[Html]:
    """Draw what is left of the groups that became narrower, and of the layers of blocks that are left out."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for each in removed:
        left_out: list[tuple[str, int, int]] = [(w.layer, w.before, w.after) for w in each.widths if not w.after]
        for name, before, after in left_out or [(each.name, each.units.before, each.units.after)]:
            first.setdefault(name, before)
            last[name] = after
    bars = [
        charts.Bar(words.printable(name), after / first[name], f"{first[name]:,} -> {after:,}")
        for name, after in last.items()
        if first[name]
    ]
    yield charts.ratio_chart(bars[:EDITS])
    if len(bars) > EDITS:
        yield tag("p", f"And {len(bars) - EDITS:,} more layers; the JSON report has all.", class_="dim")


def _removed(table: removals.Table, report: Report) -> Iterable[Html]:
    """Tell what a pass removed, group by group, and whether that is what was asked for."""
    yield tag("p", tag("code", table.spec))
    for text in removals.sentences(table, report):
        yield tag("p", text)
    picture = tradeoff.picture(table)
    if picture:
        yield picture
    titles = ("group", "units", "parameters", "multiply-adds", "expected", "measured", "layers")
    yield _table(titles, [_removed_row(line) for line in table.lines[:EDITS]], numbers=(1, 2, 3, 4, 5))
    if len(table.lines) > EDITS:
        yield tag("p", f"And {len(table.lines) - EDITS:,} more groups; the JSON report has all.", class_="dim")
    for text in table.legend:
        yield tag("p", text, class_="dim caption")


def _removed_row(line: removals.Line) -> Html:
    name, units, *shares, expected, measured = line.cells
    changes = (line.removed.parameters, line.removed.macs)
    layers = [tag("div", f"{w.layer} {w.side}: {w.before:,} -> {w.after:,}") for w in line.removed.widths[:LAYERS]]
    if len(line.removed.widths) > LAYERS:
        layers.append(tag("div", f"and {len(line.removed.widths) - LAYERS:,} more"))
    return tag(
        "tr",
        tag("th", name, scope="row", class_="name"),
        tag("td", joined((units, tag("div", line.removed.unit, class_="dim"))), class_="number"),
        *(
            tag("td", joined((share, tag("div", f"{-change.gone:+,}", class_="dim"))), class_="number")
            for share, change in zip(shares, changes, strict=True)
        ),
        *(tag("td", cell, class_="number") for cell in (expected, measured)),
        tag("td", *layers, class_="name dim"),
    )


def _alone(comparison: Comparison) -> Iterable[Html]:
    """List a pruned result and what it was compared with, and say which is to be recommended."""
    rows = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", cell, class_="number") for cell in cells))
        for name, *cells in alone.lines(comparison)
    ]
    if rows:
        yield _table(alone.titles(comparison), rows, numbers=(1, 2, 3))
    for text in alone.sentences(comparison):
        yield tag("p", text)


def _search(search: SearchReport) -> Iterable[Html]:
    yield tag("p", f"{summary.searched(search)}.", class_="dim")
    picture = pareto.picture(search)
    if picture:
        yield picture
    titles = ("candidate", "speed", "size", summary.quality_title(search), "", "why")
    yield _table(titles, [_candidate_row(c) for c in search.candidates], numbers=(1, 2, 3))
    for candidate in search.candidates:
        if candidate.in_float:
            rows = [
                tag(
                    "tr",
                    tag("td", joined((layer.output, tag("div", layer.graph, class_="dim"))), class_="name"),
                    tag("td", words.sentence(layer.reason)),
                )
                for layer in candidate.in_float[:EDITS]
            ]
            title = f"{candidate.name}: which layers, and why"
            yield tag("details", tag("summary", title), _table(("layer", "why it is left in float"), rows))


_CANDIDATE_STYLE = {"winner": "good", "over budget": "bad", "failed": "bad"}


def _candidate_row(candidate: Candidate) -> Html:
    speed, size, quality = summary.candidate_cells(candidate)
    return tag(
        "tr",
        tag(
            "th", joined((candidate.name, tag("div", candidate.pipeline.replace(",", ", "), class_="dim"))), scope="row"
        ),
        *(tag("td", cell, class_="number") for cell in (speed, size, quality)),
        tag("td", candidate.status, class_=f"first {_CANDIDATE_STYLE.get(candidate.status, '')}".strip()),
        tag("td", words.sentence(candidate.reason)),
    )


def _passes(report: Report) -> Iterable[Html]:
    spans = [charts.Span(p.name, p.seconds, words.duration(p.seconds), f"pass-{p.status}") for p in report.passes]
    if spans:
        yield charts.timeline(spans)
    for done in report.passes:
        yield _pass(done, report)


def _pass(done: PassReport, report: Report) -> Html:
    line = (
        tag("span", done.status, class_=f"status pass-{done.status}"),
        tag("code", done.spec),
        tag("span", summary.outcome(done, report.slow_passes), class_="outcome"),
        tag("span", words.duration(done.seconds), class_="dim time"),
    )
    details = _details(done)
    if not details:
        return tag("div", *line, class_="pass")
    if done.dropped:
        return tag("details", tag("summary", *line), *details, class_="pass", open="open")
    return tag("details", tag("summary", *line), *details, class_="pass")


def _details(done: PassReport) -> list[Html]:
    found = []
    if done.dropped:
        rows = [
            tag("tr", _where(e.site), tag("td", e.summary), tag("td", words.sentence(e.reason), class_="bad"))
            for e in done.dropped[:EDITS]
        ]
        found.append(_table(("dropped at", "edit", "why"), rows))
    if done.applied:
        rows = [tag("tr", _where(e.site), tag("td", e.summary)) for e in done.applied[:EDITS]]
        found.append(_table(("applied at", "edit"), rows))
    rest = max(0, len(done.applied) - EDITS) + max(0, len(done.dropped) - EDITS)
    if rest:
        found.append(tag("p", f"And {rest:,} more; the JSON report has all.", class_="dim"))
    if done.refusals:
        rows = [tag("tr", tag("td", f"{n:,}", class_="number"), tag("td", words.sentence(r))) for r, n in done.refusals]
        found.append(_table(("times", "near miss, left alone because"), rows, numbers=(0,)))
    return found


def _where(site: Site) -> Html:
    inside = [tag("div", f"in {site.graph}", class_="dim")] if site.graph else []
    return tag("td", joined((site.output, *inside)), class_="name")


def _footer(report: Report) -> Html:
    lines = [environment_line(report.environment)]
    if report.measurement is not None:
        lines.append(summary.placed(report.measurement))
    return tag("footer", *(tag("p", line) for line in lines if line))
