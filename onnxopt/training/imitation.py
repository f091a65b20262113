"""Learning from what another model computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from onnxopt.training.augment import Variant
from onnxopt.training.call import Operator
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.problem import Key


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


@dataclasses.dataclass(frozen=True, slots=True)
class Imitation:
    """A teacher, a student, and which of their values are compared."""

    teacher: Interpreter
    student: Interpreter
    targets: tuple[Target, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """What the student is compared by."""
        return tuple(t.student for t in self.targets)

    def loss(
        self,
        batch: Variant,
        labels: torch.Tensor | None,
        values: Mapping[str, torch.Tensor],
        instead: Mapping[str, Operator],
    ) -> torch.Tensor:
        """Return how far the student is from the teacher, which sees the same variants of the samples."""
        return self._loss(batch.inputs, values, instead)

    def judge(
        self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor | None, values: Mapping[str, torch.Tensor]
    ) -> Key:
        """Return the loss; the greater, the better."""
        return (-float(self._loss(inputs, values, {})),)

    def _loss(
        self,
        inputs: Mapping[str, torch.Tensor],
        values: Mapping[str, torch.Tensor],
        instead: Mapping[str, Operator],
    ) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.teacher.run(inputs, None, {t.teacher for t in self.targets})
        found = self.student.run(inputs, values, set(self.values), instead)
        return torch.stack([t.loss(wanted[t.teacher], found[t.student]) for t in self.targets]).mean()
