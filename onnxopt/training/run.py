"""The way through a training: torch compared with the runtime, parameters fitted, the result judged by the runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from onnxopt import runtime
from onnxopt.errors import NothingDoneError
from onnxopt.feeds import Feed
from onnxopt.runtime import RunOptions
from onnxopt.training.examples import Examples, folds, split
from onnxopt.training.fit import Fit, fit, require_own
from onnxopt.training.forward import agreement, require_agreement
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.normalizing import Normalizing, normalizing
from onnxopt.training.parameters import choose, find_parameters, with_parameters
from onnxopt.training.problem import EVALUATION_BATCH, Aim, Problem
from onnxopt.training.settings import Settings
from onnxopt.training.trainable import Trainable, trainable, values_of
from onnxopt.training.trained import Score, Trained, score
from onnxopt.training.values import to_array

FEEDS_TO_CHECK = 4
"""On so many samples torch and the runtime are compared, before and after."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lesson:
    """What is to be learnt by a model.

    Attributes:
        aim: What is asked of it.
        targets: The same in words.
        output: The output that it is judged by.
        measure: What the judgement is called.
        is_share: Whether the judgement is a share of what is right, or else an error.
        right: Inputs, labels and output of a batch -> what each sample, or each part of it, scores.
        key: What tells it from others, besides model, samples and settings.
    """

    aim: Aim
    targets: tuple[str, ...]
    output: str
    measure: str
    is_share: bool
    right: Callable[[Feed, np.ndarray | None, np.ndarray], np.ndarray]
    key: object


def interpreted(model: ir.Model, examples: Examples, settings: Settings, what: str) -> Interpreter:
    """Return a model in torch, which computes what the runtime computes.

    Args:
        model: The model.
        examples: Samples; the models are compared on the first of them.
        settings: How to run.
        what: What the message calls the model.

    Raises:
        ModelError: If torch cannot compute it.
        VerificationError: If torch computes something else.
    """
    interpreter = Interpreter(model, runtime.evaluate_node)
    found = agreement(model, interpreter, examples.feeds[:FEEDS_TO_CHECK], settings.options)
    require_agreement(found, f"torch does not compute what {what} computes")
    return interpreter


def teach(interpreter: Interpreter, lesson: Lesson, examples: Examples, settings: Settings) -> Trained:
    """Train the parameters of a model.

    Args:
        interpreter: The model in torch.
        lesson: What it is to learn.
        examples: The samples, those that judge among them.
        settings: How.

    Raises:
        UsageError: If a pattern fits nothing, or the checkpoint belongs to another run.
        DataError: If there are too few samples, the loss is not finite, or the checkpoint cannot be read.
        NothingDoneError: If there are no parameters that could be trained, or their gradient is zero.
        VerificationError: If the runtime computes something else than what was trained.
    """
    start, model, options = time.perf_counter(), interpreter.model, settings.options
    learning, judging = split(examples, 0 if settings.judging_folds else settings.validation, settings.recipe.seed)
    trained, unreached = _reached(interpreter, _chosen(model, settings), examples.feeds[0], lesson.aim.values)
    key = _fingerprint(trained, examples, settings, lesson.key)
    _require_own_checkpoints(settings, key)
    before, after = None, None
    if settings.judging_folds:
        before, after = _by_folds(model, list(trained), lesson, examples, settings, key)
    found, normalized = _fitted(model, trained, lesson, learning, judging, settings, key)
    result = with_parameters(model, found.values)
    check = agreement(result, interpreter, examples.feeds[:FEEDS_TO_CHECK], options, found.values)
    require_agreement(check, "The trained model does not compute what was trained")
    if judging is not None:
        before, after = (_scored(_judged(m, lesson, judging, options), lesson) for m in (model, result))
    return Trained(
        result,
        lesson.targets,
        before,
        after,
        settings.judging_folds,
        tuple(trained),
        tuple(name for name, each in trained.items() if each.is_made),
        unreached,
        tuple(one.layer.weight for one in normalized.restored),
        tuple(each.output for each in normalized.running),
        tuple(interpreter.outside),
        found.epochs,
        found.best,
        found.resumed,
        check.worst,
        time.perf_counter() - start,
    )


def _fitted(
    model: ir.Model,
    trained: Mapping[str, Trainable],
    lesson: Lesson,
    learning: Examples,
    judging: Examples | None,
    settings: Settings,
    key: str,
) -> tuple[Fit, Normalizing]:
    """Optimize parameters on samples, judged by others or by none."""
    normalized = normalizing(model, trained, learning, settings)
    problem = Problem(lesson.aim, learning, judging, settings.augmentation)
    checkpoint = settings.checkpoint
    found = fit(problem, trained, normalized, settings.recipe, settings.progress, checkpoint=checkpoint, key=key)
    return found, normalized


