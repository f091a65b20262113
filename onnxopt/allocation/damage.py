"""What a group loses when so many of its units are gone and the layers behind it make up for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.allocation.consumers import Seen, observe, outlets
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context
from onnxopt.coupling.analysis import Coupling, Group
from onnxopt.coupling.importance import Scores
from onnxopt.coupling.partition import Ints
from onnxopt.graph import Names, copied, scopes
from onnxopt.numeric.elimination import Order, eliminate
from onnxopt.repair.layers import Layer, read
from onnxopt.repair.outputs import FLOATS, OutputError

Array = npt.NDArray[Any]

TRIAL_SAMPLES = 16
"""So many samples tell how much of what a layer loses reaches the outputs."""
NOTHING = 1e-12
"""A loss that is rounding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """What a group loses.

    Attributes:
        group: The group.
        order: Its units in the order in which they go.
        lost: (len(order) + 1,) the square error of the model's outputs by their power, when so many are gone.
    """

    group: Group
    order: Ints
    lost: Array


def curves(
    model: ir.Model,
    coupling: Coupling,
    ctx: Context,
    least: Callable[[Group], int],
    scores: Callable[[Group], Scores],
) -> Iterator[Curve]:
    """Yield the curve of each group.

    The loss of the layers behind a group is known in closed form for any number of units. How much of it reaches the
    outputs is measured once for each group, with half of its units gone and the layers behind it fitted.

    Args:
        model: The model that was analysed; it is not changed.
        coupling: The analysis.
        ctx: With data.
        least: How many units of a group stay at least.
        scores: The importance of the units of a group whose consumers cannot be read.
    """
    assert ctx.calibration is not None, "the pass looked"
    found = outlets(model, coupling)
    outputs = [v.name or "" for v in model.graph.outputs if coupling.shapes.dtype(v) in FLOATS]
    for seen in observe(model, coupling.groups, found, ctx.calibration, ctx.seed):
        group = seen.group
        if not seen.problems:
            yield _by_scores(group, scores(group), least(group))
            continue
        consumers = [problem.consumer for problem in seen.problems]
        order = eliminate(consumers, group.units, least(group), group.units // 2)
        yield Curve(group, order.units, order.lost * _reaching(model, seen, order, outputs, ctx))


def _by_scores(group: Group, scores: Scores, least: int) -> Curve:
    order = np.argsort(scores, kind="stable")[: max(0, group.units - least)]
    total = max(float(scores.sum()), 1e-30)
    return Curve(group, order, np.concatenate([[0.0], np.cumsum(scores[order]) / total]))


def _reaching(model: ir.Model, seen: Seen, order: Order, outputs: Sequence[str], ctx: Context) -> float:
    """Return the square error of the outputs by that of the layers behind a group."""
    lost = float(order.lost[order.halfway])
    if lost <= NOTHING or not outputs:
        return 1.0
    trial = copied(model)
    nodes = {node.outputs[0].name: node for node in trial.graph if node.outputs}
    scope, names, shapes = next(iter(scopes(trial))), Names(trial), Shapes(trial)
    for outlet, problem, weight in zip(seen.outlets, seen.problems, order.weights, strict=True):
        layer = read(nodes[outlet.layer.output.name], scope, shapes)
        assert isinstance(layer, Layer), "it was read in the original"
        layer.replace(problem.change(outlet, weight), names)
    observer = OutputError(outputs)
    assert ctx.calibration is not None, "the caller looked"
    ctx.calibration.observe_both(model, trial, [observer], most=TRIAL_SAMPLES)
    error = observer.error**2
    return error / lost if math.isfinite(error) else 1.0
