"""What is told about a new head: text for the terminal, one page with a picture, JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxopt.report import curve, words
from onnxopt.report.json import dump, plain
from onnxopt.report.markup import Html, joined, tag
from onnxopt.report.page import section, short_page

if TYPE_CHECKING:
    from onnxopt.probe.validation import Accuracy, Step

_BAR = 30


@dataclasses.dataclass(frozen=True, slots=True)
class MethodScore:
    """What a method reaches in cross-validation."""

    method: str
    accuracy: Accuracy
    log_loss: float


@dataclasses.dataclass(frozen=True, slots=True)
class Confusion:
    """How often one class was taken for another: `count` of `total` samples."""

    true: str
    taken: str
    count: int
    total: int


@dataclasses.dataclass(frozen=True, slots=True)
class HeadReport:
    """How a new head was made and what it reaches.

    Attributes:
        model: Where the model came from.
        output: Where the result was written; empty when it was not.
        features: The value that the classifier takes.
        dimensions: How many features a sample has.
        replaces: Operator of the old head; empty when a head was appended.
        scores: The output that holds the new scores.
        activation: "Softmax", "LogSoftmax" or "": what they are.
        classes: Names of the classes, in the order of the scores.
        per_class: Samples of each.
        data: Where the samples came from.
        samples: How many there are.
        folds: Of the cross-validation.
        methods: What was tried, the chosen one first.
        penalty: L2 penalty of the chosen one.
        majority: Accuracy of always answering the most frequent class.
        confusions: The most frequent ones in cross-validation, the worst first.
        curve: Accuracy against labelled samples per class.
        test: Where the test samples came from; empty without.
        test_accuracy: What the written model reaches on them.
        checked: Samples on which the written model was compared with the fitted classifier.
        deviation: The worst difference, as a part of the range of the scores.
        notes: What else there is to know, each a sentence.
        seconds: How long all of it took.
    """

    model: str
    output: str
    features: str
    dimensions: int
    replaces: str
    scores: str
    activation: str
    classes: tuple[str, ...]
    per_class: tuple[int, ...]
    data: str
    samples: int
    folds: int
    methods: tuple[MethodScore, ...]
    penalty: float
    majority: float
    confusions: tuple[Confusion, ...]
    curve: tuple[Step, ...]
    test: str
    test_accuracy: Accuracy | None
    checked: int
    deviation: float
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        """Return the report as text."""
        return to_text(self)


def percent(accuracy: Accuracy) -> str:
    """Return e.g. "91.2% (89.0% to 93.1%)"."""
    low, high = accuracy.interval
    return f"{accuracy.share:.1%} ({low:.1%} to {high:.1%})"


def headline(report: HeadReport) -> str:
    """Return the result in one sentence."""
    best = report.methods[0]
    return (
        f"{words.count(len(report.classes), 'class', 'classes')}, {percent(best.accuracy)} right in "
        f"{report.folds}-fold cross-validation of {words.count(report.samples, 'sample')}"
    )


def lines(report: HeadReport) -> Iterable[tuple[str, str]]:
    """Yield what there is to say, as (title, text)."""
    yield "features", f"{words.printable(report.features)}, {report.dimensions:,} of them"
    where = f"in the place of {report.replaces}" if report.replaces else "appended"
    kind = {"Softmax": "probabilities", "LogSoftmax": "log-probabilities"}.get(report.activation, "scores")
    yield "head", f"{where}; the output {words.printable(report.scores)} holds {kind}"
    yield "classes", _classes(report)
    chosen, others = report.methods[0], report.methods[1:]
    text = f"{chosen.method}, penalty {report.penalty:.3g}, log-loss {chosen.log_loss:.3f}"
    text += "".join(f"; {m.method} had {m.accuracy.share:.1%}, log-loss {m.log_loss:.3f}" for m in others)
    yield "method", text
    yield "guessing", f"always the most frequent class: {report.majority:.1%}"
    if report.test_accuracy is not None:
        yield "test", f"{percent(report.test_accuracy)} of {report.test_accuracy.samples:,} samples of {report.test}"
    yield (
        "verified",
        f"the model gives what the classifier does on {words.count(report.checked, 'sample')}, within "
        f"{words.deviation(report.deviation)} of the range",
    )


def _classes(report: HeadReport) -> str:
    shown = [f"{words.printable(c)} ({n})" for c, n in zip(report.classes, report.per_class, strict=True)][:12]
    more = len(report.classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def render(report: HeadReport, console: Console) -> None:
    """Print the report."""
    console.print(Text(headline(report) + ".", style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for title, text in lines(report):
        table.add_row(Text(f"  {title}", style="dim"), Text(text))
    console.print(table)
    if report.confusions:
        _heading("Taken for another class most often", console)
        for c in report.confusions:
            console.print(Text(f"  {words.printable(c.true)} for {words.printable(c.taken)}: {c.count} of {c.total}"))
    if report.curve:
        _heading("Accuracy against labelled samples per class (mean; 90% of draws)", console)
        for step in report.curve:
            bar = "#" * round(_BAR * step.mean)
            console.print(Text(f"  {step.per_class:5}  {step.mean:6.1%}  {step.low:6.1%} to {step.high:6.1%}  {bar}"))
    if report.notes:
        _heading("Notes", console)
        for note in report.notes:
            console.print(Text(f"  {words.sentence(words.printable(note))}"))
    console.print(Text(f"\nTook {words.duration(report.seconds)}", style="dim"))


def _heading(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold cyan"))


def to_text(report: HeadReport, *, width: int = 100) -> str:
    """Return the report as plain text."""
    console = Console(width=width, color_system=None, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        render(report, console)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def to_json(report: HeadReport) -> str:
    """Return the report as JSON."""
    return dump(plain(report) | {"headline": headline(report)})


def to_html(report: HeadReport) -> str:
    """Return the report as a page of its own."""
    rows = [tag("tr", tag("th", title, scope="row"), tag("td", text)) for title, text in lines(report)]
    sections = [section("Result", tag("table", tag("tbody", *rows)))]
    if report.curve:
        caption = "Mean accuracy on samples that were left out; shaded: 90% of the draws of labelled samples."
        picture = curve.picture([curve.Line("head", report.curve, "better")], guessing=report.majority)
        sections.insert(0, section("Accuracy against labelled samples per class", picture, _caption(caption)))
    if report.confusions:
        sections.append(section("Taken for another class most often", _confusions(report.confusions)))
    if report.notes:
        sections.append(section("Notes", tag("ul", *(tag("li", words.sentence(n)) for n in report.notes))))
    return short_page(f"New head of {report.model}", headline(report) + ".", sections)


def _caption(text: str) -> Html:
    return tag("p", text, class_="dim caption")


def _confusions(found: Sequence[Confusion]) -> Html:
    rows = (
        tag(
            "tr",
            tag("td", f"{c.true} for {c.taken}"),
            tag("td", f"{c.count} of {c.total}", class_="number"),
        )
        for c in found
    )
    return tag("table", tag("tbody", joined(rows)))
