"""Learning from what another model computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onnxopt.training.augment import Augmentation
from onnxopt.training.examples import Examples
from onnxopt.training.finetune import EVALUATION_BATCH
from onnxopt.training.fit import Key
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.values import feed_to_torch


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A value that is imitated.

    Attributes:
        teacher: Its name in the teacher.
        student: Its name in the student.
        kind: "scores" of classes along the last axis, or "values".
        temperature: What scores are divided by.
        is_probability: Whether the scores are probabilities already.
    """

    teacher: str
    student: str
    kind: str
    temperature: float
    is_probability: bool

    def __str__(self) -> str:
        """Return it in words."""
        if self.kind == "values":
            return f"the values of {self.student}"
        return f"the scores {self.student} at temperature {self.temperature:g}"

    def loss(self, wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Return how far the student is from the teacher."""
        if self.kind == "values":
            return ((found - wanted) ** 2).mean() / (wanted.var(correction=0) + 1e-12)
        p, q = (torch.log_softmax(self._scores(t) / self.temperature, dim=-1) for t in (wanted, found))
        # gradients shrink with the square of the temperature, which the factor makes up for
        return (p.exp() * (p - q)).sum(dim=-1).mean() * self.temperature**2

    def _scores(self, values: torch.Tensor) -> torch.Tensor:
        return torch.log(values.clamp(min=1e-12)) if self.is_probability else values


class Imitation:
    """A teacher, a student, and samples."""

    def __init__(
        self,
        teacher: Interpreter,
        student: Interpreter,
        targets: Sequence[Target],
        learning: Examples,
        judging: Examples | None,
        augmentation: Augmentation,
    ) -> None:
        """Put both together."""
        self._teacher = teacher
        self._student = student
        self._targets = targets
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
        for feed, members in self._learning.batches(numbers, len(numbers)):
            inputs, _, _ = self._augmentation.varied(feed_to_torch(feed), rng)
            yield self._loss(inputs, values), len(members) / len(numbers)

    def judge(self, values: Mapping[str, torch.Tensor]) -> Key | None:
        """Return the loss on samples that are not learnt from; the greater, the better."""
        if self._judging is None:
            return None
        total = 0.0
        for feed, members in self._judging.batches(range(len(self._judging)), EVALUATION_BATCH):
            total += float(self._loss(feed, values)) * len(members)
        return (-total / len(self._judging),)

    def _loss(self, inputs: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            wanted = self._teacher.run(inputs, None, {t.teacher for t in self._targets})
        found = self._student.run(inputs, values, {t.student for t in self._targets})
        return torch.stack([t.loss(wanted[t.teacher], found[t.student]) for t in self._targets]).mean()
