"""`onnxopt merge-trunk`."""

from __future__ import annotations

from typing import Any

import click

from onnxopt.cli import files, options
from onnxopt.cli.ending import ending, finish
from onnxopt.errors import UsageError

_EPILOG = """
\b
Examples:
  onnxopt merge-trunk faces.onnx ages.onnx -o both.onnx
  onnxopt merge-trunk digits.onnx letters.onnx signs.onnx -o all.onnx --data images.npz --report all.html

Layers are shared where operator, attributes, weights and inputs are the same. Inputs of the same name and type become
one; outputs whose names collide get the name of their model in front.

Exit codes: 0 done; 1 the models share nothing, or an output is not the same to the bit; 2 usage, unreadable input or
unwritable output; 130 interrupted. OUT is written only when all outputs are equal.
"""


@click.command("merge-trunk", epilog=_EPILOG)
@click.argument("models", metavar="MODEL MODEL ...", nargs=-1, type=click.Path(), required=True)
@click.option("--output", "-o", metavar="OUT", type=click.Path(), required=True, help="Where the merged model goes.")
@options.running_options
@options.telling_options
def command(
    models: tuple[str, ...],
    output: str,
    measure: bool,
    reports: tuple[str, ...],
    verbose: bool,
    quiet: bool,
    **running: Any,
) -> None:
    """Merge models that begin with the same layers into one that computes them once.

    Each output is compared with that of its own model, and must be equal to the bit; the merged model is timed
    against the models side by side in one session.
    """
    if len(models) < 2:
        raise UsageError("Give two or more models to merge.")
    for model in models:
        files.destination(model, output)
    settings = {"verify": True, "measure": measure, "max_error": None, "max_drop": None}
    wanted = ending(
        models[0],
        settings,
        output=output,
        in_place=False,
        reports=reports,
        strict=False,
        verbose=verbose,
        quiet=quiet,
    )

    from onnxopt.merge_trunk import merge_trunk

    finish(lambda progress: merge_trunk(models, measure=measure, progress=progress, **running).result, wanted)
