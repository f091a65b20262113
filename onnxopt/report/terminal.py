"""The report as a person reads it on a terminal, or in a log when it is piped."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxopt.report import alone, removals, summary, words

if TYPE_CHECKING:
    from onnxopt.compare.tally import OutputDeviation
    from onnxopt.compare.verdict import Verification
    from onnxopt.contract import AppliedEdit, DroppedEdit, PassReport, Site
    from onnxopt.report.data import Candidate, Comparison, Environment, Report, SearchReport

SITES = 2
"""Edits listed per pass unless all are asked for."""

OUTPUTS = 8
"""Outputs listed unless all are asked for."""

GROUPS = 8
"""Groups that were removed listed per pass unless all are asked for."""

NAME = 12
"""Columns that the name of a group gets at least."""

PLAIN_WIDTH = 100
"""Columns of the report as a string."""

IDLE = 3
"""From so many on, passes that found nothing are named together."""

_STATUS_STYLE = {"kept": "green", "dropped": "bold red", "skipped": "yellow", "unchanged": "dim"}
_CANDIDATE_STYLE = {
    "winner": "bold green",
    "kept": "",
    "over budget": "red",
    "not proven": "yellow",
    "slower": "yellow",
    "not tried": "dim",
    "not applicable": "dim",
    "failed": "red",
}
_INDENT = 4
_STATUS = 11


def render(report: Report, console: Console, verbose: bool = False) -> None:
    """Print a report.

    Args:
        report: The report.
        console: Where it is printed; colours and width are the console's.
        verbose: List every edit, near miss and output.
    """
    _headline(report, console)
    if report.search is not None:
        _search(report.search, console, verbose=verbose)
    if report.passes:
        _passes(report, console, verbose=verbose)
    _removed(report, console, verbose=verbose)
    _comparison(report, console)
    if report.alone is not None:
        _alone(report.alone, console)
    if report.verification is not None and report.verification.outputs:
        outputs(report.verification, console, data=report.data, verbose=verbose)
    _notes(report, console)
    _footer(report, console)


def to_text(report: Report, *, width: int = PLAIN_WIDTH, verbose: bool = False) -> str:
    """Return a report as plain text."""
    stream = io.StringIO()
    render(report, Console(file=stream, width=width, color_system=None, legacy_windows=False), verbose)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _headline(report: Report, console: Console) -> None:
    lines = [""]
    for part in summary.headline_parts(report):
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        if len(joined) < console.width or not lines[-1]:
            lines[-1] = joined
        else:
            lines[-1] += ","
            lines.append(part)
    console.print(Text("\n".join(lines), style="bold"))
    for warning in summary.warnings(report):
        failed = warning.startswith("FAILED")
        console.print(Text(warning, style="bold white on red" if failed else "bold yellow"))


def _heading(text: str, console: Console, aside: str = "") -> None:
    console.print()
    console.print(Text.assemble((text, "bold cyan"), (f"  {aside}" if aside else "", "dim")))


def _search(search: SearchReport, console: Console, *, verbose: bool) -> None:
    """List what was tried; the reasons stand below the table."""
    _heading("Search", console)
    console.print(Padding(Text(f"{summary.searched(search)}.", style="dim"), (0, 0, 0, 2)))
    table = _table()
    table.add_column("candidate", ratio=1, overflow="fold")
    for title in ("speed", "size", summary.quality_title(search)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for candidate in search.candidates:
        style = _CANDIDATE_STYLE[candidate.status]
        name = Text(words.printable(candidate.name), style="bold" if candidate.status == "winner" else "")
        cells = (Text(cell) for cell in summary.candidate_cells(candidate))
        table.add_row(name, *cells, Text(candidate.status, style=style))
    console.print(Padding(table, (0, 0, 0, 1)))
    told = [c for c in search.candidates if verbose or c.status != "kept" or c.in_float]
    for alike in [[c] for c in told] if verbose else summary.alike(told):
        _candidates(alike, console, verbose=verbose)


def _candidates(alike: Sequence[Candidate], console: Console, *, verbose: bool) -> None:
    """Say what became of candidates that have the same to be said of them, and which layers they leave alone."""
    candidate = alike[0]
    names = "; ".join(words.printable(c.name) for c in alike)
    text = Text(f"{names}: ", style=_CANDIDATE_STYLE[candidate.status])
    text.append(words.sentence(candidate.reason), style="default not bold")
    console.print(Padding(text, (0, 0, 0, 2)))
    if candidate.pipeline and verbose:
        console.print(Padding(Text(words.printable(candidate.pipeline), style="dim"), (0, 0, 0, _INDENT)))
    if not candidate.in_float:
        return
    if not verbose:
        named = summary.float_layers(candidate.in_float, 2 * SITES)
        console.print(Padding(Text(f"in float: {named}", style="dim"), (0, 0, 0, _INDENT)))
        return
    for layer in candidate.in_float:
        line = f"{words.printable(layer.output)}: {words.sentence(layer.reason)}"
        console.print(Padding(Text(line, style="dim"), (0, 0, 0, _INDENT)))


def _passes(report: Report, console: Console, *, verbose: bool) -> None:
    recipe = "pipeline" if report.recipe == "custom" else f"recipe {words.printable(report.recipe)}"
    _heading("Passes", console, f"{recipe}, target {report.target}")
    idle = [] if verbose else [p for p in report.passes if p.status == "unchanged" and not p.refusals]
    if len(idle) < IDLE:
        idle = []
    active = [p for p in report.passes if p not in idle]
    names = min(max((len(p.name) for p in active), default=0), 34)
    for done in active:
        _pass_line(done, summary.outcome(done, report.slow_passes), names, console)
        _edits(done, console, verbose=verbose)
        _dropped(done, console, verbose=verbose)
        if verbose:
            _near_misses(done, console)
    if idle:
        _idle_line(idle, console)
    missed = [p.spec for p in report.passes if p.refusals]
    if missed:
        model = shlex.quote(words.printable(report.model)) if report.model else "MODEL"
        passes = shlex.quote(words.printable(missed[0])) if len(missed) == 1 else "PASS"
        why = "" if verbose else "Why near misses were left alone: --verbose. "
        hint = f"{why}Where: onnxopt explain {model} -p {passes}"
        console.print(Padding(Text(hint, style="dim"), (0, 0, 0, 2)))


def _idle_line(idle: list[PassReport], console: Console) -> None:
    """Name the passes that found nothing in one paragraph instead of a line each."""
    listed = ", ".join(dict.fromkeys(words.printable(p.name) for p in idle))
    seconds = words.duration(sum(p.seconds for p in idle))
    console.print(Text("  unchanged", style=_STATUS_STYLE["unchanged"]))
    text = Text(f"nothing to do in {seconds}: {listed}", style="dim")
    console.print(Padding(text, (0, 0, 0, 4)))


def _pass_line(done: PassReport, outcome: str, names: int, console: Console) -> None:
    """Print status, name, outcome and time of one pass; an outcome that is too long goes below."""
    style = _STATUS_STYLE[done.status]
    seconds = words.duration(done.seconds)
    fits = len(outcome) <= console.width - (_STATUS + 2 + names + 2 + 2 + len(seconds))
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    line.add_column(width=_STATUS, no_wrap=True)
    line.add_column(width=names, overflow="fold")
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(
        Text(f"  {done.status}", style=style),
        Text(words.printable(done.name), style="bold" if done.status == "kept" else ""),
        Text(outcome if fits else "", style=style if done.status != "kept" else ""),
        Text(seconds, style="dim"),
    )
    console.print(line)
    if not fits:
        console.print(Padding(Text(outcome, style=style), (0, 0, 0, _INDENT)))


def _edits(done: PassReport, console: Console, *, verbose: bool) -> None:
    shown = done.applied if verbose else done.applied[:SITES]
    _sites([(e.site, e.summary) for e in shown], console, verbose=verbose)
    _more(done.applied, len(shown), console)


def _dropped(done: PassReport, console: Console, *, verbose: bool) -> None:
    shown = done.dropped if verbose else done.dropped[: 2 * SITES]
    for edit in shown:
        output = edit.site.output
        name = words.printable(output) if verbose else words.fold(output, console.width - _INDENT - 9)
        text = Text("dropped ", style="bold red").append(name, style="red not bold")
        if edit.site.graph:
            text.append(f" (in {words.printable(edit.site.graph)})", style="red not bold")
        console.print(Padding(text, (0, 0, 0, _INDENT)))
        for line in filter(None, (edit.summary, edit.reason)):
            console.print(Padding(Text(words.sentence(line), style="red"), (0, 0, 0, _INDENT + 8)))
    _more(done.dropped, len(shown), console)


def _more(edits: Sequence[AppliedEdit | DroppedEdit], shown: int, console: Console) -> None:
    rest = len(edits) - shown
    if rest > 0:
        console.print(Padding(Text(f"and {rest:,} more (--verbose lists them)", style="dim"), (0, 0, 0, _INDENT)))


def _near_misses(done: PassReport, console: Console) -> None:
    for reason, times in done.refusals:
        text = Text(f"near miss, {words.count(times, 'time')}: {words.sentence(reason)}", style="dim")
        console.print(Padding(text, (0, 0, 0, _INDENT)))


def _sites(rows: Sequence[tuple[Site, str]], console: Console, *, verbose: bool) -> None:
    """List sites with a text each; long names are folded in the middle, or over lines when all is wanted."""
    if not rows:
        return
    space = console.width - _INDENT - 2
    width = min(max(len(words.printable(s.output)) for s, _ in rows), space * 9 // 20)
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=width, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for site, text in rows:
        name, done = words.printable(site.output), words.printable(text)
        if not verbose:
            name, done = words.fold(name, width), words.fold_words(done, space - width)
        inside = f" (in {words.printable(site.graph)})" if site.graph else ""
        table.add_row(Text(name, style="cyan"), Text(done).append(inside, style="dim"))
    console.print(Padding(table, (0, 0, 0, _INDENT)))


def _removed(report: Report, console: Console, *, verbose: bool) -> None:
    """List what was removed, group by group, and whether that is what was asked for."""
    for removed in removals.tables(report.passes):
        _heading("Removed", console, words.printable(removed.spec))
        shown = list(removed.lines) if verbose else removed.largest(GROUPS)
        table = _removed_table(shown, console, verbose=verbose)
        console.print(Padding(table, (0, 0, 0, 1)))
        rest = len(removed.lines) - len(shown)
        if rest:
            text = f"and {words.count(rest, 'group')} that save less (--verbose lists them)"
            console.print(Padding(Text(text, style="dim"), (0, 0, 0, _INDENT)))
        for text in removals.sentences(removed, report):
            console.print(Padding(Text(text), (0, 0, 0, 2)))
        for text in removed.legend:
            console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2)))


def _removed_table(lines: Sequence[removals.Line], console: Console, *, verbose: bool) -> Table:
    """Lay out groups; some columns make room for names where the terminal is narrow."""
    columns = zip(removals.TITLES, *(line.cells for line in lines), strict=True)
    sizes = [max(map(len, column)) + 3 for column in columns]
    figures = list(range(1, len(sizes)))
    for spared in removals.SPARED:
        if console.width - 3 - sum(sizes[i] for i in figures) < NAME:
            figures.remove(spared)
    room = max(NAME, console.width - 3 - sum(sizes[i] for i in figures))
    table = _table()
    table.add_column(removals.TITLES[0], ratio=1, overflow="fold")
    for index in figures:
        table.add_column(removals.TITLES[index], justify="right", no_wrap=True)
    for line in lines:
        cells = line.cells
        group = Text(cells[0] if verbose else words.fold(cells[0], room), style="cyan")
        if line.removed.unit != "channels":
            group.append(f"\n{words.printable(line.removed.unit)}", style="dim")
        table.add_row(group, *(Text(cells[index]) for index in figures))
    return table


def _comparison(report: Report, console: Console) -> None:
    _heading("Before and after", console)
    rows(summary.rows(report), console)


def rows(compared: Sequence[summary.Row], console: Console, titles: tuple[str, str] = ("original", "result")) -> None:
    """Print a table that compares two models.

    Args:
        compared: Its lines.
        console: Where it is printed.
        titles: What the two models are called.
    """
    table = _table()
    table.add_column("")
    table.add_column(titles[0], justify="right", no_wrap=True)
    table.add_column(titles[1], justify="right", no_wrap=True)
    table.add_column("change", ratio=1)
    for row in compared:
        # as Text, because rich reads markup in strings, and a metric's name may hold some
        table.add_row(Text(row.label), Text(row.before), Text(row.after, style="bold"), Text(row.change))
    console.print(Padding(table, (0, 0, 0, 1)))


def _alone(comparison: Comparison, console: Console) -> None:
    """List a pruned result and what it was compared with, and say which is to be recommended."""
    _heading(alone.TITLE, console)
    found = alone.lines(comparison)
    if found:
        table = _table()
        name, *figures = alone.titles(comparison)
        table.add_column(name, ratio=1, overflow="fold")
        for title in figures:
            table.add_column(title, justify="right", no_wrap=True)
        for line in found:
            table.add_row(*map(Text, line))
        console.print(Padding(table, (0, 0, 0, 1)))
    for text in alone.sentences(comparison):
        console.print(Padding(Text(text), (0, 0, 0, 2)))


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True, expand=True, header_style="dim")


def outputs(verification: Verification, console: Console, *, data: str, verbose: bool = False) -> None:
    """Print how far each output deviates.

    Args:
        verification: The comparison.
        console: Where it is printed.
        data: Where the feeds came from, in words.
        verbose: List all outputs instead of the first few by deviation.
    """
    _heading("Outputs", console, summary.compared(verification, data))
    shown, rest = summary.shown_outputs(verification, len(verification.outputs) if verbose else OUTPUTS)
    if shown:
        console.print(Padding(_outputs_table(shown, console, verbose=verbose), (0, 0, 0, 1)))
    if rest:
        text = f"and {words.count(rest, 'output')} that deviate less (--verbose lists them)"
        console.print(Padding(Text(text, style="dim"), (0, 0, 0, _INDENT)))
    for output in shown:
        for remark in _remarks(output, verbose=verbose):
            name = words.printable(output.name) if verbose else words.fold(output.name, console.width // 2)
            console.print(Padding(Text(f"{name}: {remark}", style="dim"), (0, 0, 0, 2)))
    for note in verification.notes:
        console.print(Padding(Text(words.sentence(note), style="dim"), (0, 0, 0, 2)))


def _outputs_table(shown: Sequence[OutputDeviation], console: Console, *, verbose: bool) -> Table:
    """Lay out the deviations; the kind is shown where not all outputs are floating-point numbers."""
    kinds = any(o.kind != "float" for o in shown)
    width = max(12, console.width - (61 if kinds else 51))  # what the other columns leave
    table = _table()
    table.add_column("output", overflow="fold", ratio=1)
    for label in ("kind", "max abs", "of range", "allowed", "cosine"):
        if label != "kind" or kinds:
            table.add_column(label, justify="left" if label == "kind" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for output in shown:
        name = words.printable(output.name) if verbose else words.fold(output.name, width)
        table.add_row(
            Text(name),
            *([Text(output.kind)] if kinds else []),
            words.deviation(output.max_abs),
            words.deviation(output.relative),
            "any" if output.tolerance == float("inf") else words.deviation(output.tolerance),
            "-" if output.cosine is None else f"{output.cosine:.6f}",
            Text("ok", style="green") if output.ok else Text("differs", style="bold red"),
        )
    return table


def _remarks(output: OutputDeviation, *, verbose: bool) -> Iterator[str]:
    """Yield what the table has no room for."""
    if output.first_index is not None and (verbose or not output.ok):
        place = ", ".join(words.printable(str(i)) for i in output.first_index)
        yield f"first difference at [{place}]."
    if output.note:
        yield words.sentence(output.note)


def _notes(report: Report, console: Console) -> None:
    notes = summary.notes(report)
    if not notes:
        return
    _heading("Notes", console)
    for note in notes:
        console.print(Padding(Text(note), (0, 0, 0, 2)))


def _footer(report: Report, console: Console) -> None:
    console.print()
    stages = ", ".join(f"{stage} {words.duration(seconds)}" for stage, seconds in report.seconds)
    total = words.duration(sum(seconds for _, seconds in report.seconds))
    lines = [environment_line(report.environment), f"Took {total}: {stages}" if stages else ""]
    if report.measurement is not None:
        lines.insert(1, summary.placed(report.measurement))
    for line in filter(None, lines):
        console.print(Text(line, style="dim"))


def environment_line(environment: Environment) -> str:
    """Return where a run took place, on one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions)
    return (
        f"{environment.provider}, {words.count(environment.threads, 'thread')} on {environment.machine}; "
        f"{versions}, Python {environment.python}"
    )
