"""`onnxopt distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import files, options, written
from onnxopt.cli.output import show
from onnxopt.cli.progress import drawing
from onnxopt.errors import VerificationError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt.training.distill import Distilled

_EPILOG = """
\b
Examples:
  onnxopt distill model.onnx pruned.onnx --data images.npz -o small.onnx
  onnxopt distill model.onnx pruned.onnx --data images.npz -o small.onnx --shift 2 --epochs 200
  onnxopt distill bert.onnx pruned.onnx --data text.npz -o small.onnx --lr 5e-5 --hidden 'encoder.*.output'

Both graphs are run in torch (pip install 'onnxopt[torch]'), after a comparison with ONNX Runtime. No labels are
needed: STUDENT learns the outputs of TEACHER on the samples and on random variants of them, by default mixtures of two.
The state that is nearest to TEACHER on samples not learnt from is kept.

Exit codes: 0 done, and OUT was written; 1 no epoch was better than STUDENT as it is, or verification failed (OUT is not
written); 2 usage, unreadable input or unwritable output; 130 interrupted (--checkpoint goes on from there).
"""


@click.command("distill", epilog=_EPILOG)
@options.model_argument("teacher")
@options.model_argument("student")
@click.option("--output", "-o", metavar="OUT", type=click.Path(), required=True, help="Where the result goes.")
@click.option(
    "--data", metavar="FILE|DIR", required=True, help="Samples without labels: an .npz with one array per input."
)
@click.option(
    "--temperature",
    metavar="T",
    type=float,
    help="Scores of classes are divided by it before they are compared; by default 4.",
)
@click.option(
    "--hidden", metavar="GLOB", multiple=True, help="Also compare values inside of such names; may be repeated."
)
@options.training_options
@options.json_option()
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(teacher: str, student: str, output: str, data: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Train STUDENT to compute what TEACHER computes, such as the original of a pruned model."""
    path = files.destination(student, output, in_place=False)
    files.destination(teacher, output, in_place=False)
    assert path is not None

    from onnxopt.model import save
    from onnxopt.training.distill import distill, is_worse

    with drawing(quiet=quiet) as progress:
        found = distill(teacher, student, data, progress=progress, **options.given(settings))
    if as_json:
        from onnxopt.report.json import dump, plain

        click.echo(dump(plain(found.summary)), nl=False)
    elif not quiet:
        show(lambda console: _render(found, console))
    if found.best == 0 or is_worse(found):
        raise VerificationError(
            "No epoch came nearer to the teacher than the student as it is, so nothing was written; use more samples "
            "or a lower --learning-rate, or --validation 0 to keep the last epoch unjudged."
        )
    save(found.model, path)
    written().append(str(path))


def _render(found: Distilled, console: Console) -> None:
    from rich.text import Text

    for sentence in found.sentences():
        console.print(Text(sentence))
