"""Whether what a model has learnt helps with another task, and how to use it: tried out on the user's samples.

advice = onnxopt.advise("digits.onnx", data="letters.npz", source="digits.npz")
print(advice.verdict.sentence)
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.advice.shift import Shift, two_samples
from onnxopt.advice.verdict import Way, decide, difference, way
from onnxopt.advice.ways import (
    Classify,
    Layer,
    Task,
    by_fine_tuning,
    by_head,
    by_inputs,
    by_scratch,
    flat_inputs,
    lacks_normalization,
)
from onnxopt.contract import Progress, Silent
from onnxopt.errors import DataError, UsageError
from onnxopt.feeds import Data
from onnxopt.heads.features import run_up_to
from onnxopt.heads.labelled import Source, classes_of, load_labelled, load_unlabelled, require_enough
from onnxopt.heads.plan import Plan, earlier, inlined, plan
from onnxopt.model import load
from onnxopt.probe.classifier import Array
from onnxopt.probe.folds import stratified
from onnxopt.probe.validation import learning_curve
from onnxopt.report.advice import Advice, Curve
from onnxopt.runtime import RunOptions, run_options

WITHOUT_TORCH = (
    "torch is not installed, so training from scratch and fine-tuning were not tried: the new head is compared with a "
    "linear classifier on the inputs alone. pip install 'onnxopt[torch]' tries them."
)


def advise(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    data: Source,
    labels: str | os.PathLike[str] | Array | None = None,
    source: Source | None = None,
    classes: int | None = None,
    folds: int = 5,
    train: bool = True,
    provider: str | None = None,
    threads: int = 1,
    custom_ops: Sequence[str] = (),
    allow_fallback: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Advice:
    """Find out whether to transfer a model to another task, and how.

    On the same folds of the samples: a linear classifier on the inputs, a new head (at whichever of the last layers is
    best), the same followed by training of all layers, and the same layers trained from random parameters. The last two
    need torch.

    Args:
        model: It is not changed.
        data: Labelled samples of the new task, as `onnxopt.head` takes them.
        labels: A class per sample; None when they lie with the inputs as "labels".
        source: Samples like those the model was trained on; tested for being different to the model.
        classes: How many classes there are; None to take what the labels hold.
        folds: Folds of the cross-validation.
        train: Whether to try fine-tuning and training from scratch; False leaves out what takes long.
        provider: Execution provider.
        threads: Intra-op threads per session.
        custom_ops: Libraries with custom operators to register with ONNX Runtime.
        allow_fallback: Accept that the runtime runs nodes on another provider.
        seed: Seeds folds and training.
        progress: Told what is being done.

    Raises:
        DataError: If samples and labels do not fit each other, the model, or the number of folds; or if there is
            nothing to compare a new head with.
        ModelError: If nothing can serve as features, or torch cannot compute the model.
        UsageError: If an option cannot be used.
    """
    if folds < 2:
        raise UsageError(f"folds must be at least 2, not {folds}.", "folds")
    progress, started = progress or Silent(), time.perf_counter()
    options = run_options(provider, threads, custom_ops, allow_fallback)
    network = inlined(load(model))
    labelled = load_labelled(data, labels, network)
    kinds = classes_of(labelled, classes)
    layers = _layers(network, labelled.data, options, progress)
    if len(layers[0].features) != len(labelled.labels):
        raise DataError(
            f"{labelled.name} holds {len(labelled.labels)} labels, but the samples give {len(layers[0].features)} rows."
        )
    numbers = kinds.numbers(labelled)
    require_enough(numbers, kinds, folds)
    task = Task(network, labelled.data, numbers, kinds.names, layers, options, seed, Silent())
    inputs = flat_inputs(labelled.data)
    has_torch = importlib.util.find_spec("torch") is not None
    ways = _compared(task, _ways(task, inputs, train=train and has_torch), folds, progress)
    rivals = [w for w in ways if not w.transfers]
    if not rivals:
        raise DataError(
            "There is nothing to compare a new head with: a linear classifier makes no sense on these inputs, and "
            "training from scratch needs torch."
        )
    rival = max(rivals, key=lambda w: w.accuracy.share)
    differences = tuple(difference(w, rival) for w in ways if w.transfers)
    shift = None if source is None else _shift(network, source, layers[0], options, seed, progress)
    notes = _notes(task, train=train, has_torch=has_torch, source=source, shift=shift)
    curves = _curves(task, inputs, folds, progress)
    return Advice(
        model=os.fspath(model) if isinstance(model, (str, os.PathLike)) else "the model",
        data=labelled.data.name,
        samples=len(numbers),
        classes=kinds.names,
        folds=folds,
        ways=tuple(ways),
        differences=differences,
        shift=shift,
        verdict=decide(ways, differences),
        curves=curves,
        guessing=float(np.bincount(numbers).max() / len(numbers)),
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _layers(model: ir.Model, data: Data, options: RunOptions, progress: Progress) -> tuple[Layer, ...]:
    """Return the features of all samples that a head can take."""

    def layer(found: Plan) -> Layer:
        return Layer(found, run_up_to(found.trunk, found.features, data, options, progress))

    names: list[str | None] = [None, *earlier(model)]
    return tuple(layer(plan(model, data, options, name)) for name in names)


def _ways(task: Task, inputs: Array | None, *, train: bool) -> Mapping[str, tuple[str, Classify, bool]]:
    """Return what can be tried, the cheapest first: name -> (in words, how, whether it transfers)."""
    found: dict[str, tuple[str, Classify, bool]] = {}
    if inputs is not None:
        found["inputs"] = (
            "ridge regression on the inputs, without the model",
            by_inputs(inputs, task.numbers, len(task.classes)),
            False,
        )
    found["head"] = ("a new head, ridge regression on features", by_head(task), True)
    if train:
        found["fine-tuning"] = ("a new head, then all layers trained", by_fine_tuning(task), True)
        found["scratch"] = ("the same layers trained from random parameters", by_scratch(task), False)
    return found


def _compared(task: Task, ways: Mapping[str, tuple[str, Classify, bool]], folds: int, progress: Progress) -> list[Way]:
    """Try all ways on the same folds."""
    splits = stratified(task.numbers, folds, seed=task.seed)
    found = []
    for name, (about, classify, transfers) in ways.items():
        progress.stage(f"trying {name}", total=folds)
        right, started = np.zeros(len(task.numbers), dtype=bool), time.perf_counter()
        for train, test in splits:
            right[test] = classify(train, test) == task.numbers[test]
            progress.advance()
        seconds = time.perf_counter() - started
        found.append(way(name, about, right, splits, seconds, transfers=transfers))
    return found


def _shift(
    model: ir.Model, source: Source, layer: Layer, options: RunOptions, seed: int, progress: Progress
) -> Shift | None:
    """Compare source and target samples by the features of the old head."""
    data = load_unlabelled(source, model)
    features = run_up_to(layer.plan.trunk, layer.plan.features, data, options, progress)
    return two_samples(features, layer.features, seed=seed)


def _notes(task: Task, *, train: bool, has_torch: bool, source: Source | None, shift: Shift | None) -> tuple[str, ...]:
    notes = []
    if train and not has_torch:
        notes.append(WITHOUT_TORCH)
    if not train:
        notes.append("Training from scratch and fine-tuning were left out, as asked.")
    if train and has_torch and lacks_normalization(task.model):
        notes.append(
            "The convolutions have no normalization (exporters fold it into them), without which they train badly from "
            "random parameters: in the framework the model comes from, training from scratch would do better."
        )
    if source is not None and shift is None:
        notes.append("There are too few samples to test whether source and target data differ.")
    return tuple(notes)


def _curves(task: Task, inputs: Array | None, folds: int, progress: Progress) -> tuple[Curve, ...]:
    """Return accuracy against labelled samples, for the ways that take no training."""
    layer, _ = task.fitted(np.arange(len(task.numbers)))
    count = len(task.classes)
    found = [("head", layer.features)] + ([("inputs", inputs)] if inputs is not None else [])
    return tuple(
        Curve(
            name,
            learning_curve("ridge", features, task.numbers, count, folds=folds, seed=task.seed, progress=progress),
        )
        for name, features in found
    )
