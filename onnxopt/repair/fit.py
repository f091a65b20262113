"""Repair by sequential least squares: layer by layer, a changed model is fitted to what the original computes.

From unlabelled inputs alone. Layers are fitted in the order in which they run, each on the activations that the model
has with all layers before it repaired, to the outputs that the original has: errors do not add up, they are taken
out where they arise. (Luo et al., "ThiNet", 2017, fit one layer like this; He et al., "Channel Pruning", 2017, too.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Context, Edit, Refusal, Site, Stop
from onnxopt.graph import Names, bodies, scopes
from onnxopt.numeric.least_squares import Change, Moments, ridge
from onnxopt.removed import Fit
from onnxopt.repair.layers import Layer, read

Array = np.ndarray[Any, Any]

HOLD_BACK = 4
"""Every so many samples one is held back, to see whether the fit holds for data it has not seen."""
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
"""What is tried, as long as the error on the samples held back falls."""
LEAST_GAIN = 0.01
"""A fit that takes away less of the square error is not worth new weights."""
NOTHING = 1e-9
"""A square error that is rounding, as a fraction of the output's variance."""
SAME = 1e-9
"""A spread that is rounding, as a fraction of the mean square."""
MOMENT_BYTES = 1 << 30
"""Memory for what is known of the layers that are fitted together."""
FEW_ROWS, MANY_ROWS, LEAST_ROWS = 2, 32, 4096
"""Rows per input of a layer: as many as `WORK` allows, between the first two, and no fewer than the last."""
WORK = 2e10
"""Floating-point operations for the Gram matrix of one layer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a layer of the changed model should compute.

    Attributes:
        layer: The output of its node in the changed model.
        value: The value of the original that it should equal.
        kept: Which channels of that value the changed model still has; None for all.
        through: A value of the changed model that is to equal `value` instead, and that is the layer's output plus
            something else, such as a residual; None for the output itself.
    """

    layer: str
    value: str
    kept: tuple[int, ...] | None = None
    through: str | None = None


def repair(
    pass_name: str, original: ir.Model, model: ir.Model, targets: Sequence[Target], ctx: Context
) -> Iterator[Edit | Refusal]:
    """Yield an edit for every layer whose weights are worth replacing.

    Layers that do not depend on one another are fitted on the same run of the data. The generator must be resumed
    after an edit was applied, or was not: the layers behind see the model as it then is.

    Args:
        pass_name: The pass that the sites belong to.
        original: The model as it was.
        model: The model as it is now.
        targets: What its layers should compute, in any order.
        ctx: With data to run both on.
    """
    calibration = ctx.calibration
    assert calibration is not None, "the pass looked"
    found: list[tuple[Layer, Target]] = []
    known = {v.name for v in original.graph.inputs} | {v.name for node in original.graph for v in node.outputs}
    for layer, target in _layers(model, targets, ctx):
        if target.value not in known:
            yield Refusal(Site(pass_name, "", target.layer), "the original has no such value")
        elif isinstance(layer, str):
            yield Refusal(Site(pass_name, "", target.layer), layer)
        else:
            found.append((layer, target))
    names = Names(model)
    portions = list(_portions(model, found))
    show = calibration.walk_both(original, model, [_stop(portion) for portion in portions])
    for portion in portions:
        samples = calibration.samples
        observers = [Residuals(layer, target, samples, (ctx.seed, i)) for i, (layer, target) in enumerate(portion)]
        show(observers)
        for observer in observers:
            site = Site(pass_name, "", observer.target.layer)
            fitted = observer.fit()
            if isinstance(fitted, Unfitted):
                error = fitted.error
                left = None if error is None else Fit(observer.target.layer, error, error)
                yield Refusal(site, fitted.reason, left)
            else:
                apply = functools.partial(observer.layer.replace, fitted.change, names)
                fit = Fit(observer.target.layer, fitted.before, fitted.after)
                yield Edit(site, f"weights fitted to the original: {fitted}", apply, fit=fit, repairs=True)


