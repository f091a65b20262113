"""Sequences and optionals: a sequence is a list, an optional without a value None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import ints, normal_axis


def _place(position: Tensor | None, size: int) -> int:
    return size if position is None else normal_axis(ints(position)[0], size)


def split_to_sequence(call: Call, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    """Divide along an axis into a sequence."""
    axis = normal_axis(call.get("axis", 0), x.ndim)
    if sizes is None:
        parts = x.split(1, dim=axis)
        return list(parts) if call.get("keepdims", 1) else [part.squeeze(axis) for part in parts]
    return list(x.split(ints(sizes) if sizes.ndim else ints(sizes)[0], dim=axis))


def concat_from_sequence(call: Call, sequence: list[Tensor]) -> Tensor:
    """Join the elements of a sequence along an old or a new axis."""
    axis = call.get("axis")
    return torch.stack(sequence, dim=axis) if call.get("new_axis", 0) else torch.cat(sequence, dim=axis)


def insert(call: Call, sequence: list[Tensor], x: Tensor, position: Tensor | None = None) -> list[Tensor]:
    """Return a sequence with one more element."""
    place = _place(position, len(sequence))
    return [*sequence[:place], x, *sequence[place:]]


def erase(call: Call, sequence: list[Tensor], position: Tensor | None = None) -> list[Tensor]:
    """Return a sequence with one element less, the last by default."""
    place = len(sequence) - 1 if position is None else _place(position, len(sequence))
    return [*sequence[:place], *sequence[place + 1 :]]


def at(call: Call, sequence: list[Tensor], position: Tensor) -> Tensor:
    """Return an element."""
    return sequence[ints(position)[0]]


def optional(call: Call, value: Any = None) -> Any:
    """Wrap a value, which changes nothing here."""
    return value


OPS: dict[str, Operator] = {
    "SequenceConstruct": lambda call, *inputs: list(inputs),
    "SequenceEmpty": lambda call: [],
    "SequenceAt": at,
    "SequenceInsert": insert,
    "SequenceErase": erase,
    "SequenceLength": lambda call, sequence: torch.tensor(len(sequence), dtype=torch.int64),
    "SplitToSequence": split_to_sequence,
    "ConcatFromSequence": concat_from_sequence,
    "Optional": optional,
    "OptionalGetElement": optional,
    "OptionalHasElement": lambda call, value=None: torch.tensor(value is not None),
}