def _fold_key(key: str, number: int) -> str:
    return f"{key}/{number}"


def _fold_checkpoint(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.fold{number}{path.suffix}")


def _require_own_checkpoints(settings: Settings, key: str) -> None:
    """See that all checkpoints which are there belong to this run, before hours go into the first of them.

    Raises:
        UsageError: If one belongs to another run.
        DataError: If one cannot be read.
    """
    path = settings.checkpoint
    if path is None:
        return
    require_own(path, key)
    for number in range(1, settings.judging_folds + 1):
        require_own(_fold_checkpoint(path, number), _fold_key(key, number))


def _by_folds(
    model: ir.Model, names: Sequence[str], lesson: Lesson, examples: Examples, settings: Settings, key: str
) -> tuple[Score, Score]:
    """Return how well the model does, and how well models do on samples that were trained on the others.

    No choice is made by these samples, so that the figures flatter nobody: every model is trained to the end.
    """
    each = np.zeros(len(examples))
    for number, (outside, inside) in enumerate(folds(examples, settings.judging_folds, settings.recipe.seed), 1):
        settings.progress.stage(f"fold {number} of {settings.judging_folds}")
        parameters = find_parameters(model)
        trained = {name: trainable(parameters[name]) for name in names}
        path = settings.checkpoint
        how = dataclasses.replace(settings, checkpoint=None if path is None else _fold_checkpoint(path, number))
        found, _ = _fitted(model, trained, lesson, outside, None, how, _fold_key(key, number))
        result = with_parameters(model, found.values)
        each[inside] = _judged(result, lesson, examples.select(inside), settings.options)
    return _scored(_judged(model, lesson, examples, settings.options), lesson), _scored(each, lesson)


def _chosen(model: ir.Model, settings: Settings) -> dict[str, Trainable]:
    """Return the parameters that are to be trained.

    Raises:
        NothingDoneError: If the model has none.
        UsageError: If a pattern fits nothing.
    """
    parameters = find_parameters(model)
    if not parameters:
        raise NothingDoneError("The model has no floating-point parameters that could be trained.")
    return {name: trainable(parameters[name]) for name in choose(parameters, settings.train, settings.freeze)}


def _reached(
    interpreter: Interpreter, trained: Mapping[str, Trainable], feed: Feed, names: Sequence[str]
) -> tuple[dict[str, Trainable], tuple[str, ...]]:
    """Return the parameters that a gradient reaches on a sample, and the names of the others.

    Raises:
        NothingDoneError: If none is left.
    """
    found = interpreter.run(feed, values_of(trained), names)
    total = sum((value.sum() for value in found.values()), torch.zeros(()))
    gradients: Sequence[torch.Tensor | None] = [None] * len(trained)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, [each.leaf for each in trained.values()], allow_unused=True)
    pairs = list(zip(trained.items(), gradients, strict=True))
    reached = {name: each for (name, each), gradient in pairs if gradient is not None}
    if not reached:
        outside = ", ".join(list(interpreter.outside)[:3])
        why = f", behind {outside}, which torch has no counterpart for" if outside else ""
        told = " and ".join(f'"{name}"' for name in names)
        raise NothingDoneError(f"No gradient of {told} reaches the parameters that were chosen{why}.")
    return reached, tuple(name for (name, _), gradient in pairs if gradient is None)


def _judged(model: ir.Model, lesson: Lesson, judging: Examples, options: RunOptions) -> np.ndarray:
    """Return what each sample scores by the runtime's outputs."""
    each = np.zeros(len(judging))
    with runtime.open_session(model, options, optimized=True) as session:
        for feed, members in judging.batches(range(len(judging)), EVALUATION_BATCH):
            output = np.asarray(session.run(feed, only=[lesson.output])[lesson.output])
            labels = None if judging.labels is None else judging.labels[members]
            each[members] = lesson.right(feed, labels, output).reshape(len(members), -1).mean(axis=1)
    return each


def _scored(each: np.ndarray, lesson: Lesson) -> Score:
    return score(lesson.measure, each, is_share=lesson.is_share)


def _fingerprint(trained: Mapping[str, Trainable], examples: Examples, settings: Settings, key: object) -> str:
    """Return what tells a run from others: its parameters, samples and settings."""
    kind = (settings.recipe, settings.augmentation, settings.validation, settings.judging_folds, settings.batchnorm)
    digest = hashlib.sha256(repr((*kind, tuple(settings.batchnorm_behind), key)).encode())
    for name, each in trained.items():
        digest.update(name.encode() + to_array(each.leaf).tobytes())
    for feed in examples.feeds:
        for name, value in feed.items():
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    if examples.labels is not None:
        digest.update(np.ascontiguousarray(examples.labels).tobytes())
    return digest.hexdigest()
