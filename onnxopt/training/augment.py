"""Variants of samples, so that few go further."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from onnxopt.errors import UsageError
from onnxopt.training.values import on_device


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """A batch as it is learnt from.

    Attributes:
        inputs: The inputs.
        partners: For each sample the number of the one it was mixed with.
        share: Of the sample itself in the mixture.
    """

    inputs: dict[str, torch.Tensor]
    partners: np.ndarray
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done at random to samples of floating-point inputs each time they are learnt from.

    Attributes:
        shift: Pixels by which images, inputs of four axes, move at most along each of the last two, the border
            repeated.
        noise: Standard deviation of what is added, as a fraction of that of the batch.
        mix: Mixes pairs of samples, labels included: the parameter of the beta distribution that gives the share
            (mixup, arXiv:1710.09412). 0 mixes none.
    """

    shift: int = 0
    noise: float = 0.0
    mix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shift", "noise", "mix"):
            if not 0 <= getattr(self, name) < 1000:
                raise UsageError(f"{name} cannot be {getattr(self, name)}.", name)

    def varied(self, feed: Mapping[str, torch.Tensor], rng: np.random.Generator) -> Variant:
        """Return a variant of a batch."""
        made = dict(feed)
        rows = min((len(v) for v in made.values()), default=0)
        partners, share = np.arange(rows), 1.0
        if self.mix and rows > 1:
            partners, share = rng.permutation(rows), float(rng.beta(self.mix, self.mix))
        for name, value in feed.items():
            if not value.is_floating_point():
                continue
            if self.shift and value.ndim == 4:
                value = _shifted(value, self.shift, rng)
            if share < 1 and len(value) == rows:
                value = share * value + (1 - share) * value[on_device(partners)]
            if self.noise:
                noise = on_device(rng.standard_normal(tuple(value.shape)).astype(np.float32))
                value = value + self.noise * value.std() * noise.to(value.dtype)
            made[name] = value
        return Variant(made, partners, share)


def _shifted(images: torch.Tensor, most: int, rng: np.random.Generator) -> torch.Tensor:
    """Return each image moved by its own number of pixels."""
    height, width = images.shape[2:]
    down, right = rng.integers(-most, most + 1, (2, len(images), 1))
    rows = on_device(np.clip(np.arange(height) + down, 0, height - 1))
    columns = on_device(np.clip(np.arange(width) + right, 0, width - 1))
    each = torch.arange(len(images)).reshape(-1, 1, 1)
    return images.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
