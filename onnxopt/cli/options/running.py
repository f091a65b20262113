"""What a command runs, with what inputs, and how."""

from __future__ import annotations

from collections.abc import Callable

import click

from onnxopt.cli.options.values import Choice, F, Sizes, decorated, names
from onnxopt.contract import TARGETS

PROVIDERS = ["cpu", "cuda", "tensorrt", "openvino", "dml", "coreml", "qnn", "webgpu"]


def model_argument(name: str = "model", *, required: bool = True) -> Callable[[F], F]:
    """Add a model path."""
    shown = name.upper() if required else f"[{name.upper()}]"
    return click.argument(name, metavar=shown, type=click.Path(), required=required)


def target_option() -> Callable[[F], F]:
    """Add `--target`."""
    return click.option(
        "--target",
        type=click.Choice(TARGETS),
        default="portable",
        show_default=True,
        help="portable: standard ONNX ops only. cpu, cuda: also ops that ONNX Runtime has kernels for there.",
    )


def seed_option() -> Callable[[F], F]:
    """Add `--seed`."""
    return click.option(
        "--seed",
        metavar="N",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seeds generated inputs, sampling and the confidence interval.",
    )


def shape_option() -> Callable[[F], F]:
    """Add `--shape`."""
    return click.option("--shape", type=Sizes(), help="Sizes of dynamic axes to run with, for example batch=1,seq=128.")


def threads_option() -> Callable[[F], F]:
    """Add `--threads`."""
    return click.option(
        "--threads",
        metavar="N",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Threads that ONNX Runtime uses per session.",
    )


def custom_ops_option() -> Callable[[F], F]:
    """Add `--custom-ops`."""
    return click.option(
        "--custom-ops",
        metavar="LIB",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False),
        help="Library with custom operators to load into ONNX Runtime; may be repeated.",
    )


def provider_options(function: F) -> F:
    """Add the options that say what a model runs on."""
    return decorated(
        function,
        click.option(
            "--provider",
            type=Choice("NAME", names(*PROVIDERS)),
            help="Execution provider to run on: cpu, cuda, ... By default the target's own; where that is not "
            "installed, outputs are compared on the cpu and nothing is timed.",
        ),
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Accept that the runtime runs the model, or some nodes, on another provider; the report says which.",
        ),
        threads_option(),
        custom_ops_option(),
    )


def running_options(function: F) -> F:
    """Add the options that say how and with what a model is run."""
    return decorated(
        function,
        click.option(
            "--data",
            metavar="FILE|DIR|MODULE:FUNCTION",
            help="Real inputs instead of generated ones: an .npz with one array per input (samples along the "
            "first axis) or with NAME/INPUT keys (one group per sample), a folder of .npz, or a function "
            "that yields dicts.",
        ),
        shape_option(),
        provider_options,
        seed_option(),
    )
