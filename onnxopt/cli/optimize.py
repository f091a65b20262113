"""`onnxopt optimize`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from onnxopt.cli import files, keep, options
from onnxopt.cli.ending import ending, finish
from onnxopt.errors import VerificationError

_EPILOG = """
\b
Examples:
  onnxopt optimize model.onnx -o model.opt.onnx
  onnxopt optimize model.onnx -o small.onnx --recipe small --report small.html
  onnxopt optimize model.onnx -o pruned.onnx -p "fuse-conv-bn,prune-weights{ratio=0.5}"
  onnxopt optimize model.onnx -o fast.onnx --target cpu --max-drop 0.5% --data test.npz --labels labels.npy
  onnxopt optimize model.onnx -o edge.onnx --fix-shape batch=1 --opset 17
  onnxopt optimize model.onnx -o again.onnx --replay model.patch

Lossy passes run only when they are named, or when --max-error or --max-drop gives a budget. A budget alone starts a
search: ways to quantize the model are tried, judged on data that they do not learn from, and timed; the best
within the budget is kept, if need be with the layers that cost most in floating point. Named without a budget, they are
applied, and their deviation is reported.

Exit codes: 0 done, and OUT was written if one was named; 1 verification failed, a budget was missed, or --strict
found something (OUT is not written); 2 usage, unreadable input or unwritable output; 130 interrupted.
"""


@click.command("optimize", epilog=_EPILOG)
@options.model_argument()
@options.output_options
@options.recipe_option()
@options.passes_option("Passes to run instead of a recipe, as NAME{option=value},NAME,...")
@options.target_option()
@options.opset_option()
@options.max_error_option(
    "Budget: the worst deviation of any output, as a fraction of the output's range; inf for no limit."
)
@options.drop_options
@options.search_options
@options.fix_shape_option()
@options.running_options
@options.force_calibration_option()
@options.patch_options
@options.report_options
def command(
    model: str,
    output: str | None,
    in_place: bool,
    patch: str | None,
    reports: tuple[str, ...],
    strict: bool,
    verbose: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Optimize MODEL and write the result to OUT.

    Every edit is verified in ONNX Runtime against MODEL, and dropped when it changes the outputs; a pass that
    makes the model slower is taken out again. The report says what was done, what it gained and what it cost.
    Without --output nothing is written: the report shows what would be.
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
        patch=patch,
    )

    if settings["state"] is not None:
        files.check_state(settings["state"])

    from onnxopt.optimize import optimize

    with _remembered(settings, wanted.out) as state:
        finish(lambda progress: optimize(model, progress=progress, **settings | {"state": state}), wanted)


@contextlib.contextmanager
def _remembered(settings: dict[str, Any], out: Path | None) -> Iterator[str | None]:
    """Give the file that a search is remembered in; one that was not asked for goes when the search is done."""
    searching = settings["recipe"] is None and settings["passes"] is None
    searching &= settings["max_error"] is not None or settings["max_drop"] is not None
    if settings["state"] is not None:
        path, own = Path(settings["state"]), False
    elif settings["replay"] is None and searching and out is not None:
        path, own = out.with_name(f"{out.name}.search.json"), True
    else:
        yield None
        return
    try:
        yield str(path)
    except KeyboardInterrupt:
        if path.exists():
            keep(f"What the search has found out is kept in {path}; the same command goes on from there.")
        raise
    except VerificationError:
        if own:
            path.unlink(missing_ok=True)
        raise
    if own:
        path.unlink(missing_ok=True)
