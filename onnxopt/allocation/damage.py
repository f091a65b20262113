"""What a group loses when so many of its units are gone and the layers behind it make up for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.allocation.consumers import Seen, held_back, observe, outlets
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS
from onnxopt.contract import Context, ShowBeside
from onnxopt.coupling.analysis import Coupling, Group
from onnxopt.coupling.importance import Scores
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.removal import Removal
from onnxopt.graph import Names, copied, scopes
from onnxopt.numeric.elimination import Order, eliminate
from onnxopt.repair.layers import Layer, read
from onnxopt.repair.outputs import OutputError

Array = npt.NDArray[Any]

TRIAL_SAMPLES = 16
"""So many samples tell how much of what a layer loses reaches the outputs."""
NOTHING = 1e-12
"""A loss that is rounding."""
STILL = 1e-6
"""Outputs that move by so little do not move."""
NOT_FINITE = "with half of them gone and the layers behind fitted, outputs hold NaN or infinity"
"""Why a group is judged by scores although the layers behind it can be read."""
BREAKS = "without half of them outputs hold NaN or infinity"
"""Why all units of a group stay."""


def unjudged(model: ir.Model, ctx: Context) -> str:
    """Return why what a model's outputs lose cannot be told; empty when it can.

    Args:
        model: The model.
        ctx: With data.
    """
    assert ctx.calibration is not None, "the pass looked"
    finite = _Finite([v.name or "" for v in model.graph.outputs if ctx.shapes.dtype(v) in FLOATS])
    ctx.calibration.observe_both(model, model, [finite], most=TRIAL_SAMPLES)
    if finite.found:
        return ""
    kind = "your" if ctx.calibration.real else "generated"
    return f"on {kind} samples outputs of the original hold NaN or infinity, so that what they lose cannot be told"


class _Finite:
    """Observes whether outputs are finite. An `onnxopt.contract.JointObserver`.

    Attributes:
        reference: The outputs.
        changed: Nothing of the second model.
        found: Whether all were so far.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.reference, self.changed = tuple(names), ()
        self.found = True

    def add(self, reference: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> None:
        """Take in the outputs for a sample."""
        self.found = self.found and all(np.isfinite(array).all() for array in reference)


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """What a group loses.

    Attributes:
        group: The group.
        order: Its units in the order in which they go; none where outputs would hold NaN or infinity.
        lost: (len(order) + 1,) the square error of the model's outputs by their power, when so many are gone.
        unread: Why the layers behind it could not be read, so that it is judged by scores, or why all of its units
            stay; empty otherwise.
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

    The loss of the layers behind a group follows from products of their inputs for any number of units. How much of it
    reaches the outputs is measured once for each group, with half of its units gone and the layers behind it fitted.
    Both are seen on samples that the layers were not fitted to. Where layers cannot be read, or what they lose is no
    finite number, sums of scores take their place, and nothing is fitted.

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
        lost = order.lost * _reaching(model, seen, order, error_of)
        if np.isfinite(lost).all():
            yield Curve(group, order.units, lost)
        else:
            unread = dataclasses.replace(seen, unread=NOT_FINITE)
            yield _by_scores(unread, scores(group), least(group), removal, error_of)


def _by_scores(seen: Seen, scores: Scores, least: int, removal: Removal, error_of: _Errors) -> Curve:
    group = seen.group
    order = np.argsort(scores, kind="stable")[: max(0, group.units - least)]
    lost = np.concatenate([[0.0], np.cumsum(scores[order]) / max(float(scores.sum()), 1e-30)])
    half = min(len(order), group.units // 2)
    error = 0.0
    if half and lost[half] > NOTHING and error_of.outputs:
        error = error_of(removal.without(group.roots[order[:half]]), error_of.first)
    if not math.isfinite(error):
        return Curve(group, order[:0], lost[:1], BREAKS, measured=False)
    if error <= STILL:  # a branch that no sample runs is not worth nothing
        return Curve(group, order, lost, seen.unread, measured=False)
    return Curve(group, order, lost * (error**2 / float(lost[half])), seen.unread)


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
    return error_of(trial, error_of.held) ** 2 / lost


class _Errors:
    """Measures how far the outputs of changed models are from the original's.

    Attributes:
        outputs: Their names.
        held: Numbers of samples that nothing was fitted to.
        first: Numbers of any samples.
    """

    def __init__(self, show: ShowBeside, outputs: Sequence[str], samples: int) -> None:
        """Take what shows outputs beside the original's, their names, and how many samples there are."""
        self.outputs, self._show = tuple(outputs), show
        self.held, self.first = held_back(samples)[:TRIAL_SAMPLES], range(samples)[:TRIAL_SAMPLES]

    def __call__(self, changed: ir.Model, samples: range) -> float:
        """Return the error of a model."""
        observer = OutputError(self.outputs)
        self._show(changed, [observer], samples)
        return observer.error
