"""Where a result goes, and how it is told."""

from __future__ import annotations

from collections.abc import Callable

import click

from onnxopt.cli.options.values import F, decorated


def json_option() -> Callable[[F], F]:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def output_options(function: F) -> F:
    """Add the options that say where a result goes."""
    return decorated(
        function,
        click.option("--output", "-o", metavar="OUT", type=click.Path(), help="Where the result goes."),
        click.option("--in-place", is_flag=True, help="Replace MODEL by the result."),
    )


def report_file_option() -> Callable[[F], F]:
    """Add `--report`."""
    return click.option(
        "--report",
        "reports",
        metavar="FILE",
        multiple=True,
        type=click.Path(),
        help="Also write the report to FILE.json or FILE.html; may be repeated.",
    )


def quiet_option() -> Callable[[F], F]:
    """Add `--quiet`."""
    return click.option("--quiet", "-q", is_flag=True, help="Print nothing but warnings and errors.")


def report_options(function: F) -> F:
    """Add the options that say what is found out about a result, and how that is told."""
    return decorated(
        function,
        click.option(
            "--no-verify", "verify", flag_value=False, default=True, help="Do not compare outputs with MODEL's."
        ),
        click.option(
            "--strict", is_flag=True, help="Fail when an edit was dropped or the result could not be verified."
        ),
        telling_options,
    )


def telling_options(function: F) -> F:
    """Add the options that say how a result that is always verified is told."""
    return decorated(
        function,
        click.option("--no-measure", "measure", flag_value=False, default=True, help="Do not time the result."),
        report_file_option(),
        click.option("--verbose", "-v", is_flag=True, help="List every edit and every near miss."),
        quiet_option(),
    )
