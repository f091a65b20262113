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
from onnxopt.contract import Context, ShowBeside
from onnxopt.coupling.analysis import Coupling, Group
from onnxopt.coupling.importance import Scores
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.removal import Removal
from onnxopt.graph import Names, copied, scopes
from onnxopt.numeric.elimination import Order, eliminate
from onnxopt.repair.layers import Layer, read
from onnxopt.repair.outputs import FLOATS, OutputError

Array = npt.NDArray[Any]

TRIAL_SAMPLES = 16
"""So many samples tell how much of what a layer loses reaches the outputs."""
NOTHING = 1e-12
"""A loss that is rounding."""
STILL = 1e-6
"""Outputs that move by so little do not move."""


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """What a group loses.

    Attributes:
        group: The group.
        order: Its units in the order in which they go.
        lost: (len(order) + 1,) the square error of the model's outputs by their power, when so many are gone.
        unread: Why the layers behind it could not be read: it is then judged by scores; empty otherwise.
        measured: Whether what is lost is of the outputs; it is of the scores where no data reach the group.
    """

    group: Group
    order: Ints
    lost: Array
    unread: str = ""
    measured: bool = True


def curves(
    model: ir.Model,
    coupling: Coupling,
    ctx: Context,
    least: Callable[[Group], int],
    scores: Callable[[Group], Scores],
) -> Iterator[Curve]:
    """Yield the curve of each group.

    The loss of the layers behind a group is known in closed form for any number of units. How much of it reaches the
    outputs is measured once for each group, with half of its units gone and the layers behind it fitted. Where layers
    cannot be read, the sums of scores take the place of the closed form, and nothing is fitted.

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
    removal = Removal(model, coupling)
    error_of = _Errors(ctx.calibration.observe_beside(model, outputs), outputs, ctx.calibration.samples)
    for seen in observe(model, coupling.groups, found, ctx.calibration, ctx.seed):
        group = seen.group
        if not seen.problems:
            yield _by_scores(seen, scores(group), least(group), removal, error_of)
            continue
        consumers = [problem.consumer for problem in seen.problems]
        order = eliminate(consumers, group.units, least(group), group.units // 2)
        yield Curve(group, order.units, order.lost * _reaching(model, seen, order, error_of))


def _by_scores(seen: Seen, scores: Scores, least: int, removal: Removal, error_of: _Errors) -> Curve:
    group = seen.group
    order = np.argsort(scores, kind="stable")[: max(0, group.units - least)]
    lost = np.concatenate([[0.0], np.cumsum(scores[order]) / max(float(scores.sum()), 1e-30)])
    half = min(len(order), group.units // 2)
    error = 0.0
    if half and lost[half] > NOTHING and error_of.outputs:
        error = error_of(removal.without(group.roots[order[:half]]))
    if error <= STILL:  # a branch that no sample runs is not worth nothing
        return Curve(group, order, lost, seen.unread, measured=False)
    return Curve(group, order, lost * _share(error, float(lost[half])), seen.unread)


def _reaching(model: ir.Model, seen: Seen, order: Order, error_of: _Errors) -> float:
    """Return the square error of the outputs by that of the layers behind a group."""
    lost = float(order.lost[order.halfway])
    if lost <= NOTHING or not error_of.outputs:
        return 1.0
    trial = copied(model)
    nodes = {node.outputs[0].name: node for node in trial.graph if node.outputs}
    scope, names, shapes = next(iter(scopes(trial))), Names(trial), Shapes(trial)
    for outlet, problem, weight in zip(seen.outlets, seen.problems, order.weights, strict=True):
        layer = read(nodes[outlet.layer.output.name], scope, shapes)
        assert isinstance(layer, Layer), "it was read in the original"
        layer.replace(problem.change(outlet, weight), names)
    return _share(error_of(trial), lost)


class _Errors:
    """Measures how far the outputs of changed models are from the original's.

    Attributes:
        outputs: Their names.
    """

    def __init__(self, show: ShowBeside, outputs: Sequence[str], samples: int) -> None:
        """Take what shows outputs beside the original's, their names, and how many samples there are."""
        self.outputs = tuple(outputs)
        self._show, self._samples = show, range(min(samples, TRIAL_SAMPLES))

    def __call__(self, changed: ir.Model) -> float:
        """Return the error of a model."""
        observer = OutputError(self.outputs)
        self._show(changed, [observer], self._samples)
        return observer.error


def _share(error: float, lost: float) -> float:
    return error**2 / lost if math.isfinite(error) else 1.0
