"""`onnxopt.finetune`: the parameters of a model trained on labelled samples, the graph as it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import runtime
from onnxopt.analysis.task import main_output
from onnxopt.contract import Progress
from onnxopt.errors import DataError, UsageError
from onnxopt.feeds import Feed
from onnxopt.model import load
from onnxopt.training.examples import Examples, Source, load_examples
from onnxopt.training.requirement import require_torch
from onnxopt.training.trained import Trained

if TYPE_CHECKING:
    from onnxopt.training.run import Settings


def finetune(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    data: Source,
    labels: str | os.PathLike[str] | np.ndarray | None = None,
    *,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    batch: int = 32,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    layer_decay: float = 1.0,
    clip: float = 1.0,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    validation: float = 0.2,
    patience: int = 5,
    blend: float = 1.0,
    label_smoothing: float = 0.0,
    shift: int = 0,
    noise: float = 0.0,
    mix: float = 0.0,
    seed: int = 0,
    threads: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
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
        epochs: Passes over the samples, at most.
        learning_rate: Of the last layer, at its highest; it rises at first and then falls along a cosine.
        batch: Samples per step.
        weight_decay: Decay of matrices.
        warmup: Share of the steps over which the learning rate rises.
        layer_decay: Factor of the learning rate from a layer to the one before it.
        clip: Largest norm of the gradient.
        train: Patterns of the names of parameters that are trained; all by default.
        freeze: Patterns of those that are not.
        validation: Share of the samples that judge and are not learnt from; 0 for none, and then the last epoch's
            state is kept.
        patience: Epochs without a better state after which training ends.
        blend: How far the result goes from what was there to what was trained; 0.5 after `onnxopt.head`, whose head is
            the best one for few samples already (WiSE-FT, arXiv:2109.01903).
        label_smoothing: Share of each label that is spread over all classes.
        shift: Pixels by which images move at random.
        noise: Noise that is added to inputs, as a fraction of their standard deviation.
        mix: Parameter of the beta distribution by which samples are mixed; 0 for none.
        seed: The same seed gives the same result on the same machine.
        threads: Threads of torch and of the runtime.
        checkpoint: File for the state after each epoch, in the safetensors format; training goes on from it.
        progress: Told what is being done.

    Raises:
        UsageError: If torch is missing, or an option cannot be used.
        DataError: If samples or labels do not fit.
        ModelError: If torch cannot compute the model.
        NothingDoneError: If the model has no parameters that could be trained.
        VerificationError: If torch computes something else than the runtime.
    """
    require_torch("Fine-tuning")
    from onnxopt.training.augment import Augmentation
    from onnxopt.training.objective import objective
    from onnxopt.training.recipe import Recipe
    from onnxopt.training.run import Lesson, Settings, interpreted, teach, using_threads
    from onnxopt.training.supervised import Supervised

    settings = Settings(
        recipe=Recipe(
            epochs=epochs,
            learning_rate=learning_rate,
            batch=batch,
            weight_decay=weight_decay,
            warmup=warmup,
            layer_decay=layer_decay,
            clip=clip,
            patience=patience,
            blend=blend,
            seed=seed,
        ),
        augmentation=Augmentation(shift=shift, noise=noise, mix=mix),
        train=train,
        freeze=freeze,
        validation=validation,
        threads=threads,
        checkpoint=checkpoint,
        progress=progress,
    )
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"label_smoothing must be at least 0 and below 1, not {label_smoothing}.", "label_smoothing")
    source = load(model)
    examples = load_examples(source, data, labels)
    if examples.labels is None:
        raise DataError("There are no labels; give them with labels, or as the key labels of the .npz.")
    with using_threads(threads):
        interpreter = interpreted(source, examples, settings, "this model")
        goal = objective(source, examples.labels, _output_shape(source, examples, settings), label_smoothing)
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
        return teach(interpreter, lesson, examples, settings)


def _output_shape(model: ir.Model, examples: Examples, settings: Settings) -> tuple[int, ...]:
    """Return the shape of the main output on the first sample; of rank 0 where there is none."""
    value = main_output(model)
    if value is None:
        return ()
    with runtime.open_session(model, settings.options, optimized=True) as session:
        return np.shape(session.run(examples.feeds[0])[value.name or ""])
