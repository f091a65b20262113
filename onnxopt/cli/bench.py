"""`onnxopt bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import options
from onnxopt.cli.output import show
from onnxopt.cli.progress import drawing

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt.measure import Latency, Measurement

_EPILOG = """
\b
Examples:
  onnxopt bench model.onnx
  onnxopt bench model.onnx model.opt.onnx --threads 4
  onnxopt bench model.onnx --shape batch=8 --json
"""


@click.command("bench", epilog=_EPILOG)
@options.model_argument("a")
@options.model_argument("b", required=False)
@options.running_options
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    default=10.0,
    show_default=True,
    help="Time to spend on timing, at most; a few rounds are always timed.",
)
@options.json_option()
def command(a: str, b: str | None, seconds: float, as_json: bool, **running: Any) -> None:
    """Time model A in ONNX Runtime, or compare B with it: in turns, with a confidence interval of the ratio."""
    from onnxopt.cli.running import feeds_of, options_of
    from onnxopt.compare.narrowing import narrowed
    from onnxopt.measure import Measurement, bench, measure
    from onnxopt.model import load

    feeds = feeds_of(load(a) if b is None else narrowed(load(a), load(b)).reference, running)
    with drawing() as progress:
        settings = {
            "feed": None if feeds is None else next(iter(feeds)),
            "options": options_of(running),
            "budget_seconds": seconds,
            "seed": running["seed"],
            "shape": running["shape"],
            "progress": progress,
        }
        found = bench(a, **settings) if b is None else measure(a, b, **settings)
    if as_json:
        from onnxopt.report.json import dump, plain

        click.echo(dump(plain(found)), nl=False)
    elif isinstance(found, Measurement):
        show(lambda console: _comparison(found, console))
    else:
        show(lambda console: _single(found, console))


def _comparison(found: Measurement, console: Console) -> None:
    from rich.text import Text

    from onnxopt.report import summary
    from onnxopt.report.terminal import rows

    console.print(Text(f"B against A: {summary.speed(found)}", style="bold"))
    console.print()
    rows(list(summary.time_rows(found)), console, titles=("A", "B"))
    console.print()
    note = summary.ratio_note(found)
    if note:
        console.print(Text(f"Latencies are medians of all runs; {note}.", style="dim"))
    _footer(found, console)


def _single(found: Latency, console: Console) -> None:
    from rich.text import Text

    from onnxopt.report.words import count, digits, milliseconds

    console.print(
        Text(f"{milliseconds(found.median_ms)} per run, {digits(found.per_second)} runs per second", style="bold")
    )
    console.print(
        f"Median of {count(found.runs, 'run')}; one in ten is faster than {milliseconds(found.p10_ms)}, "
        f"one in ten slower than {milliseconds(found.p90_ms)}"
    )
    console.print(f"Load time {milliseconds(found.load_ms)}")
    if found.peak_mb is not None:
        console.print(f"Peak memory {digits(found.peak_mb)} MB")
    _footer(found, console)


def _footer(found: Latency | Measurement, console: Console) -> None:
    """Print where it ran."""
    from rich.text import Text

    from onnxopt.report import summary
    from onnxopt.report.environment import environment
    from onnxopt.report.terminal import environment_line

    if found.elsewhere:
        console.print(Text(summary.elsewhere(found), style="yellow"))
    where = summary.placement(found)
    if where:
        console.print(Text(f"Ran {where}", style="dim"))
    console.print(Text(environment_line(environment(found.provider, found.threads)), style="dim"))
