"""Learning from labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from onnxopt.training.augment import Augmentation
from onnxopt.training.examples import Examples
from onnxopt.training.fit import Key
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.objective import Objective
from onnxopt.training.values import feed_to_torch

EVALUATION_BATCH = 64


class Supervised:
    """Labelled samples, some to learn from and some to judge by."""

    def __init__(
        self,
        interpreter: Interpreter,
        objective: Objective,
        learning: Examples,
        judging: Examples | None,
        augmentation: Augmentation,
    ) -> None:
        """Put samples and the loss together."""
        self._interpreter = interpreter
        self._objective = objective
        self._learning = learning
        self._judging = judging
        self._augmentation = augmentation

    def __len__(self) -> int:
        """Return the number of samples to learn from."""
        return len(self._learning)

    def losses(
        self, numbers: np.ndarray, values: Mapping[str, torch.Tensor], rng: np.random.Generator
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield losses of parts of a batch, and their weights."""
        assert self._learning.labels is not None
        name = self._objective.computed
        for feed, members in self._learning.batches(numbers, len(numbers)):
            inputs, partners, share = self._augmentation.varied(feed_to_torch(feed), rng)
            found = self._interpreter.run(inputs, values, [name])[name]
            labels = torch.from_numpy(self._learning.labels[members])
            if share < 1:
                loss = share * self._objective.loss(found, labels)
                loss = loss + (1 - share) * self._objective.loss(found, labels[torch.from_numpy(partners)])
            else:
                loss = self._objective.loss(found, labels)
            yield loss, len(members) / len(numbers)

    def judge(self, values: Mapping[str, torch.Tensor]) -> Key | None:
        """Return accuracy, then the loss, or the squared error alone; the greater, the better."""
        if self._judging is None or self._judging.labels is None:
            return None
        output, computed = self._objective.output, self._objective.computed
        right = np.zeros(len(self._judging))
        total = 0.0
        for feed, members in self._judging.batches(range(len(self._judging)), EVALUATION_BATCH):
            found = self._interpreter.run(feed, values, [output, computed])
            labels = self._judging.labels[members]
            right[members] = self._objective.right(found[output].numpy(), labels)
            total += float(self._objective.loss(found[computed], torch.from_numpy(labels))) * len(members)
        loss = total / len(self._judging)
        return (float(right.mean()), -loss) if self._objective.task == "classification" else (-loss,)
