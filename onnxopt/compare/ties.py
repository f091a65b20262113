"""When two index outputs differ only because the values they rank are as good as equal."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxopt import graph as graphs

_SAME_ELEMENTS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that keep every element and their order."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Where an index output comes from.

    Attributes:
        scores: Name of the value whose elements are ranked.
        axis: Axis they are ranked along.
        keeps_axis: Whether the index array has that axis: TopK and ArgMax with keepdims.
    """

    scores: str
    axis: int
    keeps_axis: bool


def ranking(model: ir.Model, output: str) -> Ranking | None:
    """Return which values the named output of a model ranks, or None when it is no such index."""
    value: ir.Value | None = next((v for v in model.graph.outputs if v.name == output), None)
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if graphs.is_op(node, "ArgMax", "ArgMin"):
            keeps = bool(graphs.attribute(node, "keepdims", 1))
            return _ranking(node, graphs.attribute(node, "axis", 0), keeps)
        if graphs.is_op(node, "TopK") and value.index() == 1:
            return _ranking(node, graphs.attribute(node, "axis", -1), True)
        value = node.inputs[0] if graphs.is_op(node, *_SAME_ELEMENTS) else None
    return None


def _ranking(node: ir.Node, axis: int, keeps_axis: bool) -> Ranking | None:
    scores = node.inputs[0]
    return Ranking(scores.name, axis, keeps_axis) if scores is not None and scores.name else None


def with_scores(model: ir.Model, found: Ranking) -> ir.Model:
    """Return a copy of the model that also outputs the ranked values, under their own name."""
    copy = graphs.copied(model)
    known = {v.name: v for v in copy.graph.inputs}
    known |= {v.name: v for node in copy.graph for v in node.outputs}
    scores = known[found.scores]
    if all(v is not scores for v in copy.graph.outputs):
        copy.graph.outputs.append(scores)
    return copy


def all_tie(scores: np.ndarray, found: Ranking, reference: np.ndarray, other: np.ndarray, allowed: float) -> bool:
    """Whether wherever two index arrays differ, the values they point at differ by no more than allowed.

    Args:
        scores: The ranked values.
        found: How they are ranked.
        reference: Indices, of any shape with the right number of elements.
        other: The other indices, of the same shape.
        allowed: Absolute difference up to which two scores tie.
    """
    axis = found.axis % scores.ndim
    if other.size and not (-scores.shape[axis] <= int(other.min()) and int(other.max()) < scores.shape[axis]):
        return False
    per_axis = reference.size * scores.shape[axis] // max(scores.size, 1) if found.keeps_axis else 1
    shape = [per_axis if i == axis else d for i, d in enumerate(scores.shape)]
    if int(np.prod(shape)) != reference.size:
        return False
    one, two = (
        np.take_along_axis(scores, indices.reshape(shape).astype(np.int64), axis).astype(np.float64)
        for indices in (reference, other)
    )
    return bool(np.all((np.abs(one - two) <= allowed) | (one == two)))
