"""`onnxopt distill`."""

from __future__ import annotations

from typing import Any

import click

from onnxopt.cli import files, options, training
from onnxopt.cli.progress import drawing

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
def command(teacher: str, student: str, output: str, data: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Train STUDENT to compute what TEACHER computes, such as the original of a pruned model."""
    path = files.destination(student, output)
    files.destination(teacher, output)

    from onnxopt.training.distill import distill

    with drawing(quiet=quiet) as progress:
        found = distill(teacher, student, data, progress=progress, **options.given(settings))
    training.keep(found, path, as_json=as_json, quiet=quiet)
