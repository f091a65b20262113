"""How parameters are optimized."""

from __future__ import annotations

import dataclasses
import math

from onnxopt.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How parameters are optimized.

    Attributes:
        epochs: Passes over the samples, at most.
        learning_rate: Of the last layer, at its highest.
        batch: Samples per step.
        weight_decay: Decoupled decay of matrices (AdamW, arXiv:1711.05101).
        warmup: Share of the steps over which the learning rate rises; it then falls along a cosine.
        layer_decay: Factor of the learning rate from a layer to the one before it (arXiv:1801.06146).
        clip: Largest norm of all gradients together.
        patience: Epochs without a better state after which training ends.
        blend: How far the result goes from where training began to where it ended; 1 is all the way. Halfway keeps more
            of what was learnt before (WiSE-FT, arXiv:2109.01903).
        seed: Of the order of samples and what is random in them.
    """

    epochs: int
    learning_rate: float
    batch: int
    weight_decay: float
    warmup: float
    layer_decay: float
    clip: float
    patience: int
    blend: float
    seed: int

    def __post_init__(self) -> None:
        checks = {
            "epochs": self.epochs >= 1,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "batch": self.batch >= 1,
            "weight_decay": self.weight_decay >= 0,
            "warmup": 0 <= self.warmup < 1,
            "layer_decay": 0 < self.layer_decay <= 1,
            "patience": self.patience >= 1,
            "blend": 0 < self.blend <= 1,
            "seed": self.seed >= 0,
        }
        for name, fine in checks.items():
            if not fine:
                raise UsageError(f"{name} cannot be {getattr(self, name)}.", name)

    def rate(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate at a step, counted from 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))
