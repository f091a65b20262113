"""`onnxopt finetune`."""

from __future__ import annotations

from typing import Any

import click

from onnxopt.cli import files, options, training
from onnxopt.cli.progress import drawing

_EPILOG = """
\b
Examples:
  onnxopt finetune model.onnx --data train.npz --labels labels.npy -o tuned.onnx
  onnxopt finetune model.onnx --data train.npz -o tuned.onnx --freeze 'encoder.*' --layer-decay 0.9
  onnxopt finetune headed.onnx --data few.npz -o tuned.onnx --blend 50% --layer-decay 0.7 --validation 0
  onnxopt finetune model.onnx --data few.npz -o tuned.onnx --judging-folds 5 --epochs 60 --shift 2
  onnxopt finetune digits.onnx --data digits.npz -o tuned.onnx --shift 2 --epochs 40 --checkpoint run.safetensors

The graph is run in torch (pip install 'onnxopt[torch]'), after a comparison with ONNX Runtime; the weights are written
back by name and all else stays as it is. Labels are whole numbers for classes, or numbers of the output's shape.
The state that does best on the validation samples is kept. Because it was chosen by them, its figure is a little
flattering: judge it once more on samples that nothing has seen. Of few samples, none need be kept: --judging-folds
judges by models that were each trained without a part of them, and OUT learns from all. What MODEL has learnt from
before, such as the samples a new head was fitted to, cannot judge; take --validation 0 then.

Exit codes: 0 done, and OUT was written; 1 no epoch was better than the model as it is, or verification failed (OUT is
not written); 2 usage, unreadable input or unwritable output; 130 interrupted (--checkpoint goes on from there).
"""


@click.command("finetune", epilog=_EPILOG)
@options.model_argument()
@click.option("--data", metavar="FILE|DIR", required=True, help="Samples: an .npz with one array per input.")
@click.option(
    "--labels",
    metavar="FILE|KEY",
    type=click.Path(),
    help='Labels: an .npy, or a key of the .npz. By default its key "labels", "targets" or "y".',
)
@click.option(
    "--label-smoothing",
    type=options.Fraction(below_one=True),
    default=0.0,
    help="Share of each label that is spread over all classes.",
)
@click.option(
    "--blend",
    type=options.Fraction(),
    help="How far to go from the parameters that were there to those trained, by default 100%; 50% after onnxopt head.",
)
@options.training_options
def command(
    model: str, output: str, data: str, labels: str | None, as_json: bool, quiet: bool, **settings: Any
) -> None:
    """Train the parameters of MODEL on labelled samples; the graph stays as it is."""
    path = files.destination(model, output)

    from onnxopt.training.finetune import finetune

    with drawing(quiet=quiet) as progress:
        found = finetune(model, data, labels, progress=progress, **options.given(settings))
    training.keep(found, path, as_json=as_json, quiet=quiet)
