"""What is optimized in place of a parameter, so that what compression made of it stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from onnxopt.training.parameters import Parameter

LEAST_ZEROS = 0.1
"""A matrix of which this share is zero has been pruned; its zeros stay."""

MOST_SHARED = 256
"""A large matrix with so few different values holds a codebook; equal values move together."""

_LARGE = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Trainable:
    """A parameter and the tensor that stands for it in training.

    Attributes:
        name: The parameter's name.
        depth: Layers behind it.
        is_made: Whether the graph makes it in every run instead of storing it.
        leaf: What the optimizer changes: the parameter itself, or the different values it holds.
        index: Which value each element holds; None when the leaf is the parameter itself.
        mask: Zero where elements of the leaf stay zero; None when all may change.
    """

    name: str
    depth: int
    is_made: bool
    leaf: torch.Tensor
    index: torch.Tensor | None
    mask: torch.Tensor | None

    def value(self) -> torch.Tensor:
        """Return the parameter's value."""
        tensor = self.leaf if self.mask is None else self.leaf * self.mask
        return tensor if self.index is None else tensor[self.index]

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to biases and scales."""
        return self.index is None and self.leaf.ndim > 1


def trainable(parameter: Parameter) -> Trainable:
    """Return what to optimize for a parameter (Deep Compression, arXiv:1510.00149)."""
    whole = parameter.initial
    index = None
    leaf = whole
    if whole.ndim > 1 and whole.numel() >= _LARGE:
        values, places = torch.unique(whole, return_inverse=True)
        if 1 < values.numel() <= MOST_SHARED:
            leaf, index = values, places
    zeros = (whole == 0).float().mean().item() if whole.ndim > 1 else 0.0
    mask = (leaf != 0).to(leaf.dtype) if LEAST_ZEROS <= zeros < 1 else None
    return Trainable(parameter.name, parameter.depth, parameter.is_made, leaf.clone().requires_grad_(True), index, mask)


def values_of(trained: Mapping[str, Trainable]) -> dict[str, torch.Tensor]:
    """Return the value of every parameter."""
    return {name: each.value() for name, each in trained.items()}
