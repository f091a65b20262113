"""Learning from labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from onnxopt.training.augment import Variant
from onnxopt.training.call import Operator
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.objective import Objective
from onnxopt.training.problem import Key
from onnxopt.training.values import on_device, to_array


@dataclasses.dataclass(frozen=True, slots=True)
class Supervised:
    """A model, and what labels ask of it."""

    interpreter: Interpreter
    objective: Objective

    @property
    def values(self) -> tuple[str, ...]:
        """The scores, or the output that the targets are about."""
        return (self.objective.computed,)

    def loss(
        self,
        batch: Variant,
        labels: torch.Tensor | None,
        values: Mapping[str, torch.Tensor],
        instead: Mapping[str, Operator],
    ) -> torch.Tensor:
        """Return the loss; for samples that are mixed, the same mixture of the losses for both labels."""
        assert labels is not None
        (name,) = self.values
        found = self.interpreter.run(batch.inputs, values, [name], instead)[name]
        loss = self.objective.loss(found, labels)
        if batch.share < 1:
            other = self.objective.loss(found, labels[on_device(batch.partners)])
            loss = batch.share * loss + (1 - batch.share) * other
        return loss

    def judge(
        self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor | None, values: Mapping[str, torch.Tensor]
    ) -> Key:
        """Return accuracy, then the loss, or the squared error alone; the greater, the better."""
        assert labels is not None
        output, computed = self.objective.output, self.objective.computed
        found = self.interpreter.run(inputs, values, [output, computed])
        loss = float(self.objective.loss(found[computed], labels))
        right = float(self.objective.right(to_array(found[output]), to_array(labels)).mean())
        return (right, -loss) if self.objective.task == "classification" else (-loss,)
