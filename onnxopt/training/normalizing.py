"""Normalization by the statistics of batches (Ioffe and Szegedy, arXiv:1502.03167), in training only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.nn import functional

from onnxopt.calibrate.collector import observe
from onnxopt.errors import UsageError
from onnxopt.numeric.channel_moments import ChannelMoments
from onnxopt.training.batchnorm import Layer, Present, chosen, layers_without, present
from onnxopt.training.call import Call, Operator
from onnxopt.training.examples import Examples
from onnxopt.training.settings import Settings
from onnxopt.training.table import operator
from onnxopt.training.trainable import Trainable
from onnxopt.training.values import on_device, tensor_to_torch

MOMENTUM = 0.1
"""The part of a batch in the running statistics, as in torch."""

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """Running means and variances; each batch changes them in place.

    Attributes:
        mean: One per channel.
        variance: One per channel.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    def normalized(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return channels, axis 1, normalized by the batch; by the running statistics if there is one of each."""
        enough = x.numel() > x.shape[1]
        return functional.batch_norm(x, self.mean, self.variance, scale, shift, enough, MOMENTUM, epsilon)


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """A BatchNormalization that stands behind a layer while it is trained.

    Attributes:
        layer: The layer.
        statistics: Of the layer's output.
        scale: What the normalized channels are multiplied by.
        shift: What is added to them.
    """

    layer: Layer
    statistics: Statistics
    scale: Trainable
    shift: Trainable

    def operator(self) -> Operator:
        """Return what computes the layer and the normalization."""
        compute = operator(self.layer.node.domain, self.layer.node.op_type)
        assert compute is not None, "only layers that torch has a counterpart for are trained"

        def both(call: Call, *inputs: Any) -> torch.Tensor:
            return self.statistics.normalized(compute(call, *inputs), self.scale.leaf, self.shift.leaf, EPSILON)

        return both

    def folded(self, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return weights and bias with which the layer alone computes what both compute by running statistics."""
        layer = self.layer
        factor = self.scale.leaf.detach() / _deviation(self.statistics.variance)
        along = [1] * weight.ndim
        along[layer.axis] = -1
        shift = self.shift.leaf.detach() - self.statistics.mean * factor
        return {
            layer.weight: weight * factor.reshape(along),
            layer.bias: bias * factor + (shift / layer.gain).reshape(bias.shape[-1:]),
        }


class Normalizing:
    """What is normalized by the statistics of batches while parameters are trained.

    Attributes:
        restored: What stands behind layers for now.
        running: Statistics of BatchNormalizations of the graph.
    """

    def __init__(self, restored: Sequence[Restored] = (), running: Mapping[Present, Statistics] | None = None) -> None:
        """Put both kinds together."""
        self.restored = tuple(restored)
        self.running = dict(running or {})

    @property
    def leaves(self) -> dict[str, Trainable]:
        """What is trained besides parameters of the model, by names that none of them has."""
        return {each.name: each for one in self.restored for each in (one.scale, one.shift)}

    @property
    def idle(self) -> frozenset[str]:
        """Parameters that only folding changes: what a bias adds to all samples, normalizing takes away."""
        return frozenset(one.layer.bias for one in self.restored)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """All running statistics by a name of their own."""
        all_of_them = {one.layer.output: one.statistics for one in self.restored}
        all_of_them |= {each.output: statistics for each, statistics in self.running.items()}
        return {
            f"{name} {kind}": tensor
            for name, s in all_of_them.items()
            for kind, tensor in (("mean", s.mean), ("variance", s.variance))
        }

    def operators(self) -> dict[str, Operator]:
        """Return what computes nodes in training, by the names of their outputs."""
        found = {one.layer.output: one.operator() for one in self.restored}
        return found | {each.output: _by_batch(statistics) for each, statistics in self.running.items()}

    def values(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return constants of the model that hold what was learnt here.

        Args:
            values: Those of the parameters.
        """
        found: dict[str, torch.Tensor] = {}
        for one in self.restored:
            found |= one.folded(values[one.layer.weight], values[one.layer.bias])
        for each, statistics in self.running.items():
            found |= {each.mean: statistics.mean.clone(), each.variance: statistics.variance.clone()}
        return found


def normalizing(
    model: ir.Model, trained: Mapping[str, Trainable], examples: Examples, settings: Settings
) -> Normalizing:
    """Return what is normalized by the statistics of batches in a training.

    What is put behind a layer begins with the mean and the variance that the layer's output has on the samples, and
    with a scale and a shift that undo them, so that the model computes what it did.

    Args:
        model: The model.
        trained: What is trained.
        examples: The samples to learn from.
        settings: How.

    Raises:
        UsageError: If there is nothing to normalize, or samples cannot be put together to batches.
    """
    if settings.batchnorm == "frozen":
        return Normalizing()
    if not examples.stackable or settings.recipe.batch < 2:
        raise UsageError(
            f'batchnorm "{settings.batchnorm}" needs statistics of batches, and there is one sample at a time here; '
            "make the first axis of the model's inputs dynamic, and batch at least 2.",
            "batchnorm",
            "batch",
        )
    nodes = present(model)
    if not nodes and settings.batchnorm == "batch":
        raise UsageError(
            'The model has no BatchNormalization with statistics of its own; batchnorm "restored" puts some in while '
            "training.",
            "batchnorm",
        )
    running = {each: _statistics(model, each) for each in nodes}
    if settings.batchnorm == "batch":
        return Normalizing((), running)
    layers = chosen(layers_without(model, trained), settings.batchnorm_behind)
    observers = {layer.output: ChannelMoments(layer.channels, 1) for layer in layers}
    observe(model, {name: [o] for name, o in observers.items()}, examples.feeds, settings.options, settings.progress)
    measured = [(layer, observers[layer.output]) for layer in layers if observers[layer.output].usable]
    return Normalizing([_restored(layer, moments, trained[layer.weight].leaf) for layer, moments in measured], running)


def _statistics(model: ir.Model, node: Present) -> Statistics:
    tensors = [model.graph.initializers[name].const_value for name in (node.mean, node.variance)]
    mean, variance = (tensor_to_torch(tensor) for tensor in tensors if tensor is not None)
    return Statistics(mean, variance)


def _restored(layer: Layer, moments: ChannelMoments, weight: torch.Tensor) -> Restored:
    """Return a normalization that changes nothing yet."""
    mean, variance = (on_device(a).to(weight.dtype) for a in (moments.mean, moments.variance))
    scale, shift = (
        Trainable(f"{layer.output} {name}", layer.depth, False, leaf.clone().requires_grad_(True), None, None)
        for name, leaf in (("scale", _deviation(variance)), ("shift", mean))
    )
    return Restored(layer, Statistics(mean, variance), scale, shift)


def _deviation(variance: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(variance + EPSILON)


def _by_batch(statistics: Statistics) -> Operator:
    """Return what computes a BatchNormalization of the graph by the statistics of batches."""

    def compute(
        call: Call, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *fixed: torch.Tensor
    ) -> torch.Tensor:
        return statistics.normalized(x, scale, shift, call.get("epsilon", 1e-5))

    return compute
