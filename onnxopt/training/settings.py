"""Options of a training, checked and in the form that its parts take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from onnxopt.contract import Progress, Silent
from onnxopt.errors import UsageError
from onnxopt.model import check_output
from onnxopt.registry import nearest
from onnxopt.runtime import RunOptions
from onnxopt.training.augment import Augmentation
from onnxopt.training.devices import require_device
from onnxopt.training.options import BATCHNORM, DEFAULTS, BatchNorm, Device, TrainingOptions
from onnxopt.training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the trainings of all kinds have in common.

    Attributes:
        recipe: How parameters are optimized.
        augmentation: What is done to samples at random.
        train: Patterns of the names of parameters that are trained; all when there are none.
        freeze: Patterns of those that are not.
        validation: Share of the samples that judge and are not learnt from.
        judging_folds: How many folds judge instead; 0 for none.
        batchnorm: What BatchNormalization goes by; see `TrainingOptions`.
        batchnorm_behind: Patterns of the names of weights that one is put behind.
        threads: Threads of torch and of the runtime.
        device: What torch computes on.
        checkpoint: File for the state after each epoch.
        progress: Told what is being done.
    """

    recipe: Recipe
    augmentation: Augmentation
    train: Sequence[str]
    freeze: Sequence[str]
    validation: float
    judging_folds: int
    batchnorm: BatchNorm
    batchnorm_behind: Sequence[str]
    threads: int
    device: Device
    checkpoint: Path | None
    progress: Progress

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UsageError(f"validation must be at least 0 and below 1, not {self.validation}.", "validation")
        if self.judging_folds < 0 or self.judging_folds == 1:
            raise UsageError(
                f"judging_folds must be at least 2, or 0 for none, not {self.judging_folds}.", "judging_folds"
            )
        if self.batchnorm not in BATCHNORM:
            raise UsageError(f'batchnorm must be {", ".join(BATCHNORM)}, not "{self.batchnorm}".', "batchnorm")
        if self.batchnorm_behind and self.batchnorm != "restored":
            raise UsageError('batchnorm_behind is for batchnorm "restored".', "batchnorm_behind")
        if self.threads < 1:
            raise UsageError(f"threads must be at least 1, not {self.threads}.", "threads")
        require_device(self.device)
        if self.checkpoint is not None:
            check_output(self.checkpoint)

    @property
    def options(self) -> RunOptions:
        """How the runtime runs models."""
        return RunOptions(threads=self.threads)


def settings(given: TrainingOptions, own: TrainingOptions, *, blend: float = 1.0) -> Settings:
    """Return the settings of a training.

    Args:
        given: What the caller asked for.
        own: Defaults of this kind of training, where they differ from those of all.
        blend: How far the result goes from what was there to what was trained.

    Raises:
        TypeError: If there is no option of a name.
        UsageError: If an option cannot be used.
    """
    for name in given:
        if name not in DEFAULTS:
            raise TypeError(f'There is no option "{name}".{nearest(name, list(DEFAULTS))}')
    if given.get("judging_folds") and given.get("validation"):
        raise UsageError(
            "judging_folds and validation exclude each other; give one of them.", "judging_folds", "validation"
        )
    chosen: TrainingOptions = {**DEFAULTS, **own, **given}
    checkpoint = chosen["checkpoint"]
    return Settings(
        recipe=Recipe(
            epochs=chosen["epochs"],
            learning_rate=chosen["learning_rate"],
            batch=chosen["batch"],
            weight_decay=chosen["weight_decay"],
            warmup=chosen["warmup"],
            layer_decay=chosen["layer_decay"],
            clip=chosen["clip"],
            patience=chosen["patience"],
            blend=blend,
            seed=chosen["seed"],
        ),
        augmentation=Augmentation(shift=chosen["shift"], noise=chosen["noise"], mix=chosen["mix"]),
        train=chosen["train"],
        freeze=chosen["freeze"],
        validation=chosen["validation"],
        judging_folds=chosen["judging_folds"],
        batchnorm=chosen["batchnorm"],
        batchnorm_behind=chosen["batchnorm_behind"],
        threads=chosen["threads"],
        device=chosen["device"],
        checkpoint=None if checkpoint is None else Path(checkpoint),
        progress=chosen["progress"] or Silent(),
    )
