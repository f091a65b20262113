"""`onnxopt explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onnxopt.cli import options
from onnxopt.cli.output import show

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt.contract import Site, Target
    from onnxopt.preview import Preview

_EPILOG = """
\b
Examples:
  onnxopt explain model.onnx -p fuse-conv-bn
  onnxopt explain model.onnx -p "fold-constants,fuse-conv-bn" --json

The passes run one after the other on a copy. Nothing is verified, measured or written.
"""

_ORDER = "These passes alone, in this order; in a recipe, passes before them may leave them more to do."


@click.command("explain", epilog=_EPILOG)
@options.model_argument()
@options.passes_option("Passes to explain, as NAME{option=value},NAME,...", required=True)
@options.target_option()
@options.seed_option()
@options.json_option()
def command(model: str, passes: str, target: Target, seed: int, as_json: bool) -> None:
    """Show every edit that passes would make to MODEL, and why they leave the near misses alone."""
    from onnxopt import runtime
    from onnxopt.analysis.shapes import Shapes
    from onnxopt.contract import Context
    from onnxopt.model import load
    from onnxopt.pipeline import Pipeline
    from onnxopt.preview import preview

    pipeline = Pipeline.parse(passes)
    loaded = load(model)
    context = Context(target, seed, runtime.evaluate_node, Shapes(loaded))
    previews = preview(loaded, pipeline.passes, context)
    if as_json:
        from onnxopt.report.json import dump, plain

        click.echo(dump({"model": model, "passes": [plain(p) for p in previews]}), nl=False)
    else:
        show(lambda console: _render(previews, console))


def _render(previews: tuple[Preview, ...], console: Console) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from onnxopt.report.words import count, sentence

    for number, done in enumerate(previews):
        if number:
            console.print()
        console.print(Text(done.spec, style="bold"))
        if done.skipped:
            console.print(Padding(Text(f"does not apply: {sentence(done.skipped)}", style="yellow"), (0, 0, 0, 2)))
            continue
        console.print(Text(f"  {count(len(done.edits), 'edit')}", style="green" if done.edits else "dim"))
        for edit in done.edits:
            _line(edit.site, edit.summary, console, "cyan")
        console.print(
            Text(
                f"  {count(len(done.refusals), 'near miss', 'near misses')}",
                style="yellow" if done.refusals else "dim",
            )
        )
        for refusal in done.refusals:
            _line(refusal.site, refusal.reason, console, "yellow")
        if done.crashed:
            console.print(Padding(Text(sentence(done.crashed), style="bold red"), (0, 0, 0, 2)))
    console.print()
    console.print(Text(_ORDER, style="dim"))


def _line(site: Site, text: str, console: Console, style: str) -> None:
    """Print where and, below it, what; names are shown in full."""
    from rich.padding import Padding
    from rich.text import Text

    from onnxopt.report.words import printable, sentence

    where = Text(printable(site.output), style=style)
    if site.graph:
        where.append(f" (in {printable(site.graph)})", style="dim")
    console.print(Padding(where, (0, 0, 0, 4)))
    console.print(Padding(Text(sentence(text)), (0, 0, 0, 8)))
