"""What is minimized, and how well a model does, from the kind of labels there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from onnxopt.analysis.task import class_scores, main_output
from onnxopt.errors import DataError

IGNORED = -100
"""A class label that does not count, such as that of padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Objective:
    """A task.

    Attributes:
        task: "classification" or "regression".
        output: The output of the model that the labels are about.
        computed: The value of the graph that the loss is computed from: the scores before a final Softmax.
        loss: Computed value and labels of a batch -> mean loss.
        right: Output and labels of samples -> for each whether it is right, or its squared error.
    """

    task: str
    output: str
    computed: str
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    right: Callable[[np.ndarray, np.ndarray], np.ndarray]


def objective(model: ir.Model, labels: np.ndarray, shape: tuple[int, ...], smoothing: float = 0.0) -> Objective:
    """Find out what labels are about.

    Args:
        model: The model.
        labels: Those of all samples: integers with one axis less than the output are classes; floating-point
            numbers of the output's shape are targets.
        shape: Shape of the main output for one sample, the first axis included.
        smoothing: The share of each label that is spread over all classes.

    Raises:
        DataError: If they fit no output.
    """
    value = main_output(model)
    if value is None or value.name is None:
        raise DataError("The model has no floating-point output that labels could be about.")
    name = value.name
    if labels.dtype.kind in "iub" and _class_axis(shape, labels.shape) is not None:
        axis = _class_axis(shape, labels.shape)
        assert axis is not None
        counted = labels[labels != IGNORED]
        if not counted.size:
            raise DataError(f"All labels are {IGNORED}, which stands for what does not count.")
        least, most = int(counted.min()), int(counted.max())
        if most >= shape[axis] or least < 0:
            raise DataError(
                f'Labels reach from {least} to {most}, but the output "{name}" scores {shape[axis]} classes, '
                f"0 to {shape[axis] - 1}."
            )
        computed, is_logarithm = scores_before(model, value)
        return Objective("classification", name, computed, _cross_entropy(axis, smoothing, is_logarithm), _hits(axis))
    one = labels.shape[1:] == shape[1:-1] and shape[-1] == 1
    if labels.dtype.kind == "f" and (one or labels.shape[1:] == shape[1:]):
        if not np.isfinite(labels).all():
            raise DataError("The targets hold NaN or infinity, which nothing can be trained towards.")
        return Objective("regression", name, name, _squared, _squared_errors)
    raise DataError(
        f'Labels of type {labels.dtype} and shape {list(labels.shape)} do not fit the output "{name}" of shape '
        f"{list(shape)}: give a class per sample as an integer, or floating-point targets of the output's shape."
    )


def _class_axis(shape: tuple[int, ...], labels: tuple[int, ...]) -> int | None:
    """Return the axis of the output that has the classes, where labels have all others."""
    if len(shape) < 2:
        return None
    if labels[1:] == shape[1:-1] and shape[-1] > 1:
        return len(shape) - 1
    return 1 if labels[1:] == shape[2:] and shape[1] > 1 else None


def scores_before(model: ir.Model, output: ir.Value) -> tuple[str, bool]:
    """Return the value with scores whose softmax or logarithm of it is meant, and whether logarithms must be taken."""
    kind, producer = class_scores(model), output.producer()
    if kind == "Softmax" and producer is not None and producer.op_type == "Softmax":
        before = producer.inputs[0]
        if before is not None and before.name and before.producer() is not None:
            return before.name, False
    return output.name or "", kind == "Softmax"


def _cross_entropy(
    axis: int, smoothing: float, is_probability: bool
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = scores.movedim(axis, 1)
        if is_probability:
            scores = torch.log(scores.clamp(min=1e-12))
        if labels.is_floating_point():  # shares of the classes, made by mixing samples
            return functional.cross_entropy(scores, labels, label_smoothing=smoothing)
        return functional.cross_entropy(scores, labels.to(torch.int64), ignore_index=IGNORED, label_smoothing=smoothing)

    return loss


def _hits(axis: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def right(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        hits = np.argmax(scores, axis=axis) == labels
        counted = labels != IGNORED
        rows = tuple(range(1, labels.ndim))
        shares: np.ndarray = (hits & counted).sum(axis=rows) / np.maximum(counted.sum(axis=rows), 1)
        return shares

    return right


def _squared(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(values.reshape(targets.shape), targets.to(values.dtype))


def _squared_errors(values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    differences = (values.reshape(targets.shape).astype(np.float64) - targets) ** 2
    errors: np.ndarray = differences.reshape(len(targets), -1).mean(axis=1)
    return errors
