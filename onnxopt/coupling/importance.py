"""How much the units of a group matter, by what is in the file."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxopt.coupling.analysis import Group, Member
from onnxopt.coupling.grids import NUMBERS, numbers

Scores: TypeAlias = npt.NDArray[np.float64]


def magnitude(group: Group) -> Scores:
    """Return the squared norm of what each unit consists of, (units,).

    Each constant counts as much as any other, whatever its size: its squared norms are divided by their mean.
    (Group norm of DepGraph, https://arxiv.org/abs/2301.12900, section 3.3.)
    """
    total: Scores = np.zeros(group.units)
    for member in weighed(group):
        scores = squared_norms(member, group.units)
        mean = scores.mean()
        if np.isfinite(mean) and mean > 0:
            total += scores / mean
    return total


def weighed(group: Group) -> tuple[Member, ...]:
    """Return the members that are matrices or kernels, or all where there is none."""
    known = tuple(m for m in group.members if m.tensor.dtype in NUMBERS)
    return tuple(m for m in known if m.tensor.size > max(m.tensor.shape.numpy(), default=1)) or known


def squared_norms(member: Member, units: int) -> Scores:
    """Return the sum of the squares of a constant by the units that its elements belong to, (units,)."""
    inside = member.units >= 0
    scores: Scores = np.bincount(member.units[inside], index_norms(member)[inside], minlength=units).astype(np.float64)
    return scores


def index_norms(member: Member) -> Scores:
    """Return the sum of the squares of a constant at each index of the axis, (size,)."""
    rows = np.moveaxis(numbers(member.value, member.tensor), member.axis, 0).reshape(len(member.units), -1)
    norms: Scores = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return norms
