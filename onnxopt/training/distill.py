"""`onnxopt.distill`: a model trained on unlabelled samples to compute what another one computes."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import runtime
from onnxopt.analysis.task import class_scores, main_output
from onnxopt.analysis.weights import FLOATS
from onnxopt.contract import Progress, Silent
from onnxopt.errors import DataError, NothingDoneError, UsageError
from onnxopt.model import load
from onnxopt.report.words import count
from onnxopt.runtime import RunOptions
from onnxopt.training.examples import Examples, Source, load_examples, split
from onnxopt.training.finetune import EVALUATION_BATCH, FEEDS_TO_CHECK, fingerprint, using_threads
from onnxopt.training.requirement import require_torch

if TYPE_CHECKING:
    from onnxopt.training.fit import Epoch, Fit, Recipe
    from onnxopt.training.imitation import Target
    from onnxopt.training.objective import Score

Model = str | os.PathLike[str] | onnx.ModelProto | ir.Model


@dataclasses.dataclass(frozen=True, slots=True)
class Distilled:
    """What `distill` returns.

    Attributes:
        model: The trained student.
        targets: The values it learnt to compute, in words.
        before: How far it agreed with the teacher on samples it did not learn from, as the runtime computes both;
            None without any.
        after: How far it agrees now.
        trained: Names of the parameters that were trained.
        epochs: What came out of each epoch.
        best: The epoch whose parameters the result has; 0 for those it began with.
        resumed: Epochs a checkpoint had done already.
        deviation: The largest deviation of torch from the runtime on the result, as a fraction of the range.
        seconds: How long it took.
    """

    model: ir.Model
    targets: tuple[str, ...]
    before: Score | None
    after: Score | None
    trained: tuple[str, ...]
    epochs: tuple[Epoch, ...]
    best: int
    resumed: int
    deviation: float
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """What there is to tell besides the model, for reports."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}

    def sentences(self) -> list[str]:
        """Tell what was done, in sentences."""
        told = [
            f"{count(len(self.trained), 'parameter')} trained for {count(len(self.epochs) - 1, 'epoch')} in "
            f"{self.seconds:.1f} s towards {', '.join(self.targets)}; kept is "
            f"{f'epoch {self.best}' if self.best else 'what was there'}."
        ]
        if self.before is not None and self.after is not None:
            what = "Same class as the teacher" if self.after.name == "accuracy" else "Squared error to the teacher"
            told.append(f"{what} on samples not learnt from: before {self.before}, after {self.after}.")
        else:
            told.append("No samples were kept apart, so nothing says whether the student became better.")
        if self.resumed:
            told.append(f"{count(self.resumed, 'epoch')} had been done before, as the checkpoint says.")
        told.append(f"Verified: ONNX Runtime computes what was trained, to {self.deviation:.1g} of the output's range.")
        return told


