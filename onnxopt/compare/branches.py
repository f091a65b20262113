"""Which branches of a model's If nodes did the inputs that it was judged with never run?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibrate.collector import observe
from onnxopt.contract import Silent
from onnxopt.errors import RuntimeFailure
from onnxopt.feeds import Feed
from onnxopt.graph import constant_tensor, first_output, is_op
from onnxopt.runtime import RunOptions

NAMED = 4
"""Branches that are named; the others are counted."""


class _Taken:
    """The values a condition took on."""

    def __init__(self) -> None:
        self.values: set[bool] = set()

    def add(self, array: np.ndarray) -> None:
        """Take in the condition of one run."""
        self.values.update(bool(v) for v in array.reshape(-1))


def never_run(model: ir.Model, feeds: Sequence[Feed], options: RunOptions) -> str:
    """Return a sentence about the branches of the main graph that no feed runs; empty when all were run.

    Args:
        model: The model that was verified. Conditions that are constant are left out.
        feeds: What it was verified with.
        options: How it is run.
    """
    nodes = [n for n in model.graph if is_op(n, "If") and _is_computed(n.inputs[0])]
    taken = {n.inputs[0].name: _Taken() for n in nodes if n.inputs[0] is not None and n.inputs[0].name}
    if not taken:
        return ""
    try:
        observe(model, {name: [seen] for name, seen in taken.items()}, feeds, options, Silent())
    except RuntimeFailure:
        return ""  # what is wrong was said where the model was verified
    missing = [branch for node in nodes for branch in _missing(node, taken)]
    if not missing:
        return ""
    named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
    was = "was" if len(missing) == 1 else "were"
    return f"No input ran {named}, which {was} therefore not verified; give inputs that do with --data."


def _is_computed(condition: ir.Value | None) -> bool:
    return condition is not None and constant_tensor(condition) is None and not condition.is_initializer()


def _missing(node: ir.Node, taken: dict[str, _Taken]) -> list[str]:
    condition = node.inputs[0]
    seen = taken.get(condition.name or "") if condition is not None else None
    if seen is None or not seen.values:
        return []
    name = node.name or first_output(node)
    branches = (("then", True), ("else", False))
    return [f'the {branch} branch of "{name}"' for branch, value in branches if value not in seen.values]
