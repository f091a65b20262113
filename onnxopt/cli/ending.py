"""How the commands that make a model end: write it and the reports, show what was done, fail where asked to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import files, written
from onnxopt.cli.output import show, tell_output
from onnxopt.cli.progress import drawing
from onnxopt.errors import UsageError, VerificationError
from onnxopt.report.words import count
from onnxopt.textfile import write_text

if TYPE_CHECKING:
    from onnxopt.contract import Progress
    from onnxopt.optimize import Result
    from onnxopt.report.data import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """What the user wants of the result.

    Attributes:
        model: The model that the result is made of.
        out: Where the result goes; None when it is not written.
        patch: Where the patch goes that makes the result from the model again; None without.
        reports: Where the reports go.
        strict: Fail when an edit was dropped or the result could not be verified.
        verbose: List every edit.
        quiet: Print nothing but warnings.
        verify: Whether a verified result was asked for.
        measure: Whether a measured one was.
        max_error: The budget for the deviation, if any.
        max_drop: The budget for the metric, if any.
    """

    model: str
    out: Path | None
    patch: Path | None
    reports: tuple[Path, ...]
    strict: bool
    verbose: bool
    quiet: bool
    verify: bool
    measure: bool
    max_error: float | None
    max_drop: float | None


def ending(
    model: str,
    settings: dict[str, Any],
    *,
    output: str | None,
    in_place: bool,
    reports: tuple[str, ...],
    strict: bool,
    verbose: bool,
    quiet: bool,
    patch: str | None = None,
) -> Ending:
    """Check what the user wants of the result before the long run.

    Raises:
        UsageError: If the options contradict each other, or the input would be overwritten without `--in-place`.
        OutputError: If nothing can be written there.
    """
    if strict and not settings["verify"]:
        raise UsageError("--strict asks for a verified result and --no-verify turns it off; give one of them.")
    out = files.destination(model, output, in_place=in_place)
    wanted = {name: settings[name] for name in ("verify", "measure", "max_error", "max_drop")}
    report_files = files.report_files(reports, Path(model), out)
    kept = files.patch_file(patch, Path(model), out)
    return Ending(
        model=model, out=out, patch=kept, reports=report_files, strict=strict, verbose=verbose, quiet=quiet, **wanted
    )


def finish(run: Callable[[Progress], Result], wanted: Ending) -> None:
    """Run, write what is to be written, and show the report.

    Args:
        run: Makes the result.
        wanted: What the user wants of it.

    Raises:
        VerificationError: If the result does not meet what was asked for; then the model is not written.
    """
    with drawing(quiet=wanted.quiet) as progress:
        result = run(progress)
        report = result.report
        failure = _failure(report, wanted)
        if not failure:
            report = _written(result, wanted, progress)
    for path in wanted.reports:
        _write_report(report, path)
    if wanted.quiet:
        _warn(report, wanted)
    else:
        _show(report, wanted)
    if failure:
        raise VerificationError(f"{failure} {f'{wanted.out} was not' if wanted.out else 'Nothing was'} written.")


def _written(result: Result, wanted: Ending, progress: Progress) -> Report:
    """Write the model and the patch, and return the report that knows of the model."""
    from onnxopt.model import load, save

    report = result.report
    if wanted.patch is not None:
        # before the model, which may replace what the patch starts from
        from onnxopt.patch import history, write_patch

        progress.stage(f"writing {wanted.patch}")
        write_patch(load(wanted.model), result.model, history(report), wanted.patch)
        written().append(str(wanted.patch))
    if wanted.out is not None:
        progress.stage(f"writing {wanted.out}")
        save(result.model, wanted.out)
        written().append(str(wanted.out))
        report = dataclasses.replace(report, output=str(wanted.out))
    return report


def _failure(report: Report, wanted: Ending) -> str:
    """Return which requirement is not met, in a sentence; empty when all are."""
    if report.verification is not None and not report.verification.ok:
        return f"The result failed verification: {report.verification.reason.rstrip('.')}."
    # whatever a search chooses is within the budget, and a lossless result always is
    metric = report.metric if report.search is None else None
    if metric is not None and wanted.max_drop is not None and metric.drop > wanted.max_drop:
        return f"The budget --max-drop was missed: {metric.name} dropped by {metric.drop:.4g}."
    budget = wanted.max_drop is not None or wanted.max_error is not None
    if report.verification is None and (budget or wanted.strict):
        asked = "a budget" if budget else "--strict"
        return f"The result could not be verified, which {asked} needs: {report.not_verified.rstrip('.')}."
    if wanted.strict and report.dropped:
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
    write_text(path, text)
    written().append(str(path))


def _warn(report: Report, wanted: Ending) -> None:
    """Say what even a quiet run must say: what was asked for and could not be done, and that it got slower."""
    from onnxopt.report.summary import not_done, slower

    for warning in not_done(report, verify=wanted.verify, measure=wanted.measure):
        click.echo(f"Warning: {warning}", err=True)
    if report.measurement is not None and report.measurement.verdict == "slower":
        click.echo(f"Warning: {slower(report.measurement)}", err=True)


def _show(report: Report, wanted: Ending) -> None:
    from onnxopt.report.terminal import render

    show(lambda console: render(report, console, verbose=wanted.verbose))
    tell_output(report.output)
    if str(wanted.patch) in written():
        click.echo(
            f"Patch in {wanted.patch}; `onnxopt optimize {wanted.model} --replay {wanted.patch}` makes it again."
        )
    for path in wanted.reports:
        click.echo(f"Report in {path}.")
