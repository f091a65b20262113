"""`onnxopt.finetune`: the parameters of a model trained on labelled samples, the graph as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import runtime
from onnxopt.analysis.task import main_output
from onnxopt.contract import Progress, Silent
from onnxopt.errors import DataError, NothingDoneError, UsageError
from onnxopt.model import load
from onnxopt.report.words import count
from onnxopt.runtime import RunOptions
from onnxopt.training.examples import Examples, Source, load_examples, split
from onnxopt.training.requirement import require_torch

if TYPE_CHECKING:
    import torch

    from onnxopt.training.fit import Epoch, Fit, Recipe
    from onnxopt.training.objective import Objective, Score

FEEDS_TO_CHECK = 4
"""On so many samples torch and the runtime are compared, before and after."""

EVALUATION_BATCH = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Finetuned:
    """What `finetune` returns.

    Attributes:
        model: The trained model.
        task: "classification" or "regression".
        before: How well the model did on the validation samples, as the runtime computes it; None without any.
        after: How well the result does.
        trained: Names of the parameters that were trained.
        unreached: Those among them that no gradient reaches, because torch has no counterpart for a node behind them.
        outside: The nodes that the runtime computed, in words.
        epochs: What came out of each epoch.
        best: The epoch whose parameters the result has; 0 for those it began with.
        resumed: Epochs a checkpoint had done already.
        deviation: The largest deviation of torch from the runtime on the result, as a fraction of the range.
        seconds: How long it took.
    """

    model: ir.Model
    task: str
    before: Score | None
    after: Score | None
    trained: tuple[str, ...]
    unreached: tuple[str, ...]
    outside: tuple[str, ...]
    epochs: tuple[Epoch, ...]
    best: int
    resumed: int
    deviation: float
    seconds: float

    @property
    def is_worse(self) -> bool:
        """Whether the result does worse on the validation samples than the model did."""
        from onnxopt.training.objective import no_worse

        return self.before is not None and self.after is not None and not no_worse(self.task, self.before, self.after)

    @property
    def summary(self) -> dict[str, Any]:
        """What there is to tell besides the model, for reports."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}

    def sentences(self) -> list[str]:
        """Tell what was done, in sentences."""
        told = [
            f"{len(self.trained):,} parameters trained for {count(len(self.epochs) - 1, 'epoch')} in "
            f"{self.seconds:.1f} s; kept is {f'epoch {self.best}' if self.best else 'what was there'}."
        ]
        if self.before is not None and self.after is not None:
            told.append(f"{self.after.name.capitalize()} on validation: before {self.before}, after {self.after}.")
        else:
            told.append("No samples were kept for validation, so nothing says whether the model became better.")
        if self.resumed:
            told.append(f"{count(self.resumed, 'epoch')} had been done before, as the checkpoint says.")
        if self.unreached:
            behind = f" They lie before {', '.join(self.outside[:3])}, computed by the runtime." if self.outside else ""
            told.append(f"No gradient reaches {count(len(self.unreached), 'parameter')}, which stayed.{behind}")
        told.append(f"Verified: ONNX Runtime computes what was trained, to {self.deviation:.1g} of the output's range.")
        return told


