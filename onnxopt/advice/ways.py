"""The ways to a classifier, each as a function from samples to learn from to classes of samples to judge by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Progress
from onnxopt.errors import DataError
from onnxopt.feeds import Data
from onnxopt.graph import all_nodes, is_op
from onnxopt.heads.features import run_up_to
from onnxopt.heads.plan import Plan, written
from onnxopt.probe import ridge
from onnxopt.probe.classifier import Array, Linear
from onnxopt.probe.validation import compare
from onnxopt.runtime import RunOptions

Classify = Callable[[Array, Array], Array]
"""Rows to learn from, rows to judge -> the classes of the latter."""

BATCH = 32
"""Samples per step of training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How all layers are trained.

    Attributes:
        steps: The least number of steps.
        learning_rate: Of the last layer, at its highest.
        layer_decay: Factor of it from a layer to the one before.
        blend: How far the result goes from where training began.
    """

    steps: int
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    blend: float = 1.0


SCRATCH = Recipe(steps=240)
"""From random parameters."""

FINE = Recipe(steps=100, layer_decay=0.7, blend=0.5)
"""From a model with a fitted head: chosen on three draws of digits that no reported figure is of."""

SMOOTHING = 0.1
"""Share of each label that is spread over all classes, for both."""

SHIFT = 0.07
"""Images move at random by this part of their shorter side, for both."""

FEWEST_EPOCHS = 8

_MOST_INPUTS = 20_000
"""Elements of a sample up to which a linear classifier on the inputs is tried."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """Features of all samples at one layer."""

    plan: Plan
    features: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A classification task for a model.

    Attributes:
        model: The model.
        data: The samples.
        numbers: The class of each.
        classes: Names of the classes.
        layers: Features that a head can take, those of the old head first.
        options: How the model is run.
        seed: Seeds training and inner folds.
        progress: Told about the runs.
    """

    model: ir.Model
    data: Data
    numbers: Array
    classes: tuple[str, ...]
    layers: tuple[Layer, ...]
    options: RunOptions
    seed: int
    progress: Progress

    def fitted(self, train: Array, *, layers: Sequence[Layer] | None = None) -> tuple[Layer, Linear]:
        """Fit a head to some samples, at the layer that is best among these samples alone."""
        chosen = _best(self.layers if layers is None else layers, self.numbers, train, len(self.classes), self.seed)
        return chosen, ridge.fit(chosen.features[train], self.numbers[train], len(self.classes))

    def with_head(self, layer: Layer, fitted: Linear) -> ir.Model:
        """Return the model with a head."""
        model, _, _ = written(self.model, layer.plan, fitted, self.classes)
        return model

    def classified(self, model: ir.Model, output: str, rows: Array) -> Array:
        """Return which class a model gives samples."""
        scores = run_up_to(model, output, self.data.select([int(r) for r in rows]), self.options, self.progress)
        return np.asarray(scores.reshape(len(rows), -1).argmax(axis=1))


def by_head(task: Task) -> Classify:
    """Return the way of a new head."""

    def classify(train: Array, test: Array) -> Array:
        layer, fitted = task.fitted(train)
        return np.asarray(fitted.scores(layer.features[test]).argmax(axis=1))

    return classify


def by_fine_tuning(task: Task) -> Classify:
    """Return the way of a new head after which all layers are trained.

    A fitted head keeps the first steps from spoiling the features (Kumar et al., "Fine-Tuning can Distort Pretrained
    Features and Underperform Out-of-Distribution", 2022). The result is halfway between the model with the fitted head
    and the trained one.
    """

    def classify(train: Array, test: Array) -> Array:
        layer, fitted = task.fitted(train)
        model = _trained(task, task.with_head(layer, fitted), train, FINE)
        return task.classified(model, layer.plan.output, test)

    return classify


def by_scratch(task: Task) -> Classify:
    """Return the way of the same layers with random parameters."""

    def classify(train: Array, test: Array) -> Array:
        from onnxopt.training.reinitialize import reinitialize

        layer, fitted = task.fitted(train, layers=task.layers[:1])
        model = reinitialize(task.with_head(layer, fitted), task.seed)
        model = _trained(task, model, train, SCRATCH)
        return task.classified(model, layer.plan.output, test)

    return classify


def by_inputs(features: Array, numbers: Array, count: int) -> Classify:
    """Return the way of a linear classifier on the inputs themselves, without the model."""

    def classify(train: Array, test: Array) -> Array:
        fitted = ridge.fit(features[train], numbers[train], count)
        return np.asarray(fitted.scores(features[test]).argmax(axis=1))

    return classify


def flat_inputs(data: Data) -> Array | None:
    """Return the inputs of every sample as one vector; None where a linear classifier on them makes no sense.

    That is where an input holds no floating-point numbers, samples differ in shape, or have too many elements.
    """
    rows: list[Array] = []
    for feed in data:
        values = list(feed.values())
        if any(not isinstance(v, np.ndarray) or v.dtype.kind != "f" for v in values):
            return None
        if any(v.ndim == 0 or v.shape[0] != 1 for v in values) or sum(v.size for v in values) > _MOST_INPUTS:
            return None
        rows.append(np.concatenate([v.ravel() for v in values]).astype(np.float32))
        if rows[0].shape != rows[-1].shape:
            return None
    return np.stack(rows)


def lacks_normalization(model: ir.Model) -> bool:
    """Return whether a convolutional net has no normalization: most were folded, and train badly from scratch so."""
    kinds = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization")
    nodes = list(all_nodes(model))
    return sum(is_op(n, "Conv") for n in nodes) > 8 and not any(is_op(n, *kinds) for n in nodes)


def _best(layers: Sequence[Layer], numbers: Array, train: Array, count: int, seed: int) -> Layer:
    """Return the layer whose features ridge regression classifies best, by folds of the training samples."""
    folds = min(3, int(np.bincount(numbers[train], minlength=count).min()))
    if len(layers) == 1 or folds < 2:
        return layers[0]
    right = [
        compare(("ridge",), layer.features[train], numbers[train], count, folds=folds, seed=seed)[0].accuracy.right
        for layer in layers
    ]
    return layers[int(np.argmax(right))]


def _trained(task: Task, model: ir.Model, train: Array, recipe: Recipe) -> ir.Model:
    """Train all parameters on some samples.

    Raises:
        DataError: If samples come in batches of a fixed size, whose rows cannot be chosen.
    """
    if len(task.numbers) != len(task.data):
        raise DataError("The model takes batches of a fixed size; make their axis dynamic to compare ways of training.")
    return trained(model, task.data.select([int(r) for r in train]), task.numbers[train], recipe, task.seed)


def trained(model: ir.Model, data: Data, numbers: Array, recipe: Recipe, seed: int) -> ir.Model:
    """Train all parameters of a model.

    Args:
        model: It is not changed.
        data: The samples.
        numbers: The class of each.
        recipe: How.
        seed: Seeds the order and the variants of samples.
    """
    from onnxopt.training.finetune import finetune

    images = [v for v in next(iter(data)).values() if isinstance(v, np.ndarray) and v.ndim == 4 and v.dtype.kind == "f"]
    return finetune(
        model,
        data,
        numbers,
        epochs=max(FEWEST_EPOCHS, round(recipe.steps / max(1, -(-len(numbers) // BATCH)))),
        learning_rate=recipe.learning_rate,
        layer_decay=recipe.layer_decay,
        blend=recipe.blend,
        label_smoothing=SMOOTHING,
        shift=min((round(SHIFT * min(v.shape[2:])) for v in images), default=0),
        batch=BATCH,
        validation=0,
        seed=seed,
    ).model
