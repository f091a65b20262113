"""`onnxopt head`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import files, options, written
from onnxopt.cli.output import show, tell_output
from onnxopt.cli.progress import drawing
from onnxopt.textfile import write_text

if TYPE_CHECKING:
    from onnxopt.report.head import HeadReport

_EPILOG = """
\b
Examples:
  onnxopt head digits.onnx --classes 5 --data letters.npz -o letters.onnx
  onnxopt head model.onnx --data images.npz --labels kinds.npy --test more.npz -o kinds.onnx --report kinds.html
  onnxopt head minilm.onnx --data sentences.npz --method ridge -o topics.onnx

The features are what the last linear layer takes, computed by the runtime; a model without one gets a head
appended, with the mean over tokens or positions where there are several. Nothing before the head changes. What the
classes are called stands in the metadata of the new model, as onnxopt.classes.

Exit codes: 0 done; 1 the new model does not compute what was fitted; 2 usage, unreadable input or unwritable output;
130 interrupted.
"""


@click.command("head", epilog=_EPILOG)
@options.model_argument()
@options.output_options
@click.option(
    "--at",
    metavar="VALUE|auto",
    help="The value to use as features, instead of what the old head takes; auto tries the layers before too.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "ridge", "logistic"]),
    help="Ridge regression in closed form, logistic regression, or auto, the default: the better one by "
    "cross-validation.",
)
@click.option(
    "--shift",
    metavar="PIXELS",
    type=click.IntRange(min=0),
    help="Also learn from images moved by so many pixels, if that classifies more samples rightly; for images whose "
    "class does not depend on where they are.",
)
@click.option(
    "--no-curve", "curve", flag_value=False, default=True, help="Do not find out what fewer labels would give."
)
@click.option(
    "--test", metavar="FILE", type=click.Path(), help="Labelled samples that only judge the result, like --data."
)
@click.option("--test-labels", metavar="FILE", type=click.Path(), help="The classes of --test, an .npy.")
@options.labelled_options
def command(
    model: str, output: str | None, in_place: bool, reports: tuple[str, ...], quiet: bool, **settings: Any
) -> None:
    """Give MODEL a head for other classes, learnt from labelled samples, and write the result to OUT.

    A linear classifier is fitted to the features that MODEL computes and takes the place of its last layer. The
    report says what it reaches on samples that it was not fitted to, and how that grows with their number.
    """
    out = files.destination(model, output, in_place=in_place)
    kept = files.report_files(reports, Path(model), out)

    from onnxopt.head import head
    from onnxopt.model import save

    with drawing(quiet=quiet) as progress:
        chosen = settings | {"method": settings["method"] or "auto", "shift": settings["shift"] or 0}
        result = head(model, progress=progress, **chosen)
        report = result.report
        if out is not None:
            progress.stage(f"writing {out}")
            save(result.model, out)
            written().append(str(out))
            report = dataclasses.replace(report, output=str(out))
    for path in kept:
        _write_report(report, path)
    if not quiet:
        _show(report, kept)


def _write_report(report: HeadReport, path: Path) -> None:
    from onnxopt.report.head import to_html, to_json

    write_text(path, to_json(report) if path.suffix.lower() == ".json" else to_html(report))
    written().append(str(path))


def _show(report: HeadReport, paths: tuple[Path, ...]) -> None:
    from onnxopt.report.head import render

    show(lambda console: render(report, console))
    tell_output(report.output)
    for path in paths:
        click.echo(f"Report in {path}.")
