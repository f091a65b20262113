"""`onnxopt quantize`."""

from __future__ import annotations

from typing import Any

import click

from onnxopt.cli import options
from onnxopt.cli.ending import ending, finish

MODES = ["static", "dynamic", "weights", "matmul", "float16", "fp16-storage"]

_EPILOG = """
\b
Modes:
  static        8-bit layers, activation ranges learnt from --data; for convolutional nets
  dynamic       8-bit matrix products, activations scaled as they come; for transformers
  weights       weights alone, with --bits 8, 4 or 2: smaller files
  matmul        weights of matrix products in 8, 4 or 2 bits, in ONNX Runtime's own form (--target cpu or cuda)
  float16       computes in half precision (--target cuda)
  fp16-storage  weights in half precision: half the file, same speed

\b
Examples:
  onnxopt quantize model.onnx -o small.onnx --mode weights
  onnxopt quantize model.onnx -o int8.onnx --mode static --data calib.npz --target cpu
  onnxopt quantize model.onnx -o int8.onnx --mode dynamic --data calib.npz --target cpu --exclude "/head/*"
  onnxopt quantize model.onnx -o int4.onnx --mode matmul --bits 4 --block 128 --target cpu

Nothing is taken out because it is slower or deviates, unless --max-error or --max-drop says so; the report says what
it costs. `onnxopt optimize` with a budget looks for the fastest result by itself.

Exit codes: 0 done, and OUT was written if one was named; 1 verification failed, a budget was missed, nothing could be
quantized, or --strict found something (OUT is not written); 2 usage, unreadable input or unwritable output; 130
interrupted.
"""


@click.command("quantize", epilog=_EPILOG)
@options.model_argument()
@options.output_options
@click.option("--mode", required=True, type=click.Choice(MODES), help="What is quantized; see below.")
@click.option(
    "--bits",
    type=click.Choice(["8", "4", "2"]),
    callback=lambda ctx, param, value: value and int(value),
    help="Bits of a weight (weights, matmul).",
)
@click.option(
    "--granularity", type=click.Choice(["tensor", "channel"]), help="What shares a scale (weights); --block is finer."
)
@click.option(
    "--block",
    metavar="N",
    type=click.IntRange(min=1),
    help="So many elements of a channel share a scale (weights, matmul).",
)
@click.option(
    "--ranges",
    type=click.Choice(["auto", "minmax", "percentile", "entropy", "mse"]),
    help="How activation ranges follow from the data (static).",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "mse", "gptq"]),
    help="How weights are rounded: to nearest, clipped where that lowers the error, or so that errors make up for "
    "each other, which learns from --data (weights, matmul).",
)
@click.option(
    "--smooth/--no-smooth",
    default=None,
    help="Move scale from activations into weights first (dynamic). On when there is --data.",
)
@click.option(
    "--only",
    metavar="GLOB",
    multiple=True,
    help="Quantize only nodes whose name, output or weight fits, such as '/encoder/*'; may be repeated.",
)
@click.option(
    "--exclude",
    metavar="GLOB",
    multiple=True,
    help="Leave nodes alone whose name, output or weight fits; may be repeated.",
)
@click.option(
    "--no-simplify", "simplify", flag_value=False, default=True, help="Do not run the lossless recipe before."
)
@options.target_option()
@options.opset_option()
@options.max_error_option(
    "Budget: the worst deviation of any output, as a fraction of the output's range; inf for no limit."
)
@options.drop_options
@options.fix_shape_option()
@options.running_options
@options.force_calibration_option()
@options.report_options
def command(
    model: str,
    output: str | None,
    in_place: bool,
    reports: tuple[str, ...],
    strict: bool,
    verbose: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL in the way --mode says, and write the result to OUT.

    The lossless recipe runs first, then exactly the passes of the mode. The result is compared with MODEL and timed
    against it. Without --output nothing is written: the report shows what would be.
    """
    wanted = ending(
        model,
        settings,
        output=output,
        in_place=in_place,
        reports=reports,
        strict=strict,
        verbose=verbose,
        quiet=quiet,
    )

    from onnxopt.quantize import quantize

    finish(lambda progress: quantize(model, progress=progress, **settings), wanted)
