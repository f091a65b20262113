"""`onnxopt advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxopt.cli import files, options, written
from onnxopt.cli.output import show
from onnxopt.cli.progress import drawing
from onnxopt.textfile import write_text

_EPILOG = """
\b
Examples:
  onnxopt advise digits.onnx --data letters.npz
  onnxopt advise model.onnx --data images.npz --labels kinds.npy --source before.npz --report advice.html
  onnxopt advise model.onnx --data images.npz --no-train

Compared on the same folds: a linear classifier on the inputs, a new head, the same with all layers trained after it,
and the layers trained from random parameters. The last two take long, and need torch (pip install 'onnxopt[torch]').

Exit codes: 0 done, whatever the verdict; 2 usage or unreadable input; 130 interrupted.
"""


@click.command("advise", epilog=_EPILOG)
@options.model_argument()
@click.option(
    "--source",
    metavar="FILE",
    type=click.Path(),
    help="Samples like those MODEL learnt from, to test whether --data differ.",
)
@click.option("--no-train", "train", flag_value=False, default=True, help="Leave out what takes long.")
@options.labelled_options
def command(model: str, reports: tuple[str, ...], quiet: bool, **settings: Any) -> None:
    """Say whether what MODEL has learnt helps with another task, and how to use it.

    Ways to a classifier for the labelled samples of --data are tried on the same folds. The verdict says which to take,
    or that transfer hurts.
    """
    kept = files.report_files(reports, Path(model))

    from onnxopt.advise import advise
    from onnxopt.report.advice import render, to_html, to_json

    with drawing(quiet=quiet) as progress:
        advice = advise(model, progress=progress, **settings)
    for path in kept:
        write_text(path, to_json(advice) if path.suffix.lower() == ".json" else to_html(advice))
        written().append(str(path))
    if quiet:
        return
    show(lambda console: render(advice, console))
    for path in kept:
        click.echo(f"Report in {path}.")
