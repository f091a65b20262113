"""One vocabulary of options for all commands: each option is written here, once."""

from onnxopt.cli.options.learning import labelled_options, training_options
from onnxopt.cli.options.optimizing import (
    drop_options,
    fix_shape_option,
    force_calibration_option,
    max_error_option,
    metric_option,
    opset_option,
    passes_option,
    patch_options,
    recipe_option,
    search_options,
)
from onnxopt.cli.options.results import (
    json_option,
    output_options,
    report_options,
    telling_options,
)
from onnxopt.cli.options.running import (
    model_argument,
    running_options,
    seed_option,
    shape_option,
    target_option,
    threads_option,
)
from onnxopt.cli.options.values import Choice, Fraction, Sizes, given, pass_names

__all__ = [
    "Choice",
    "Fraction",
    "Sizes",
    "drop_options",
    "fix_shape_option",
    "force_calibration_option",
    "given",
    "json_option",
    "labelled_options",
    "max_error_option",
    "metric_option",
    "model_argument",
    "opset_option",
    "output_options",
    "pass_names",
    "passes_option",
    "patch_options",
    "recipe_option",
    "report_options",
    "running_options",
    "search_options",
    "seed_option",
    "shape_option",
    "target_option",
    "telling_options",
    "threads_option",
    "training_options",
]
