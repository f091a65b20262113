"""One vocabulary of options for all commands: each option is written here, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from onnxopt.contract import TARGETS

F = TypeVar("F", bound=Callable[..., Any])
if TYPE_CHECKING:  # older versions of click have no generic ParamType
    SizesParam = click.ParamType[dict[str, int]]
    FractionParam = click.ParamType[float]
    TextParam = click.ParamType[str]
else:
    SizesParam = FractionParam = TextParam = click.ParamType


class Sizes(SizesParam):
    """`batch=1,seq=128` as a mapping."""

    name = "AXIS=N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        """Read the sizes."""
        if isinstance(value, dict):
            return value
        sizes: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in str(value).split(","))):
            axis, equals, number = (part.strip() for part in item.rpartition("="))
            if not equals or not axis:
                self.fail(f'"{item}" is not AXIS=N; write for example batch=1,seq=128.', param, ctx)
            if not (number.isascii() and number.isdigit()):
                self.fail(f'The size of "{axis}" must be a whole number, not "{number}".', param, ctx)
            if axis in sizes:
                self.fail(f'The axis "{axis}" is given twice.', param, ctx)
            sizes[axis] = int(number)
        if not sizes:
            self.fail("it is empty; write for example batch=1,seq=128.", param, ctx)
        return sizes


class Fraction(FractionParam):
    """A fraction of one, also as a percentage: `0.005` and `0.5%` are the same."""

    name = "FRACTION"

    def __init__(self, *, infinite: bool = False, below_one: bool = False) -> None:
        """Accept fractions.

        Args:
            infinite: Whether `inf` is allowed.
            below_one: Whether a number of 1 and more is refused unless written as a percentage.
        """
        self._infinite = infinite
        self._below_one = below_one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the fraction."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            self.fail(f'"{value}" is not a number; write 0.005 or 0.5%.', param, ctx)
        percent = text.endswith("%")
        if math.isnan(number) or number < 0:
            self.fail(f"it must be 0 or more, not {text}.", param, ctx)
        if math.isinf(number) and not self._infinite:
            self.fail("it must be finite; write 0.005 or 0.5%.", param, ctx)
        if self._below_one and not percent and number >= 1:
            self.fail(f"{text} is ambiguous; write {text}% or a fraction below 1.", param, ctx)
        return number / 100 if percent else number


class Choice(TextParam):
    """A name out of several that are known only when asked for; nothing is refused here.

    What the name means is decided where it is used, which gives the better message.
    """

    def __init__(self, metavar: str, known: Callable[[], list[tuple[str, str]]], *, files: bool = False) -> None:
        """Complete names.

        Args:
            metavar: What help calls the value.
            known: Returns (name, help) pairs.
            files: Whether a file is allowed as well.
        """
        self.name = metavar
        self._known = known
        self._files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names that go on from what is typed."""
        found = [CompletionItem(n, help=text) for n, text in self._known() if n.startswith(incomplete)]
        return [*found, CompletionItem(incomplete, type="file")] if self._files else found