def distill(
    teacher: Model,
    student: Model,
    data: Source,
    *,
    epochs: int = 100,
    learning_rate: float = 1e-3,
    batch: int = 32,
    temperature: float = 4.0,
    hidden: Sequence[str] = (),
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    layer_decay: float = 1.0,
    clip: float = 1.0,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    validation: float = 0.1,
    patience: int = 25,
    shift: int = 0,
    noise: float = 0.0,
    mix: float = 1.0,
    seed: int = 0,
    threads: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Train a student's parameters so that it computes what a teacher computes; no labels are needed.

    Scores of classes are compared as distributions, by their Kullback-Leibler divergence at a temperature (Hinton et
    al., arXiv:1503.02531); other outputs, and values within the graph where they are asked for, by their squared
    error in units of the teacher's variance. The teacher sees the same variants of the samples as the student, so
    that strong ones, such as mixtures of two, do no harm. The graph of the student stays as it is.

    Args:
        teacher: The model to imitate, for example the original of a pruned one.
        student: The model to train, with the same inputs and outputs. Neither is changed.
        data: Samples, as `finetune` takes them; labels among them are not looked at.
        epochs: Passes over the samples, at most.
        learning_rate: Of the last layer, at its highest.
        batch: Samples per step.
        temperature: Scores are divided by it before they are compared.
        hidden: Patterns of names of values inside; those that both models have, in the same shape, are compared too.
        weight_decay: Decay of matrices.
        warmup: Share of the steps over which the learning rate rises.
        layer_decay: Factor of the learning rate from a layer to the one before it.
        clip: Largest norm of the gradient.
        train: Patterns of the names of parameters that are trained; all by default.
        freeze: Patterns of those that are not.
        validation: Share of the samples that judge and are not learnt from; 0 for none.
        patience: Epochs without a better state after which training ends.
        shift: Pixels by which images move at random.
        noise: Noise that is added to inputs, as a fraction of their standard deviation.
        mix: Parameter of the beta distribution by which samples are mixed; 0 for none.
        seed: The same seed gives the same result on the same machine.
        threads: Threads of torch and of the runtime.
        checkpoint: File for the state after each epoch, in the safetensors format; training goes on from it.
        progress: Told what is being done.

    Raises:
        UsageError: If torch is missing, or an option cannot be used.
        DataError: If samples do not fit, or the models have no output in common.
        ModelError: If torch cannot compute a model.
        NothingDoneError: If the student has no parameters that could be trained.
        VerificationError: If torch computes something else than the runtime.
    """
    require_torch("Distillation")
    from onnxopt.training.augment import Augmentation
    from onnxopt.training.fit import Recipe

    recipe = Recipe(
        epochs=epochs,
        learning_rate=learning_rate,
        batch=batch,
        weight_decay=weight_decay,
        warmup=warmup,
        layer_decay=layer_decay,
        clip=clip,
        patience=patience,
        seed=seed,
    )
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, not {temperature}.", "temperature")
    if not 0 <= validation < 1:
        raise UsageError(f"validation must be at least 0 and below 1, not {validation}.", "validation")
    augmentation = Augmentation(shift=shift, noise=noise, mix=mix)
    models = load(teacher), load(student)
    _require_same_inputs(*models)
    examples = dataclasses.replace(load_examples(models[1], data, None), labels=None)
    start = time.perf_counter()
    with using_threads(threads):
        run = _Run(*models, examples, RunOptions(threads=threads), validation, seed)
        run.prepare(train, freeze, hidden, temperature)
        found = run.fit(recipe, augmentation, progress or Silent(), checkpoint, (hidden, temperature))
        return run.result(found, start)


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


class _Run:
    """One distillation."""

    def __init__(
        self, teacher: ir.Model, student: ir.Model, examples: Examples, options: RunOptions, share: float, seed: int
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.options = options
        self.all = examples
        self.learning, self.judging = split(examples, share, seed)

    def prepare(self, train: Sequence[str], freeze: Sequence[str], hidden: Sequence[str], temperature: float) -> None:
        """Compare torch with the runtime for both models, and choose what is compared and what is trained."""
        from onnxopt.training.forward import agreement, require_agreement
        from onnxopt.training.interpreter import Interpreter
        from onnxopt.training.parameters import choose, find_parameters
        from onnxopt.training.trainable import trainable

        parameters = find_parameters(self.student)
        if not parameters:
            raise NothingDoneError("The student has no floating-point parameters that could be trained.")
        chosen = choose(parameters, train, freeze)
        self.imitated = Interpreter(self.teacher, runtime.evaluate_node)
        self.interpreter = Interpreter(self.student, runtime.evaluate_node)
        feeds = self.all.feeds[:FEEDS_TO_CHECK]
        for name, model, interpreter in (
            ("teacher", self.teacher, self.imitated),
            ("student", self.student, self.interpreter),
        ):
            found = agreement(model, interpreter, feeds, self.options)
            require_agreement(found, f"torch does not compute what the {name} computes")
        self.targets = self._targets(hidden, temperature)
        self.trained = {name: trainable(parameters[name]) for name in chosen}
        self._drop_unreached()

    def _drop_unreached(self) -> None:
        """Leave parameters out that no gradient reaches.

        Raises:
            NothingDoneError: If none is left.
        """
        import torch

        from onnxopt.training.trainable import values_of

        names = [t.student for t in self.targets]
        out = self.interpreter.run(self.all.feeds[0], values_of(self.trained), names)
        total = sum((v.sum() for v in out.values()), torch.zeros(()))
        found = [None] * len(self.trained)
        if total.requires_grad:
            leaves = [each.leaf for each in self.trained.values()]
            found = list(torch.autograd.grad(total, leaves, allow_unused=True))
        self.trained = {n: t for (n, t), g in zip(self.trained.items(), found, strict=True) if g is not None}
        if not self.trained:
            raise NothingDoneError("No gradient of what is compared reaches the parameters that were chosen.")

    def _targets(self, hidden: Sequence[str], temperature: float) -> tuple[Target, ...]:
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

        feed = self.all.feeds[0]
        with torch.no_grad():
            one, two = self.imitated.run(feed, None, names), self.interpreter.run(feed, None, names)
        return {
            name: tuple(value.shape)
            for name, value in one.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == two[name].shape
        }

    def fit(
        self,
        recipe: Recipe,
        augmentation: Any,
        progress: Progress,
        checkpoint: str | os.PathLike[str] | None,
        settings: object,
    ) -> Fit:
        """Train."""
        from onnxopt.training.fit import fit
        from onnxopt.training.imitation import Imitation

        problem = Imitation(self.imitated, self.interpreter, self.targets, self.learning, self.judging, augmentation)
        key = fingerprint(self.trained, self.all, recipe, augmentation, settings, len(self.judging or ()))
        path = None if checkpoint is None else Path(checkpoint)
        return fit(problem, self.trained, recipe, progress, checkpoint=path, key=key)

    def result(self, found: Fit, start: float) -> Distilled:
        """Write the parameters back and judge the result by the runtime."""
        from onnxopt.training.forward import agreement, require_agreement
        from onnxopt.training.parameters import with_parameters

        result = with_parameters(self.student, found.values)
        check = agreement(result, self.interpreter, self.all.feeds[:FEEDS_TO_CHECK], self.options, found.values)
        require_agreement(check, "The trained model does not compute what was trained")
        return Distilled(
            result,
            tuple(str(target) for target in self.targets),
            self._score(self.student),
            self._score(result),
            tuple(self.trained),
            found.epochs,
            found.best,
            found.resumed,
            check.worst,
            time.perf_counter() - start,
        )

    def _score(self, model: ir.Model) -> Score | None:
        """Return how far a model agrees with the teacher on what is not learnt from."""
        from onnxopt.training.objective import score

        if self.judging is None:
            return None
        value = main_output(self.student)
        assert value is not None
        name, each = value.name or "", np.zeros(len(self.judging))
        is_scores = self.targets[0].kind == "scores"
        with (
            runtime.open_session(self.teacher, self.options, optimized=True) as teacher,
            runtime.open_session(model, self.options, optimized=True) as student,
        ):
            for feed, members in self.judging.batches(range(len(self.judging)), EVALUATION_BATCH):
                wanted, got = (np.asarray(s.run(feed, only=[name])[name]) for s in (teacher, student))
                same = (got.argmax(-1) == wanted.argmax(-1)) if is_scores else (got - wanted) ** 2
                each[members] = same.reshape(len(members), -1).mean(axis=1)
        return score("classification" if is_scores else "regression", each)


def is_worse(found: Distilled) -> bool:
    """Whether the student agrees less with the teacher than it did."""
    from onnxopt.training.objective import no_worse

    if found.before is None or found.after is None:
        return False
    task: Mapping[bool, str] = {True: "classification", False: "regression"}
    return not no_worse(task[found.after.name == "accuracy"], found.before, found.after)