def finetune(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    data: Source,
    labels: str | os.PathLike[str] | np.ndarray | None = None,
    *,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    batch: int = 32,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    layer_decay: float = 1.0,
    clip: float = 1.0,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    validation: float = 0.2,
    patience: int = 5,
    label_smoothing: float = 0.0,
    shift: int = 0,
    noise: float = 0.0,
    mix: float = 0.0,
    seed: int = 0,
    threads: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Train a model's parameters on labelled samples.

    The graph is interpreted in torch, after a comparison with ONNX Runtime on the first samples. The parameters are
    the floating-point constants of the model; they are written back by name, in their own type, and the graph is as
    it was. The state that does best on the validation samples is kept, which may be the one it began with. Zeros of
    pruned matrices stay zero, and equal values of a codebook stay equal.

    Args:
        model: The model. It is not changed.
        data: Samples: an .npz with one array per input, a folder of them, or input -> array.
        labels: Classes (integers, one axis less than the output) or targets (of the output's shape): an array, a
            file, or a key of the .npz.
        epochs: Passes over the samples, at most.
        learning_rate: Of the last layer, at its highest; it rises at first and then falls along a cosine.
        batch: Samples per step.
        weight_decay: Decay of matrices.
        warmup: Share of the steps over which the learning rate rises.
        layer_decay: Factor of the learning rate from a layer to the one before it.
        clip: Largest norm of the gradient.
        train: Patterns of the names of parameters that are trained; all by default.
        freeze: Patterns of those that are not.
        validation: Share of the samples that judge and are not learnt from; 0 for none, and then the last epoch's
            state is kept.
        patience: Epochs without a better state after which training ends.
        label_smoothing: Share of each label that is spread over all classes.
        shift: Pixels by which images move at random.
        noise: Noise that is added to inputs, as a fraction of their standard deviation.
        mix: Parameter of the beta distribution by which samples are mixed; 0 for none.
        seed: The same seed gives the same result on the same machine.
        threads: Threads of torch and of the runtime.
        checkpoint: File for the state after each epoch, in the safetensors format; training goes on from it.
        progress: Told what is being done.

    Raises:
        UsageError: If torch is missing, or an option cannot be used.
        DataError: If samples or labels do not fit.
        ModelError: If torch cannot compute the model.
        NothingDoneError: If the model has no parameters that could be trained.
        VerificationError: If torch computes something else than the runtime.
    """
    require_torch("Fine-tuning")
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
    for name, share in (("validation", validation), ("label_smoothing", label_smoothing)):
        if not 0 <= share < 1:
            raise UsageError(f"{name} must be at least 0 and below 1, not {share}.", name)
    augmentation = Augmentation(shift=shift, noise=noise, mix=mix)
    source = load(model)
    examples = load_examples(source, data, labels)
    if examples.labels is None:
        raise DataError("There are no labels; give them with labels, or as the key labels of the .npz.")
    start = time.perf_counter()
    with using_threads(threads):
        run = _Run(source, examples, label_smoothing, RunOptions(threads=threads), validation, seed)
        run.prepare(train, freeze)
        found = run.fit(recipe, augmentation, progress or Silent(), checkpoint)
        return run.result(found, time.perf_counter() - start)


@contextlib.contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads; afterwards as many as before.

    Raises:
        UsageError: If there are none.
    """
    import torch

    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}.", "threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One fine-tuning."""

    def __init__(
        self, model: ir.Model, examples: Examples, smoothing: float, options: RunOptions, share: float, seed: int
    ) -> None:
        self.model = model
        self.options = options
        self.all = examples
        self.smoothing = smoothing
        self.learning, self.judging = split(examples, share, seed)

    def prepare(self, train: Sequence[str], freeze: Sequence[str]) -> None:
        """Compare torch with the runtime, find out what is to be learnt, and choose the parameters."""
        from onnxopt.training.forward import agreement, require_agreement
        from onnxopt.training.interpreter import Interpreter
        from onnxopt.training.objective import objective
        from onnxopt.training.parameters import choose, find_parameters
        from onnxopt.training.trainable import trainable

        parameters = find_parameters(self.model)
        if not parameters:
            raise NothingDoneError("The model has no floating-point parameters that could be trained.")
        chosen = choose(parameters, train, freeze)
        self.interpreter = Interpreter(self.model, runtime.evaluate_node)
        feeds = self.all.feeds[:FEEDS_TO_CHECK]
        found = agreement(self.model, self.interpreter, feeds, self.options)
        require_agreement(found, "torch does not compute what this model computes")
        assert self.all.labels is not None
        self.objective: Objective = objective(self.model, self.all.labels, self._output_shape(), self.smoothing)
        self.trained = {name: trainable(parameters[name]) for name in chosen}
        self.unreached = self._unreached()

    def _output_shape(self) -> tuple[int, ...]:
        """Return the shape of the main output on the first sample; of rank 0 where there is none."""
        value = main_output(self.model)
        if value is None:
            return ()
        with runtime.open_session(self.model, self.options, optimized=True) as session:
            return np.shape(session.run(self.all.feeds[0])[value.name or ""])

    def _unreached(self) -> tuple[str, ...]:
        """Return the parameters without a gradient on the first sample.

        Raises:
            NothingDoneError: If those are all.
        """
        import torch

        from onnxopt.training.trainable import values_of

        values = values_of(self.trained)
        out = self.interpreter.run(self.all.feeds[0], values, [self.objective.computed])[self.objective.computed]
        leaves = [each.leaf for each in self.trained.values()]
        if not out.requires_grad:
            raise NothingDoneError(self._no_gradient())
        found = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        missing = tuple(name for name, g in zip(self.trained, found, strict=True) if g is None)
        if len(missing) == len(self.trained):
            raise NothingDoneError(self._no_gradient())
        return missing

    def _no_gradient(self) -> str:
        outside = ", ".join(list(self.interpreter.outside)[:3])
        why = f", behind {outside}, which torch has no counterpart for" if outside else ""
        return f'No gradient of the output "{self.objective.output}" reaches the parameters that were chosen{why}.'

    def fit(
        self, recipe: Recipe, augmentation: Any, progress: Progress, checkpoint: str | os.PathLike[str] | None
    ) -> Fit:
        """Train."""
        from onnxopt.training.fit import fit
        from onnxopt.training.supervised import Supervised

        for name in self.unreached:
            del self.trained[name]
        problem = Supervised(self.interpreter, self.objective, self.learning, self.judging, augmentation)
        key = fingerprint(self.trained, self.all, recipe, augmentation, self.smoothing, len(self.judging or ()))
        path = None if checkpoint is None else Path(checkpoint)
        return fit(problem, self.trained, recipe, progress, checkpoint=path, key=key)

    def result(self, found: Fit, seconds: float) -> Finetuned:
        """Write the parameters back and judge the result by the runtime."""
        from onnxopt.training.forward import agreement, require_agreement
        from onnxopt.training.parameters import with_parameters

        result = with_parameters(self.model, found.values)
        check = agreement(result, self.interpreter, self.all.feeds[:FEEDS_TO_CHECK], self.options, found.values)
        require_agreement(check, "The trained model does not compute what was trained")
        return Finetuned(
            result,
            self.objective.task,
            self._score(self.model),
            self._score(result),
            tuple(self.trained),
            self.unreached,
            tuple(self.interpreter.outside),
            found.epochs,
            found.best,
            found.resumed,
            check.worst,
            seconds,
        )

    def _score(self, model: ir.Model) -> Score | None:
        """Return how well a model does on the validation samples in the runtime."""
        from onnxopt.training.objective import score

        if self.judging is None:
            return None
        assert self.judging.labels is not None
        each = np.zeros(len(self.judging))
        with runtime.open_session(model, self.options, optimized=True) as session:
            for feed, members in self.judging.batches(range(len(self.judging)), EVALUATION_BATCH):
                output = session.run(feed, only=[self.objective.output])[self.objective.output]
                each[members] = self.objective.right(output, self.judging.labels[members])
        return score(self.objective.task, each)


def fingerprint(trained: Mapping[str, Any], examples: Examples, *settings: object) -> str:
    """Return what tells a run from others: its parameters, samples and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, each in trained.items():
        leaf: torch.Tensor = each.leaf
        digest.update(name.encode() + leaf.detach().numpy().tobytes())
    for feed in examples.feeds:
        for name, value in feed.items():
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    if examples.labels is not None:
        digest.update(np.ascontiguousarray(examples.labels).tobytes())
    return digest.hexdigest()