class PipelineText(TextParam):
    """A pipeline string; completion offers pass names after each comma."""

    name = "PIPELINE"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the pass names that go on from the last comma."""
        done, comma, start = incomplete.rpartition(",")
        return [CompletionItem(done + comma + n, help=t) for n, t in pass_names() if n.startswith(start)]


def pass_names() -> list[tuple[str, str]]:
    """Return (name, summary) of every pass."""
    from onnxopt.registry import entries

    return [(e.name, e.summary) for e in entries().values()]


def recipe_names() -> list[tuple[str, str]]:
    """Return (name, summary) of every built-in recipe."""
    from onnxopt.pipeline import RECIPES

    return [(r.name, r.summary) for r in RECIPES.values()]


PROVIDERS = ["cpu", "cuda", "tensorrt", "openvino", "dml", "coreml", "qnn", "webgpu"]
METRICS = ["top1", "cosine", "mse", "spearman"]


def _names(*names: str) -> Callable[[], list[tuple[str, str]]]:
    return lambda: [(name, "") for name in names]


def model_argument(name: str = "model", *, required: bool = True) -> Callable[[F], F]:
    """Add a model path."""
    return click.argument(name, metavar=name.upper(), type=click.Path(), required=required)


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


def target_option() -> Callable[[F], F]:
    """Add `--target`."""
    return click.option(
        "--target",
        type=click.Choice(TARGETS),
        default="portable",
        show_default=True,
        help="portable: standard ONNX ops only. cpu, cuda: also ops that ONNX Runtime has kernels for there.",
    )


def max_error_option(text: str) -> Callable[[F], F]:
    """Add `--max-error`."""
    return click.option("--max-error", type=Fraction(infinite=True), help=text)


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


def running_options(function: F) -> F:
    """Add the options that say how and with what a model is run."""
    return _decorated(
        function,
        click.option(
            "--data",
            metavar="FILE|DIR|MODULE:FUNCTION",
            help="Real inputs instead of generated ones: an .npz with one array per input (samples along the "
            "first axis) or with NAME/INPUT keys (one group per sample), a folder of .npz, or a function "
            "that yields dicts.",
        ),
        shape_option(),
        click.option(
            "--provider",
            type=Choice("NAME", _names(*PROVIDERS)),
            help="Execution provider to run on: cpu, cuda, ... By default the target's own.",
        ),
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Accept that the runtime runs the model, or some nodes, on another provider; the report says which.",
        ),
        threads_option(),
        click.option(
            "--custom-ops",
            metavar="LIB",
            multiple=True,
            type=click.Path(),
            help="Library with custom operators to load into ONNX Runtime; may be repeated.",
        ),
        seed_option(),
    )


def labelled_data_option(function: F) -> F:
    """Add the options that say what labelled samples there are, and how a model is run on them."""
    return _decorated(
        function,
        click.option(
            "--data",
            metavar="FILE|DIR|MODULE:FUNCTION",
            required=True,
            help='Labelled samples: an .npz with one array per input and "labels", samples along the first axis; or '
            "inputs in another form, with --labels.",
        ),
        click.option("--provider", type=Choice("NAME", _names(*PROVIDERS)), help="Execution provider to run on."),
        click.option("--allow-fallback", is_flag=True, help="Accept that the runtime runs nodes on another provider."),
        threads_option(),
        click.option(
            "--custom-ops",
            metavar="LIB",
            multiple=True,
            type=click.Path(),
            help="Library with custom operators to load into ONNX Runtime; may be repeated.",
        ),
        click.option(
            "--seed",
            metavar="N",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Seeds folds and draws of samples.",
        ),
    )


def training_options(function: F) -> F:
    """Add the options of training. What is not given is None; `given` leaves it to the defaults of the library."""
    number = click.IntRange(min=1)
    return _decorated(
        function,
        click.option(
            "--freeze", metavar="GLOB", multiple=True, help="Leave parameters of such names; may be repeated."
        ),
        click.option(
            "--train", metavar="GLOB", multiple=True, help="Train only parameters of such names; may be repeated."
        ),
        click.option(
            "--epochs",
            metavar="N",
            type=number,
            help="Most passes over the samples; by default 20, and 100 for distill.",
        ),
        click.option(
            "--learning-rate",
            "--lr",
            metavar="RATE",
            type=float,
            help="Highest learning rate, by default 0.001; try 5e-5 for transformers.",
        ),
        click.option("--batch", metavar="N", type=number, help="Samples per step, by default 32."),
        click.option(
            "--weight-decay", metavar="X", type=float, help="Decay of matrices; by default 0.01, and 0 for distill."
        ),
        click.option(
            "--layer-decay",
            metavar="FACTOR",
            type=float,
            help="Factor of the learning rate from a layer to the one before it, by default 1.",
        ),
        click.option(
            "--validation",
            type=Fraction(below_one=True),
            help="Share of the samples that judge and are not learnt from, by default 20%, and 10% for distill; 0 "
            "keeps the last epoch unjudged.",
        ),
        click.option(
            "--patience",
            metavar="N",
            type=number,
            help="Stop after so many epochs without a better state; by default 5, and 25 for distill.",
        ),
        click.option("--shift", metavar="PIXELS", type=click.IntRange(min=0), help="Move images at random by so much."),
        click.option("--noise", type=Fraction(), help="Add noise, as a fraction of the inputs' deviation."),
        click.option(
            "--mix",
            metavar="ALPHA",
            type=float,
            help="Mix pairs of samples (mixup); 0 for none, by default for finetune, and 1 by default for distill.",
        ),
        click.option(
            "--checkpoint",
            metavar="FILE.safetensors",
            type=click.Path(dir_okay=False),
            help="Keep the state after each epoch here, and go on from it.",
        ),
        threads_option(),
        seed_option(),
    )


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in settings.items() if value is not None}


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
        type=Choice("NAME|MODULE:FUNCTION", _names(*METRICS)),
        help="What --max-drop is about: top1, cosine, mse, spearman, or a function. By default what fits labels and "
        "outputs.",
    )


def search_options(function: F) -> F:
    """Add the options of the search within a budget."""
    decorators: tuple[Callable[[F], F], ...] = (
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
    )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def json_option() -> Callable[[F], F]:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def output_options(function: F) -> F:
    """Add the options that say where a result goes."""
    return _decorated(
        function,
        click.option("--output", "-o", metavar="OUT", type=click.Path(), help="Where the result goes."),
        click.option("--in-place", is_flag=True, help="Replace MODEL by the result."),
    )


def patch_options(function: F) -> F:
    """Add `--patch` and `--replay`."""
    return _decorated(
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


def drop_options(function: F) -> F:
    """Add the options of a budget in points of a metric."""
    return _decorated(
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


def report_options(function: F) -> F:
    """Add the options that say what is found out about a result, and how that is told."""
    return _decorated(
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
    return _decorated(
        function,
        click.option("--no-measure", "measure", flag_value=False, default=True, help="Do not time the result."),
        click.option(
            "--report",
            "reports",
            metavar="FILE",
            multiple=True,
            type=click.Path(),
            help="Also write the report to FILE.json or FILE.html; may be repeated.",
        ),
        click.option("--verbose", "-v", is_flag=True, help="List every edit and every near miss."),
        click.option("--quiet", "-q", is_flag=True, help="Print nothing but warnings and errors."),
    )


def _decorated(function: F, *decorators: Callable[[F], F]) -> F:
    for decorate in reversed(decorators):  # the last one applied comes first in the help
        function = decorate(function)
    return function
