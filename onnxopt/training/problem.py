"""What is learnt: samples, some to learn from and some to judge by, and what is asked of the model on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from onnxopt.training.augment import Augmentation, Variant
from onnxopt.training.call import Operator
from onnxopt.training.examples import Examples
from onnxopt.training.values import feed_to_torch, on_device

Key = tuple[float, ...]
"""How good a state is: greater is better, the first number that differs decides."""

EVALUATION_BATCH = 64


class Aim(Protocol):
    """What is asked of a model."""

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values of the model that the loss is computed from."""

    def loss(
        self,
        batch: Variant,
        labels: torch.Tensor | None,
        values: Mapping[str, torch.Tensor],
        instead: Mapping[str, Operator],
    ) -> torch.Tensor:
        """Return the mean loss on a batch, with these parameters and what computes nodes in another way."""

    def judge(
        self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor | None, values: Mapping[str, torch.Tensor]
    ) -> Key:
        """Return how good parameters are on a batch, means over its samples."""


class Problem:
    """An aim and the samples for it."""

    def __init__(self, aim: Aim, learning: Examples, judging: Examples | None, augmentation: Augmentation) -> None:
        """Put both together."""
        self._aim = aim
        self._learning = learning
        self._judging = judging
        self._augmentation = augmentation

    def __len__(self) -> int:
        """Return the number of samples to learn from."""
        return len(self._learning)

    def losses(
        self,
        numbers: np.ndarray,
        values: Mapping[str, torch.Tensor],
        instead: Mapping[str, Operator],
        rng: np.random.Generator,
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield losses of parts of a batch, and their weights, which add up to one."""
        for inputs, labels, share in _parts(self._learning, numbers, len(numbers)):
            yield self._aim.loss(self._augmentation.varied(inputs, rng), labels, values, instead), share

    def judge(self, values: Mapping[str, torch.Tensor]) -> Key | None:
        """Return how good parameters are on samples that are not learnt from; None when there are none."""
        if self._judging is None:
            return None
        found = [
            share * np.array(self._aim.judge(inputs, labels, values))
            for inputs, labels, share in _parts(self._judging, np.arange(len(self._judging)), EVALUATION_BATCH)
        ]
        return tuple(np.sum(found, axis=0).tolist())


def _parts(
    examples: Examples, numbers: np.ndarray, size: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor | None, float]]:
    """Yield batches of samples: inputs, labels, and the share of all samples in it."""
    for feed, members in examples.batches(numbers, size):
        labels = None if examples.labels is None else on_device(examples.labels[members])
        yield feed_to_torch(feed), labels, len(members) / len(numbers)
