"""`onnxopt.finetune`: the parameters of a model trained on labelled samples, the graph as it was."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Unpack

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import runtime
from onnxopt.analysis.task import main_output
from onnxopt.errors import DataError, UsageError
from onnxopt.feeds import Feed
from onnxopt.model import load
from onnxopt.training.examples import Examples, Source, load_examples
from onnxopt.training.options import TrainingOptions
from onnxopt.training.requirement import require_torch
from onnxopt.training.trained import Trained

if TYPE_CHECKING:
    from onnxopt.training.settings import Settings


def finetune(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    data: Source,
    labels: str | os.PathLike[str] | np.ndarray | None = None,
    *,
    label_smoothing: float = 0.0,
    blend: float = 1.0,
    **options: Unpack[TrainingOptions],
) -> Trained:
    """Train a model's parameters on labelled samples.

    The graph is interpreted in torch, after a comparison with ONNX Runtime on the first samples. The parameters are
    the floating-point constants of the model; they are written back by name, in their own type, and the graph is as
    it was. The state that does best on the validation samples is kept, which may be the one it began with. Zeros of
    pruned matrices stay zero, and equal values of a codebook stay equal.

    Args:
        model: The model. It is not changed.
        data: Samples: an .npz with one array per input, a folder of them, or input -> array.
        labels: Classes (integers, one axis less than the output) or targets (of the output's shape): an array, a
            file, or a key of the .npz.
        label_smoothing: Share of each label that is spread over all classes.
        blend: How far the result goes from what was there to what was trained; 0.5 after `onnxopt.head`, whose head is
            the best one for few samples already (WiSE-FT, arXiv:2109.01903).
        **options: How to train; see `TrainingOptions`.

    Raises:
        UsageError: If torch is missing, or an option cannot be used.
        DataError: If samples or labels do not fit.
        ModelError: If torch cannot compute the model.
        NothingDoneError: If the model has no parameters that could be trained.
        VerificationError: If torch computes something else than the runtime.
    """
    require_torch("Fine-tuning")
    from onnxopt.training.devices import computing
    from onnxopt.training.objective import objective
    from onnxopt.training.run import Lesson, interpreted, teach
    from onnxopt.training.settings import settings
    from onnxopt.training.supervised import Supervised

    how = settings(options, {}, blend=blend)
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"label_smoothing must be at least 0 and below 1, not {label_smoothing}.", "label_smoothing")
    source = load(model)
    examples = load_examples(source, data, labels)
    if examples.labels is None:
        raise DataError("There are no labels; give them with labels, or as the key labels of the .npz.")
    with computing(how.device, how.threads):
        # labels before the interpreter, whose comparison with the runtime takes long on large models
        goal = objective(source, examples.labels, _output_shape(source, examples, how), label_smoothing)
        interpreter = interpreted(source, examples, how, "this model")
        is_share = goal.task == "classification"

        def right(feed: Feed, truth: np.ndarray | None, output: np.ndarray) -> np.ndarray:
            assert truth is not None
            return goal.right(output, truth)

        lesson = Lesson(
            aim=Supervised(interpreter, goal),
            targets=(f"the {'classes' if is_share else 'targets'} of {goal.output}",),
            output=goal.output,
            measure="accuracy" if is_share else "mean squared error",
            is_share=is_share,
            right=right,
            key=label_smoothing,
        )
        return teach(interpreter, lesson, examples, how)


def _output_shape(model: ir.Model, examples: Examples, settings: Settings) -> tuple[int, ...]:
    """Return the shape of the main output on the first sample; of rank 0 where there is none."""
    value = main_output(model)
    if value is None:
        return ()
    with runtime.open_session(model, settings.options, optimized=True) as session:
        return np.shape(session.run(examples.feeds[0])[value.name or ""])
