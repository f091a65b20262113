"""Two models of which one leaves axes of inputs open that the other has fixed: compared is what both take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.model import fix_shape


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two models with inputs of the same shapes, as far as that could be reached.

    Attributes:
        reference: The one, with open axes fixed where the other has them fixed.
        candidate: The other, likewise.
        note: What was narrowed, in a sentence; empty for nothing.
    """

    reference: ir.Model
    candidate: ir.Model
    note: str = ""


def narrowed(reference: ir.Model, candidate: ir.Model) -> Pair:
    """Fix the axes of inputs that only one of two models leaves open, as the other has them.

    Models that have nothing of this kind, or of which the one asks for two sizes of one axis of the other, come back
    as they are.

    Args:
        reference: The model as it should be; neither is changed.
        candidate: The model to judge.
    """
    one, two = reference, candidate
    # fixing an axis fixes all of its name, which may leave others open on the other side
    while (first := _sizes(one, two)) or (second := _sizes(two, one)):
        try:
            one, two = (fix_shape(one, first), two) if first else (one, fix_shape(two, second))
        except UsageError:
            return Pair(reference, candidate)
    if one is reference and two is candidate:
        return Pair(reference, candidate)
    one, two = fix_shape(one, {}), fix_shape(two, {})
    _settle_outputs(one, two)
    said = (*_changes("the first", reference, one), *_changes("the second", candidate, two))
    return Pair(one, two, f"compared for the shapes that both models take: {'; '.join(said)}")


def _sizes(model: ir.Model, other: ir.Model) -> dict[str, int]:
    """Return the sizes that another model has for axes which this one leaves open, as "input:position"."""
    theirs = {v.name: v.shape for v in other.graph.inputs}
    found = {}
    for value in model.graph.inputs:
        shape = theirs.get(value.name)
        if value.shape is None or shape is None or len(shape) != len(value.shape):
            continue
        for axis, (ours, size) in enumerate(zip(value.shape, shape, strict=True)):
            if _is_open(ours) and isinstance(size, int) and size > 0:
                found[f"{value.name}:{axis}"] = size
    return found


def _is_open(dim: int | ir.SymbolicDim) -> bool:
    # some exporters write -1 for a size that is not known
    return not isinstance(dim, int) or dim < 0


def _settle_outputs(one: ir.Model, two: ir.Model) -> None:
    """Where only one model states a size of an output, let both: the outputs themselves are compared anyway."""
    for first, second in zip(one.graph.outputs, two.graph.outputs, strict=False):
        if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
            continue
        pairs = list(zip(first.shape, second.shape, strict=True))
        first.shape = ir.Shape([b if _is_open(a) else a for a, b in pairs])
        second.shape = ir.Shape([a if _is_open(b) else b for a, b in pairs])


def _changes(which: str, before: ir.Model, after: ir.Model) -> Iterator[str]:
    """Yield what became of the inputs of a model."""
    for old, new in zip(before.graph.inputs, after.graph.inputs, strict=True):
        if old.shape != new.shape:
            yield f'the input "{old.name}" of {which} is {_shape(old.shape)} and was fixed to {_shape(new.shape)}'


def _shape(shape: ir.Shape | None) -> str:
    return "[" + ", ".join(str(d) if isinstance(d, int) else d.value or "?" for d in shape or ()) + "]"
