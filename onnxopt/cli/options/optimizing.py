"""What is done to a model, and within what budget."""

from __future__ import annotations

from collections.abc import Callable

import click

from onnxopt.cli.options.values import Choice, F, Fraction, PipelineText, Sizes, decorated, names, recipe_names

METRICS = ["top1", "ctc", "cosine", "mse", "spearman"]


def passes_option(text: str, *, required: bool = False) -> Callable[[F], F]:
    """Add `--passes`."""
    return click.option("--passes", "-p", type=PipelineText(), required=required, help=text)


def recipe_option() -> Callable[[F], F]:
    """Add `--recipe`."""
    return click.option(
        "--recipe",
        "-r",
        metavar="NAME|FILE.toml",
        type=Choice("NAME", recipe_names, files=True),
        help='A named pipeline, or a file with one. "lossless" by default; given a budget alone, the best is searched.',
    )


def max_error_option(text: str) -> Callable[[F], F]:
    """Add `--max-error`."""
    return click.option("--max-error", type=Fraction(infinite=True), help=text)


def force_calibration_option() -> Callable[[F], F]:
    """Add `--force-calibration`."""
    return click.option(
        "--force-calibration",
        is_flag=True,
        help="Without --data: let passes that learn from data learn from generated inputs. Quality on real inputs "
        "will differ.",
    )


def metric_option() -> Callable[[F], F]:
    """Add `--metric`."""
    return click.option(
        "--metric",
        type=Choice("NAME|MODULE:FUNCTION", names(*METRICS)),
        help="What --max-drop is about: top1, ctc, cosine, mse, spearman, or a function. By default what fits labels "
        "and outputs.",
    )


def drop_options(function: F) -> F:
    """Add the options of a budget in points of a metric."""
    return decorated(
        function,
        click.option(
            "--max-drop",
            type=Fraction(below_one=True),
            metavar="P%",
            help="Budget: the largest drop of the metric, for example 0.5%. Needs --data.",
        ),
        metric_option(),
        click.option(
            "--labels",
            metavar="FILE",
            type=click.Path(),
            help="Labels of --data, an .npy or .npz with one per sample. Without them the metric compares with MODEL.",
        ),
    )


def search_options(function: F) -> F:
    """Add the options of the search within a budget."""
    return decorated(
        function,
        click.option(
            "--objective",
            type=click.Choice(("latency", "size")),
            default="latency",
            show_default=True,
            help="Given a budget alone: search for the fastest model within it, or the smallest that is not slower.",
        ),
        click.option(
            "--state",
            metavar="FILE.json",
            type=click.Path(dir_okay=False),
            help="Where an interrupted search is remembered, to go on with the same command. By default "
            "OUT.search.json until it is done.",
        ),
        click.option(
            "--prune",
            is_flag=True,
            help="Let the search also remove channels, before and besides quantizing, where a forecast leaves hope. "
            "Needs --data, and takes minutes for larger models.",
        ),
    )


def patch_options(function: F) -> F:
    """Add `--patch` and `--replay`."""
    return decorated(
        function,
        click.option(
            "--patch",
            metavar="FILE",
            type=click.Path(),
            help="Also write how OUT differs from MODEL, to make it again with --replay.",
        ),
        click.option(
            "--replay",
            metavar="FILE",
            type=click.Path(),
            help="Instead of passes: make again from MODEL what --patch has written, then verify and measure it.",
        ),
    )


def opset_option() -> Callable[[F], F]:
    """Add `--opset`."""
    return click.option(
        "--opset",
        metavar="N",
        type=click.IntRange(min=1),
        help="Convert the standard operator set to this version first; a lower one works for few models.",
    )


def fix_shape_option() -> Callable[[F], F]:
    """Add `--fix-shape`."""
    return click.option(
        "--fix-shape",
        type=Sizes(),
        help="Sizes of dynamic axes to write into the result, for example batch=1.",
    )