def _layers(model: ir.Model, targets: Sequence[Target], ctx: Context) -> Iterator[tuple[Layer | str, Target]]:
    """Yield what is at each target, in the order in which the layers run."""
    wanted = {target.layer: target for target in targets}
    scope = next(iter(scopes(model)))
    for node in model.graph:
        target = wanted.pop(node.outputs[0].name or "", None) if node.outputs else None
        if target is not None:
            yield read(node, scope, ctx.shapes) or "it has no constant weight", target
    for target in wanted.values():
        yield "the main graph has no such layer", target


def _portions(model: ir.Model, found: Sequence[tuple[Layer, Target]]) -> Iterator[list[tuple[Layer, Target]]]:
    """Divide layers into lists that are fitted on the same run of the data.

    No layer depends on another one of its list, and what is known of all of them fits into memory.
    """
    waiting = {layer.node: (layer, target) for layer, target in found}
    portion: list[tuple[Layer, Target]] = []
    behind: set[ir.Value] = set()
    room = MOMENT_BYTES
    for node in model.graph:
        late = any(v in behind for v in node.inputs) or (bool(behind) and any(True for _ in bodies(node)))
        item = waiting.get(node)
        if item is not None:
            size = _size(item[0])
            # What makes a sum right must see the other parts of it as they will be.
            late = late or item[1].through is not None
            if portion and (late or size > room):
                yield portion
                portion, behind, room = [], set(), MOMENT_BYTES
            portion.append(item)
            room -= size
        if item is not None or late:
            behind.update(node.outputs)
    if portion:
        yield portion


def _stop(portion: Sequence[tuple[Layer, Target]]) -> Stop:
    """Return what is looked at when these layers are fitted."""
    changed = [name for layer, target in portion for name in _looks_at(layer, target)]
    replaced = tuple(layer.output.name or "" for layer, _ in portion)
    return Stop(tuple(target.value for _, target in portion), tuple(changed), replaced)


def _looks_at(layer: Layer, target: Target) -> tuple[str, str, str]:
    """Return the input and output of a layer, and what is to become right."""
    output = layer.output.name or ""
    return layer.x.name or "", output, target.through or output


def _size(layer: Layer) -> int:
    moments = 8 * layer.groups * layer.inputs * (layer.inputs + layer.outputs)
    return moments + 4 * wanted_rows(layer) // HOLD_BACK * layer.groups * (layer.inputs + layer.outputs)


def wanted_rows(layer: Layer) -> int:
    """Return how many rows a layer is fitted on: more make the fit better, and take time."""
    affordable = int(WORK / (2 * layer.groups * layer.inputs**2))
    return max(LEAST_ROWS, min(max(affordable, FEW_ROWS * layer.inputs), MANY_ROWS * layer.inputs))


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """A change and what it brings.

    Attributes:
        change: What to add to weight and bias.
        before: Error of the layer's output on samples held back, as a fraction of the original's spread over all.
        after: The same with the change that was learnt from the other samples.
        damping: How much it was held in check.
    """

    change: Change
    before: float
    after: float
    damping: float

    def __str__(self) -> str:
        """Return e.g. `error 41.2% to 9.8% on samples held back`."""
        return f"error {self.before:.1%} to {self.after:.1%} on samples held back"


@dataclasses.dataclass(frozen=True, slots=True)
class Unfitted:
    """Why there is no change.

    Attributes:
        reason: In words.
        error: Error of the layer's output as it is; see `Fitted.before`. None where it could not be told.
    """

    reason: str
    error: float | None = None


