"""What training gives, and what there is to tell of it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxopt.probe.folds import wilson
from onnxopt.report.words import count

if TYPE_CHECKING:
    from onnxopt.training.fit import Epoch


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """How well a model does on samples.

    Attributes:
        name: What it is, such as "accuracy".
        value: Its mean.
        low: Lower end of its 95% interval.
        high: Upper end.
        samples: How many samples.
        is_share: Whether it is the share of samples that are right, of which more is better; else it is an error.
    """

    name: str
    value: float
    low: float
    high: float
    samples: int
    is_share: bool

    def __str__(self) -> str:
        """Return it in words."""
        form = ".1%" if self.is_share else ".4g"
        value, low, high = (format(number, form) for number in (self.value, self.low, self.high))
        return f"{value} ({low} to {high}, {self.samples:,} samples)"

    def is_worse_than(self, other: Score) -> bool:
        """Whether another score of the same name is better."""
        return self.value < other.value if self.is_share else self.value > other.value


def score(name: str, each: np.ndarray, *, is_share: bool) -> Score:
    """Return the mean of what each sample scored: with Wilson's interval for shares, else with the normal one."""
    mean = float(np.mean(each))
    if is_share:
        return Score(name, mean, *wilson(float(np.sum(each)), len(each)), len(each), True)
    half = 1.959964 * float(np.std(each)) / math.sqrt(len(each))
    return Score(name, mean, mean - half, mean + half, len(each), False)


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """A model whose parameters were trained.

    Attributes:
        model: The model.
        targets: What it learnt, in words.
        before: How well the model did on samples that it did not learn from, as the runtime computes it; None without
            any.
        after: How well the result does.
        folds: In how many folds the samples were that both figures are of; 0 when some were kept from training.
        trained: Names of the parameters that were trained.
        stored: Those among them that a ConstantOfShape made in every run and that are initializers now.
        unreached: Those that were chosen and that no gradient reaches, because torch has no counterpart for a node
            behind them; they stayed.
        restored: Weights of the layers that a BatchNormalization stood behind in training.
        running: Outputs of the BatchNormalizations of the graph whose statistics followed the batches.
        outside: The nodes that the runtime computed, in words.
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
    folds: int
    trained: tuple[str, ...]
    stored: tuple[str, ...]
    unreached: tuple[str, ...]
    restored: tuple[str, ...]
    running: tuple[str, ...]
    outside: tuple[str, ...]
    epochs: tuple[Epoch, ...]
    best: int
    resumed: int
    deviation: float
    seconds: float

    @property
    def is_worse(self) -> bool:
        """Whether the result does worse on samples it did not learn from than the model did."""
        return self.before is not None and self.after is not None and self.after.is_worse_than(self.before)

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
            told.append(
                f"{self.after.name.capitalize()} on samples not learnt from: before {self.before}, after {self.after}."
            )
            if self.folds:
                told.append(f"These are figures of {self.folds} folds; the model itself was trained on all samples.")
        else:
            told.append("No samples were kept for validation, so nothing says whether the model became better.")
        if self.resumed:
            told.append(f"{count(self.resumed, 'epoch')} had been done before, as the checkpoint says.")
        if self.stored:
            names = ", ".join(self.stored[:3]) + (", ..." if len(self.stored) > 3 else "")
            told.append(
                f"{count(len(self.stored), 'parameter')} that the graph made by ConstantOfShape became initializers, "
                f"so that the model can hold what they learnt: {names}."
            )
        if self.restored:
            told.append(
                f"BatchNormalization stood behind {count(len(self.restored), 'layer')} in training and is folded into "
                "their weights."
            )
        if self.running:
            told.append(
                f"The statistics of {count(len(self.running), 'BatchNormalization')} of the graph followed the batches."
            )
        if self.unreached:
            behind = f" They lie before {', '.join(self.outside[:3])}, computed by the runtime." if self.outside else ""
            told.append(f"No gradient reaches {count(len(self.unreached), 'parameter')}, which stayed.{behind}")
        told.append(f"Verified: ONNX Runtime computes what was trained, to {self.deviation:.1g} of the output's range.")
        return told
