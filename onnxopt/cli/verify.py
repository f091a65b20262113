"""`onnxopt verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import options
from onnxopt.cli.output import show
from onnxopt.cli.progress import drawing
from onnxopt.errors import VerificationError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt.compare.verdict import Verification

_EPILOG = """
\b
Examples:
  onnxopt verify model.onnx model.opt.onnx
  onnxopt verify model.onnx small.onnx --max-error 1%
  onnxopt verify model.onnx small.onnx --data test.npz --json

Exit codes: 0 verified; 1 the outputs or the interface differ; 2 usage or unreadable input.
"""


@click.command("verify", epilog=_EPILOG)
@options.model_argument("a")
@options.model_argument("b")
@options.max_error_option(
    "Judge B as a lossy result: the worst deviation of any output, as a fraction of the output's range; inf for "
    "any. Without it only floating-point rounding may differ."
)
@options.running_options
@options.json_option()
@click.option("--verbose", "-v", is_flag=True, help="List every output.")
def command(a: str, b: str, max_error: float | None, as_json: bool, verbose: bool, **running: Any) -> None:
    """Verify that model B computes what model A computes: the same interface, then the outputs in ONNX Runtime.

    Where only one of them leaves an axis of an input open, both are compared with the size that the other has.
    """
    from onnxopt.cli.running import feeds_of, options_of, source_of
    from onnxopt.compare.narrowing import narrowed
    from onnxopt.model import load
    from onnxopt.verify import verify

    with drawing() as progress:
        progress.stage("verifying")
        pair = narrowed(load(a), load(b))
        found = verify(
            a,
            b,
            feeds=feeds_of(pair.reference, running),
            options=options_of(running),
            seed=running["seed"],
            shape=running["shape"],
            max_error=max_error,
        )
    if as_json:
        from onnxopt.report.json import dump, plain

        click.echo(dump(plain(found)), nl=False)
    else:
        limits = " for the shapes that both take" if pair.note else ""
        show(lambda console: _render(found, limits, source_of(running, found.feeds), console, verbose=verbose))
    if not found.ok:
        click.get_current_context().exit(VerificationError.exit_code)


def _render(found: Verification, limits: str, source: str, console: Console, *, verbose: bool) -> None:
    from rich.text import Text

    from onnxopt.report.terminal import outputs
    from onnxopt.report.words import deviation, sentence

    if found.ok:
        how = found.extent if found.worst == 0 else f"worst deviation {deviation(found.worst)} of the output's range"
        console.print(Text(f"Verified{limits}: {how}.", style="bold green"))
    else:
        console.print(Text(f"Differs: {sentence(found.reason)}", style="bold red"))
    if found.outputs:
        outputs(found, console, data=source, verbose=verbose)