class Residuals:
    """Observes what the output of a layer lacks. An `onnxopt.contract.JointObserver`.

    Attributes:
        layer: The layer of the changed model.
        target: What it should compute.
        reference: The names it looks at in the original.
        changed: The names it looks at in the changed model.
    """

    def __init__(self, layer: Layer, target: Target, samples: int, seed: tuple[int, ...]) -> None:
        """Start from nothing.

        Args:
            layer: The layer.
            target: What it should compute.
            samples: How many there will be.
            seed: Seeds which positions of its output are looked at.
        """
        self.layer, self.target = layer, target
        self.reference = (target.value,)
        self.changed = _looks_at(layer, target)
        self._moments = Moments(layer.groups, layer.inputs, layer.outputs)
        self._held: list[tuple[Array, Array]] = []
        self._goal = _Spread()
        self._rows = math.ceil(wanted_rows(layer) / max(1, samples))
        self._whole = samples >= HOLD_BACK
        self._seed, self._seen = seed, 0
        self._misfit = ""

    def add(self, reference: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> None:
        """Take in the values of one run."""
        (wanted,), (x, output, current) = reference, changed
        if self.target.kept is not None:
            wanted = np.take(wanted, self.target.kept, self.layer.axis)
        if wanted.shape != current.shape or current.shape != output.shape:
            self._misfit = f"its output has shape {list(current.shape)}, the original's {list(wanted.shape)}"
            return
        rng = np.random.default_rng((*self._seed, self._seen))
        self._seen += 1
        count = output.size // max(1, self.layer.channels)
        positions = rng.permutation(count)[: self._rows] if count > self._rows else np.arange(count)
        rows = self.layer.rows(x, output.shape, positions)
        goal = self.layer.at(wanted, positions)
        lacking = goal - self.layer.at(current, positions)
        held = np.arange(len(positions)) % HOLD_BACK == HOLD_BACK - 1
        if self._whole:
            held[:] = self._seen % HOLD_BACK == 0
        self._goal.add(goal)
        if held.any():
            self._held.append((rows[held], lacking[held]))
        if not held.all():
            self._moments.add(rows[~held], lacking[~held])

    def fit(self) -> Fitted | Unfitted:
        """Return the best change, learnt from all samples, or why there is none."""
        if self._misfit:
            return Unfitted(self._misfit)
        if not self._held or not self._moments.usable:
            return Unfitted("its activations were too few, or held NaN or infinity")
        x, r = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        before, spread = _power(r), len(r) * self._goal.of_a_row
        if not math.isfinite(before):
            return Unfitted("its activations held NaN or infinity")
        error = math.sqrt(before / spread)
        if before <= NOTHING * spread:
            return Unfitted("it computes what it did", error)
        after, damping = math.inf, DAMPINGS[0]
        for tried in DAMPINGS:
            left = _power(r - self._change(tried).of(x))
            if not left < after:
                break
            after, damping = left, tried
        if not after < before * (1 - LEAST_GAIN):  # nor when it is NaN
            return Unfitted("no weights come closer to the original on samples held back", error)
        self._moments.add(x, r)
        if not self._moments.usable:
            return Unfitted("its activations held NaN or infinity")
        return Fitted(self._change(damping), error, math.sqrt(after / spread), damping)

    def _change(self, damping: float) -> Change:
        return ridge(self._moments, damping, bias=self.layer.takes_bias)


class _Spread:
    """What the rows of an array have of their own: the square deviation from their mean."""

    def __init__(self) -> None:
        self._rows, self._power = 0, 0.0
        self._sum: Array | float = 0.0

    def add(self, rows: Array) -> None:
        """Take in rows."""
        self._rows += len(rows)
        self._power += _power(rows)
        self._sum = self._sum + rows.sum(axis=0, dtype=np.float64)

    @property
    def of_a_row(self) -> float:
        """The mean square deviation; the mean square of rows that are all the same."""
        power = self._power / max(1, self._rows)
        spread = power - _power(np.asarray(self._sum)) / max(1, self._rows) ** 2
        return max(spread if spread > SAME * power else power, np.finfo(np.float64).tiny)


def _power(array: Array) -> float:
    return float(np.square(array, dtype=np.float64).sum())
