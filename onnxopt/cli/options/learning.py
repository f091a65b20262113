"""What is learnt from, and how."""

from __future__ import annotations

import click

from onnxopt.cli.options.results import json_option, quiet_option, report_file_option
from onnxopt.cli.options.running import provider_options, seed_option, threads_option
from onnxopt.cli.options.values import F, Fraction, decorated

_NUMBER = click.IntRange(min=1)


def labelled_options(function: F) -> F:
    """Add the options of commands that fit a classifier to labelled samples."""
    return decorated(
        function,
        click.option(
            "--data",
            metavar="FILE|DIR|MODULE:FUNCTION",
            required=True,
            help='Labelled samples: an .npz with one array per input and "labels", samples along the first axis; or '
            "inputs in another form, with --labels.",
        ),
        click.option(
            "--labels",
            metavar="FILE",
            type=click.Path(),
            help='The classes of --data, an .npy; by default its key "labels".',
        ),
        click.option(
            "--classes", metavar="K", type=click.IntRange(min=2), help="Number of classes; the labels must hold them."
        ),
        click.option(
            "--folds",
            metavar="N",
            type=click.IntRange(min=2),
            default=5,
            show_default=True,
            help="Folds of cross-validation.",
        ),
        provider_options,
        seed_option(),
        report_file_option(),
        quiet_option(),
    )


def training_options(function: F) -> F:
    """Add the options of training. What is not given is None; `given` leaves it to the defaults of the library."""
    return decorated(
        function,
        click.option("--output", "-o", metavar="OUT", type=click.Path(), required=True, help="Where the result goes."),
        _parameters,
        _steps,
        _judging,
        _normalization,
        _variety,
        click.option(
            "--checkpoint",
            metavar="FILE.safetensors",
            type=click.Path(dir_okay=False),
            help="Keep the state after each epoch here, and go on from it.",
        ),
        threads_option(),
        click.option(
            "--device",
            type=click.Choice(["cpu", "cuda"]),
            help="What torch computes on; ONNX Runtime, which judges, stays on the processor.",
        ),
        seed_option(),
        json_option(),
        quiet_option(),
    )


def _parameters(function: F) -> F:
    """Add what says which parameters are trained."""
    return decorated(
        function,
        click.option(
            "--freeze", metavar="GLOB", multiple=True, help="Leave parameters of such names; may be repeated."
        ),
        click.option(
            "--train", metavar="GLOB", multiple=True, help="Train only parameters of such names; may be repeated."
        ),
    )


def _steps(function: F) -> F:
    """Add what says how many steps are taken, and how long they are."""
    return decorated(
        function,
        click.option(
            "--epochs",
            metavar="N",
            type=_NUMBER,
            help="Most passes over the samples; by default 20, and 100 for distill.",
        ),
        click.option(
            "--learning-rate",
            "--lr",
            metavar="RATE",
            type=float,
            help="Highest learning rate, by default 0.001; try 5e-5 for transformers.",
        ),
        click.option("--batch", metavar="N", type=_NUMBER, help="Samples per step, by default 32."),
        click.option(
            "--weight-decay", metavar="X", type=float, help="Decay of matrices; by default 0.01, and 0 for distill."
        ),
        click.option(
            "--layer-decay",
            metavar="FACTOR",
            type=float,
            help="Factor of the learning rate from a layer to the one before it, by default 1.",
        ),
    )


def _judging(function: F) -> F:
    """Add what says which samples judge, and when to stop."""
    return decorated(
        function,
        click.option(
            "--validation",
            type=Fraction(below_one=True),
            help="Share of the samples that judge and are not learnt from, by default 20%, and 10% for distill; 0 "
            "keeps the last epoch unjudged.",
        ),
        click.option(
            "--judging-folds",
            metavar="N",
            type=click.IntRange(min=2),
            help="Judge by folds instead of --validation: train N times without a part of the samples and judge by it; "
            "then train on all of them, to the last epoch.",
        ),
        click.option(
            "--patience",
            metavar="N",
            type=_NUMBER,
            help="Stop after so many epochs without a better state; by default 5, and 25 for distill.",
        ),
    )


def _normalization(function: F) -> F:
    """Add what says how BatchNormalization is trained."""
    return decorated(
        function,
        click.option(
            "--batchnorm",
            type=click.Choice(["frozen", "batch", "restored"]),
            help="Statistics that BatchNormalization goes by: those in the model (frozen, default) or each batch's. "
            "restored also puts one behind each Conv and Gemm but the last, and folds it in at the end.",
        ),
        click.option(
            "--batchnorm-behind",
            metavar="GLOB",
            multiple=True,
            help="Restore one only behind layers whose weights have such names; may be repeated.",
        ),
    )


def _variety(function: F) -> F:
    """Add what says how samples are varied."""
    return decorated(
        function,
        click.option("--shift", metavar="PIXELS", type=click.IntRange(min=0), help="Move images at random by so much."),
        click.option("--noise", type=Fraction(), help="Add noise, as a fraction of the inputs' deviation."),
        click.option(
            "--mix",
            metavar="ALPHA",
            type=float,
            help="Mix pairs of samples (mixup); 0 for none, by default for finetune, and 1 by default for distill.",
        ),
    )
