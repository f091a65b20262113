"""`onnxopt optimize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import files, options, written
from onnxopt.cli.output import show
from onnxopt.cli.progress import drawing
from onnxopt.errors import UsageError, VerificationError
from onnxopt.report.words import count, sentence

if TYPE_CHECKING:
    from onnxopt.report.data import Report

_EPILOG = """
\b
Examples:
  onnxopt optimize model.onnx -o model.opt.onnx
  onnxopt optimize model.onnx -o small.onnx --recipe small --report small.html
  onnxopt optimize model.onnx -o pruned.onnx -p "fuse-conv-bn,prune-weights{ratio=0.5}"
  onnxopt optimize model.onnx -o small.onnx --max-drop 0.5% --data test.npz --labels labels.npy
  onnxopt optimize model.onnx -o edge.onnx --fix-shape batch=1 --opset 17

Lossy passes run only when they are named, or when --max-error or --max-drop gives them a budget. Named
without a budget they are applied, and their deviation is reported.

Exit codes: 0 done, and OUT was written if one was named; 1 verification failed, a budget was missed, or --strict
found something (OUT is not written); 2 usage, unreadable input or unwritable output; 130 interrupted.
"""


@click.command("optimize", epilog=_EPILOG)
@options.model_argument()
@click.option("--output", "-o", metavar="OUT", type=click.Path(), help="Where the result goes.")
@click.option("--in-place", is_flag=True, help="Replace MODEL by the result.")
@options.recipe_option()
@options.passes_option("Passes to run instead of a recipe, as NAME{option=value},NAME,...")
@options.target_option()
@click.option(
    "--opset",
    metavar="N",
    type=click.IntRange(min=1),
    help="Convert the standard operator set to this version first; a lower one works for few models.",
)
@options.max_error_option(
    "Budget: the worst deviation of any output, as a fraction of the output's range; inf for no limit."
)
@click.option(
    "--max-drop",
    type=options.Fraction(below_one=True),
    metavar="P%",
    help="Budget: the largest drop of the metric, for example 0.5%. Needs --data.",
)
@options.metric_option()
@click.option(
    "--labels",
    metavar="FILE",
    type=click.Path(),
    help="Labels of --data, an .npy or .npz with one per sample. Without them the metric compares with MODEL.",
)
@click.option(
    "--fix-shape",
    type=options.Sizes(),
    help="Sizes of dynamic axes to write into the result, for example batch=1.",
)
@options.running_options
@options.force_calibration_option()
@click.option("--no-verify", "verify", flag_value=False, default=True, help="Do not compare outputs with MODEL's.")
@click.option("--no-measure", "measure", flag_value=False, default=True, help="Do not time the result.")
@click.option("--strict", is_flag=True, help="Fail when an edit was dropped or the result could not be verified.")
@click.option(
    "--report",
    "reports",
    metavar="FILE",
    multiple=True,
    type=click.Path(),
    help="Also write the report to FILE.json or FILE.html; may be repeated.",
)
@click.option("--verbose", "-v", is_flag=True, help="List every edit and every near miss.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but warnings and errors.")
def command(
    model: str,
    output: str | None,
    in_place: bool,
    reports: tuple[str, ...],
    strict: bool,
    verbose: bool,
    quiet: bool,
    max_drop: float | None,
    **settings: Any,
) -> None:
    """Optimize MODEL and write the result to OUT.

    Every edit is verified in ONNX Runtime against MODEL, and dropped when it changes the outputs; a pass that
    makes the model slower is taken out again. The report says what was done, what it gained and what it cost.
    Without --output nothing is written: the report shows what would be.
    """
    if strict and not settings["verify"]:
        raise UsageError("--strict asks for a verified result and --no-verify turns it off; give one of them.")
    out = files.destination(model, output, in_place=in_place)
    report_files = files.report_files(reports, Path(model), out)

    from onnxopt.model import save
    from onnxopt.optimize import optimize

    with drawing(quiet=quiet) as progress:
        result = optimize(model, max_drop=max_drop, progress=progress, **settings)
        report = result.report
        failure = _failure(report, max_drop, settings["max_error"], strict=strict)
        if out is not None and not failure:
            progress.stage(f"writing {out}")
            save(result.model, out)
            written().append(str(out))
            report = dataclasses.replace(report, output=str(out))
    for path in report_files:
        _write_report(report, path)
    if quiet:
        _warn(report, verify=settings["verify"], measure=settings["measure"])
    else:
        _show(report, report_files, verbose=verbose)
    if failure:
        raise VerificationError(f"{failure} {f'{out} was not' if out else 'Nothing was'} written.")


def _failure(report: Report, max_drop: float | None, max_error: float | None, *, strict: bool) -> str:
    """Return which requirement is not met, in a sentence; empty when all are."""
    if report.verification is not None and not report.verification.ok:
        return f"The result failed verification: {report.verification.reason.rstrip('.')}."
    if report.metric is not None and max_drop is not None and report.metric.drop > max_drop:
        return f"The budget --max-drop was missed: {report.metric.name} dropped by {report.metric.drop:.4g}."
    budget = max_drop is not None or max_error is not None
    if report.verification is None and (budget or strict):
        asked = "a budget" if budget else "--strict"
        return f"The result could not be verified, which {asked} needs: {report.not_verified.rstrip('.')}."
    if strict and report.dropped:
        was = "was" if report.dropped == 1 else "were"
        return f"{count(report.dropped, 'edit')} {was} dropped, and --strict is given."
    return ""


def _write_report(report: Report, path: Path) -> None:
    if path.suffix.lower() == ".json":
        from onnxopt.report.json import to_json

        text = to_json(report)
    else:
        from onnxopt.report.html import to_html

        text = to_html(report)
    files.write_text(path, text)
    written().append(str(path))


def _warn(report: Report, *, verify: bool, measure: bool) -> None:
    """Say what even a quiet run must say: that something was asked for and could not be done."""
    if verify and report.verification is None:
        click.echo(f"Warning: NOT VERIFIED: {sentence(report.not_verified)}", err=True)
    if measure and report.measurement is None:
        click.echo(f"Warning: NOT MEASURED: {sentence(report.not_measured)}", err=True)


def _show(report: Report, report_files: tuple[Path, ...], *, verbose: bool) -> None:
    from onnxopt.report.terminal import render

    show(lambda console: render(report, console, verbose=verbose))
    if report.output:
        click.echo(f"Written to {report.output}.")
    else:
        click.echo("Nothing was written; name a file with -o to keep the result.")
    for path in report_files:
        click.echo(f"Report in {path}.")
