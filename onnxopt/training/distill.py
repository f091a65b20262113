"""`onnxopt.distill`: a model trained on unlabelled samples to compute what another one computes."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import runtime
from onnxopt.analysis.task import class_scores, main_output
from onnxopt.analysis.weights import FLOATS
from onnxopt.errors import DataError, UsageError
from onnxopt.feeds import Feed
from onnxopt.model import load
from onnxopt.training.examples import Source, load_examples
from onnxopt.training.options import TrainingOptions
from onnxopt.training.requirement import require_torch
from onnxopt.training.trained import Trained

if TYPE_CHECKING:
    from onnxopt.training.imitation import Target
    from onnxopt.training.interpreter import Interpreter

Model = str | os.PathLike[str] | onnx.ModelProto | ir.Model

OWN = TrainingOptions(epochs=100, patience=25, weight_decay=0.0, validation=0.1, mix=1.0)
"""Defaults of distillation."""


def distill(
    teacher: Model,
    student: Model,
    data: Source,
    *,
    temperature: float = 4.0,
    hidden: Sequence[str] = (),
    **options: Unpack[TrainingOptions],
) -> Trained:
    """Train a student's parameters so that it computes what a teacher computes; no labels are needed.

    Scores of classes are compared as distributions, by their Kullback-Leibler divergence at a temperature (Hinton et
    al., arXiv:1503.02531); other outputs, and values within the graph where they are asked for, by their squared
    error in units of the teacher's variance. The teacher sees the same variants of the samples as the student, so
    that strong ones, such as mixtures of two, do no harm. The graph of the student stays as it is.

    Args:
        teacher: The model to imitate, for example the original of a pruned one.
        student: The model to train, with the same inputs and outputs. Neither is changed.
        data: Samples, as `finetune` takes them; labels among them are not looked at.
        temperature: Scores are divided by it before they are compared.
        hidden: Patterns of names of values inside; those that both models have, in the same shape, are compared too.
        **options: How to train; see `TrainingOptions`. By default 100 epochs with a patience of 25, no weight decay,
            mixtures of samples (`mix=1`), and a tenth of the samples for validation.

    Raises:
        UsageError: If torch is missing, or an option cannot be used.
        DataError: If samples do not fit, or the models have no output in common.
        ModelError: If torch cannot compute a model.
        NothingDoneError: If the student has no parameters that could be trained.
        VerificationError: If torch computes something else than the runtime.
    """
    require_torch("Distillation")
    from onnxopt.training.devices import computing
    from onnxopt.training.imitation import Imitation
    from onnxopt.training.run import Lesson, interpreted, teach
    from onnxopt.training.settings import settings

    how = settings(options, OWN)
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, not {temperature}.", "temperature")
    models = load(teacher), load(student)
    _require_same_inputs(*models)
    examples = dataclasses.replace(load_examples(models[1], data, None), labels=None)
    with computing(how.device, how.threads), runtime.open_session(models[0], how.options, optimized=True) as session:
        one, two = (
            interpreted(model, examples, how, f"the {name}")
            for name, model in zip(("teacher", "student"), models, strict=True)
        )
        targets = _Comparison(one, two, examples.feeds[0]).targets(hidden, temperature)
        value = main_output(models[1])
        assert value is not None and value.name, "there is a target, so there is an output"
        output, is_share = value.name, targets[0].kind == "scores"

        def right(feed: Feed, labels: np.ndarray | None, got: np.ndarray) -> np.ndarray:
            wanted = np.asarray(session.run(feed, only=[output])[output])
            each: np.ndarray = (got.argmax(-1) == wanted.argmax(-1)) if is_share else (got - wanted) ** 2
            return each

        lesson = Lesson(
            aim=Imitation(one, two, targets),
            targets=tuple(map(str, targets)),
            output=output,
            measure="same class as the teacher" if is_share else "squared error to the teacher",
            is_share=is_share,
            right=right,
            key=(tuple(hidden), temperature),
        )
        return teach(two, lesson, examples, how)


def _require_same_inputs(teacher: ir.Model, student: ir.Model) -> None:
    """Raise when the models do not take the same inputs.

    Raises:
        DataError: If a name or a type differs.
    """
    one, two = ({v.name: v.dtype for v in m.graph.inputs if not v.is_initializer()} for m in (teacher, student))
    if one != two:
        told = [
            ", ".join(f"{name} ({d.name.lower() if d else 'unknown'})" for name, d in m.items()) for m in (one, two)
        ]
        raise DataError(f"Teacher and student must take the same inputs: the one takes {told[0]}, the other {told[1]}.")


class _Comparison:
    """Which values of a teacher and of a student can be compared."""

    def __init__(self, one: Interpreter, two: Interpreter, feed: Feed) -> None:
        self.one = one
        self.two = two
        self.teacher = one.model
        self.student = two.model
        self.feed = feed

    def targets(self, hidden: Sequence[str], temperature: float) -> tuple[Target, ...]:
        """Return what is compared.

        Raises:
            DataError: If the models have no floating-point output of the same name and shape.
            UsageError: If a pattern fits no value of both.
        """
        from onnxopt.training.imitation import Target
        from onnxopt.training.objective import scores_before

        scores, main = class_scores(self.student), main_output(self.student)
        names = {v.name or "" for v in self.student.graph.outputs if v.dtype in FLOATS}
        names &= {v.name or "" for v in self.teacher.graph.outputs if v.dtype in FLOATS}
        shapes = self._shapes(names)
        targets = []
        for value in self.student.graph.outputs:
            name = value.name or ""
            if name not in shapes:
                continue
            if scores is not None and value is main:
                other = next(v for v in self.teacher.graph.outputs if v.name == name)
                (ours, is_logarithm), (theirs, theirs_is) = (
                    scores_before(self.student, value),
                    scores_before(self.teacher, other),
                )
                if is_logarithm or theirs_is:
                    ours = theirs = name
                targets.append(Target(theirs, ours, "scores", temperature, is_logarithm or theirs_is))
            else:
                targets.append(Target(name, name, "values", temperature, False))
        if not targets:
            raise DataError("Teacher and student have no floating-point output of the same name and shape.")
        return (*targets, *(Target(n, n, "values", temperature, False) for n in self._inside(hidden)))

    def _inside(self, patterns: Sequence[str]) -> list[str]:
        """Return the values within the graph that fit a pattern and that both models have in the same shape."""
        outputs = {v.name for v in self.student.graph.outputs}
        both = [
            {v.name for node in m.graph for v in node.outputs if v.name and v.dtype in (*FLOATS, None)} - outputs
            for m in (self.teacher, self.student)
        ]
        common = both[0] & both[1]
        found = [v.name or "" for node in self.student.graph for v in node.outputs if v.name in common]
        chosen = [name for name in found if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        alike = self._shapes(set(chosen)) if chosen else {}
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in alike):
                raise UsageError(f'hidden "{pattern}" fits no value that both models have in the same shape.', "hidden")
        return [name for name in chosen if name in alike]

    def _shapes(self, names: set[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of floating-point values that both models compute in the same shape."""
        import torch

        with torch.no_grad():
            one, two = self.one.run(self.feed, None, names), self.two.run(self.feed, None, names)
        return {
            name: tuple(value.shape)
            for name, value in one.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == two[name].shape
        }
