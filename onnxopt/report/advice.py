"""What is told about ways to transfer a model: text for the terminal, one page with a picture, JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxopt.report import curve, words
from onnxopt.report.head import percent
from onnxopt.report.json import dump, plain
from onnxopt.report.markup import Html, tag
from onnxopt.report.page import section, short_page

if TYPE_CHECKING:
    from onnxopt.advice.shift import Shift
    from onnxopt.advice.verdict import Difference, Verdict, Way
    from onnxopt.probe.validation import Step

_STYLES = {"head": "better", "inputs": "same", "fine-tuning": "stage", "scratch": "worse"}


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy of a way against labelled samples per class."""

    name: str
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """Whether and how to transfer a model.

    Attributes:
        model: Where the model came from.
        data: Where the samples of the new task came from.
        samples: How many there are.
        classes: Names of their classes.
        folds: Of the cross-validation.
        ways: What was tried, the cheapest first.
        differences: Of each way that transfers against the best that does not, on the same folds.
        shift: Whether source and target data differ to the model; None when that was not tested.
        verdict: What to do.
        curves: Accuracy against labelled samples, for the ways without training.
        guessing: Accuracy of always answering the most frequent class.
        notes: What else there is to know, each a sentence.
        seconds: How long all of it took.
    """

    model: str
    data: str
    samples: int
    classes: tuple[str, ...]
    folds: int
    ways: tuple[Way, ...]
    differences: tuple[Difference, ...]
    shift: Shift | None
    verdict: Verdict
    curves: tuple[Curve, ...]
    guessing: float
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        """Return the advice as text."""
        return to_text(self)


def setting(advice: Advice) -> str:
    """Return what was compared on, in words."""
    return (
        f"{words.count(advice.samples, 'sample')} of {words.count(len(advice.classes), 'class', 'classes')}, "
        f"{advice.folds} folds; guessing gives {advice.guessing:.1%}"
    )


def _rows(advice: Advice) -> list[tuple[str, str, str, str, str]]:
    """Return name, accuracy, difference, seconds and description of each way."""
    gained = {d.name: f"{d.mean:+.1%} ({d.low:+.1%} to {d.high:+.1%})" for d in advice.differences}
    return [
        (w.name, percent(w.accuracy), gained.get(w.name, ""), words.duration(w.seconds), w.about) for w in advice.ways
    ]


def _against(advice: Advice) -> str:
    return f"against {advice.differences[0].against}"


def render(advice: Advice, console: Console) -> None:
    """Print the advice."""
    console.print(Text(advice.verdict.sentence, style="bold"))
    console.print(Text(f"  {setting(advice)}\n", style="dim"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("way", "accuracy (95%)", _against(advice), "per fit"):
        table.add_column(title, no_wrap=True)
    # What the ways are stands below, where there is room for it at 80 columns.
    ways = Table.grid(padding=(0, 2, 0, 0))
    for *cells, what in _rows(advice):
        table.add_row(*(Text(cell) for cell in cells))
        ways.add_row(Text(cells[0], style="dim"), Text(what, style="dim"))
    console.print(Padding(table, (0, 0, 1, 2)))
    console.print(Padding(ways, (0, 0, 0, 2)))
    for found in advice.curves:
        console.print()
        console.print(Text(f"Accuracy against labelled samples per class: {found.name}", style="bold cyan"))
        console.print(Text("  " + ", ".join(f"{s.per_class}: {s.mean:.1%}" for s in found.steps)))
    notes = _notes(advice)
    if notes:
        console.print()
        console.print(Text("Notes", style="bold cyan"))
        for note in notes:
            console.print(Text(f"  {words.sentence(words.printable(note))}"))
    console.print(Text(f"\nTook {words.duration(advice.seconds)}", style="dim"))


def _notes(advice: Advice) -> list[str]:
    return [*([advice.shift.sentence()] if advice.shift is not None else []), *advice.notes]


def to_text(advice: Advice, *, width: int = 120) -> str:
    """Return the advice as plain text."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        render(advice, console)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def to_json(advice: Advice) -> str:
    """Return the advice as JSON."""
    return dump(plain(advice))


def to_html(advice: Advice) -> str:
    """Return the advice as a page of its own."""
    titles = ("way", "accuracy (95%)", _against(advice), "per fit", "")
    head = tag("thead", tag("tr", *(tag("th", t, scope="col") for t in titles)))
    rows = (tag("tr", *(tag("td", cell) for cell in row)) for row in _rows(advice))
    sections = [section("Ways compared", tag("table", head, tag("tbody", *rows)))]
    lines = _lines(advice)
    if lines:
        text = "Mean accuracy on samples that were left out. Ways that train are one point, at all samples."
        picture = curve.picture(lines, guessing=advice.guessing)
        caption = tag("p", text, class_="dim caption")
        sections.insert(0, section("Accuracy against labelled samples per class", picture, caption))
    notes = _notes(advice)
    if notes:
        items: list[Html] = [tag("li", words.sentence(n)) for n in notes]
        sections.append(section("Notes", tag("ul", *items)))
    title = f"Transfer of {advice.model}"
    return short_page(title, f"{advice.verdict.sentence} {words.sentence(setting(advice))}", sections)


def _lines(advice: Advice) -> list[curve.Line]:
    """Return the curves, and a point for each way that has none."""
    from onnxopt.probe.validation import Step

    lines = [curve.Line(c.name, c.steps, _STYLES[c.name]) for c in advice.curves if c.steps]
    per_class = max((s.per_class for line in lines for s in line.steps), default=1)
    drawn = {line.label for line in lines}
    for w in advice.ways:
        if w.name not in drawn:
            low, high = w.accuracy.interval
            lines.append(curve.Line(w.name, (Step(per_class, w.accuracy.share, low, high, 1),), _STYLES[w.name]))
    return lines
