"""`onnxopt inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING

import click

from onnxopt.cli import options
from onnxopt.cli.output import show
from onnxopt.cli.progress import drawing

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt.analysis.inspect import ModelFacts, ValueFacts
    from onnxopt.contract import Target
    from onnxopt.preview import Preview

_EPILOG = """
\b
Examples:
  onnxopt inspect model.onnx
  onnxopt inspect model.onnx --shape batch=1,seq=128
  onnxopt inspect model.onnx --no-passes --json
"""


@click.command("inspect", epilog=_EPILOG)
@options.model_argument()
@options.shape_option()
@options.target_option()
@click.option(
    "--no-passes",
    "survey",
    flag_value=False,
    default=True,
    help="Leave out what the passes would do, which takes longer.",
)
@options.seed_option()
@options.json_option()
def command(model: str, shape: dict[str, int] | None, target: Target, survey: bool, seed: int, as_json: bool) -> None:
    """Show what MODEL consists of, what one run costs, and what the registered passes would do.

    Every pass is tried by itself, with its default options, on a copy. Nothing is verified, measured or written.
    """
    from onnxopt import preview, runtime
    from onnxopt.analysis.inspect import inspect
    from onnxopt.analysis.shapes import Shapes
    from onnxopt.contract import Context
    from onnxopt.inputs.axes import Axes
    from onnxopt.model import load

    loaded = load(model)
    sizes = Axes([v for v in loaded.graph.inputs if not v.is_initializer()]).overrides(shape or {})
    facts = inspect(loaded, sizes)
    previews: tuple[Preview, ...] = ()
    if survey:
        with drawing() as progress:
            ctx = Context(target, seed, runtime.evaluate_node, Shapes(loaded))
            previews = preview.survey(loaded, ctx, progress)
    if as_json:
        click.echo(_json(model, facts, previews), nl=False)
    else:
        show(lambda console: _render(model, facts, previews, console))


def _json(model: str, facts: ModelFacts, previews: tuple[Preview, ...]) -> str:
    from onnxopt.report.json import dump, plain

    passes = [
        {
            "name": p.name,
            "guarantee": p.guarantee,
            "edits": len(p.edits),
            "near_misses": len(p.refusals),
            "skipped": p.skipped,
            "crashed": p.crashed,
        }
        for p in previews
    ]
    return dump({"model": model, **plain(facts), "passes": passes})


def _render(model: str, facts: ModelFacts, previews: tuple[Preview, ...], console: Console) -> None:
    from rich.text import Text

    from onnxopt.report.words import count, printable, size

    stats = facts.stats
    opsets = ", ".join(f"{domain} {version}" for domain, version in facts.opsets) or "none"
    console.print(Text(printable(PurePath(model).name), style="bold"))
    _list(
        console,
        "",
        [
            ("size", f"{count(stats.nodes, 'node')}, {count(stats.parameters, 'parameter')}, {size(stats.bytes)}"),
            ("opsets", opsets),
            (
                "format",
                f"ONNX IR version {facts.ir_version}" + (f", by {facts.producer}" if facts.producer else ""),
            ),
            *((f"data in {name}", size(used)) for name, used in facts.external_files),
        ],
    )
    _list(console, "Inputs", map(_value, facts.inputs))
    _list(console, "Outputs", map(_value, facts.outputs))
    _list(console, "Dynamic axes", ((name, ", ".join(where)) for name, where in facts.dynamic_axes))
    _list(console, "Initializers that the caller can override", ((name, "") for name in facts.overridable))
    _operators(facts, console)
    _list(
        console,
        "Constants",
        (
            (f.type, f"{size(f.bytes)} in {count(f.constants, 'constant')}, {count(f.elements, 'element')}")
            for f in facts.constants
        ),
    )
    _list(
        console,
        "Largest constants",
        ((f.name, f"{f.type}[{', '.join(map(str, f.shape))}], {size(f.bytes)}") for f in facts.largest[:5]),
    )
    _cost(facts, console)
    _list(console, "Metadata", facts.metadata)
    _passes(previews, console)


def _value(value: ValueFacts) -> tuple[str, str]:
    shape = "of unknown rank" if value.shape is None else f"[{', '.join(map(str, value.shape))}]"
    return value.name, f"{value.type}{' ' if value.shape is None else ''}{shape}"


def _operators(facts: ModelFacts, console: Console) -> None:
    from onnxopt.report.words import count

    _list(console, "Operators", [("", ", ".join(f"{name} {times:,}" for name, times in facts.ops))])
    functions = ((f.name, f"{f.nodes:,} nodes, called {f.calls:,} times") for f in facts.functions)
    _list(console, "Functions", functions)
    if facts.nested_graphs:
        nested = count(facts.nested_graphs, "body", "bodies")
        _list(console, "Nested graphs", [("", f"{nested} of If, Loop, Scan and the like")])
    _list(console, "Operators outside of the ONNX standard", ((n, f"{t:,}") for n, t in facts.custom_ops))
    _list(console, "Operators this opset does not have", ((n, f"{t:,}") for n, t in facts.unknown_ops))


def _cost(facts: ModelFacts, console: Console) -> None:
    from onnxopt.report.words import count

    flops = facts.flops
    sizes = ", ".join(f"{axis}={size}" for axis, size in flops.assumed)
    share = ", ".join(f"{op} {macs / flops.macs:.0%}" for op, macs in flops.by_op[:5]) if flops.macs else ""
    missed = ", ".join(f"{op} {times:,}" for op, times in flops.not_counted)
    lines = [
        ("multiply-accumulates", _large(flops.macs) + (f" ({share})" if share else "")),
        ("other operations", _large(flops.elementwise)),
        ("with", sizes),
        ("not counted", missed),
        ("counted once", count(flops.loops, "loop body", "loop bodies") if flops.loops else ""),
    ]
    _list(console, "Cost of one run", [line for line in lines if line[1]])


def _large(number: int) -> str:
    """Return e.g. "12.3 million"."""
    from onnxopt.report.words import digits

    for name, unit in (("trillion", 10**12), ("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if number >= unit:
            return f"{digits(number / unit)} {name}"
    return f"{number:,}"


def _passes(previews: tuple[Preview, ...], console: Console) -> None:
    from onnxopt.report.words import count, sentence

    rows, idle = [], []
    for done in previews:
        text = sentence(done.skipped or done.crashed)
        if not text:
            text = count(len(done.edits), "edit") if done.edits else "nothing to do"
            missed = count(len(done.refusals), "near miss", "near misses") if done.refusals else ""
            text = ", ".join(filter(None, (text, missed)))
        if text == "nothing to do":
            idle.append(done.name)
        else:
            rows.append((done.name, text))
    if idle:
        rows.append(("nothing to do", ", ".join(idle)))
    _list(console, "What the passes would do, each by itself", rows)


def _list(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a title and two columns below it; nothing when there are no rows."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from onnxopt.report.words import printable

    pairs = [(printable(name), printable(text)) for name, text in rows]
    if not pairs:
        return
    if title:
        console.print()
        console.print(Text(title, style="bold cyan"))
    table = Table.grid(padding=(0, 2, 0, 0))
    if any(name for name, _ in pairs):
        table.add_column(overflow="fold", max_width=console.width // 2)
    table.add_column(overflow="fold")
    for name, text in pairs:
        table.add_row(*([Text(name)] if any(n for n, _ in pairs) else []), Text(text))
    console.print(Padding(table, (0, 0, 0, 2)))
