"""Leave out the residual blocks that matter least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.allocation.blocks import Contest, leave_out
from onnxopt.analysis.blocks import Block, residual_blocks
from onnxopt.analysis.flops import count
from onnxopt.analysis.inspect import summary_stats
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import bodies, constant_tensor, copied, is_op
from onnxopt.removed import Change, Damage, Removed, Width
from onnxopt.repair.fit import repair
from onnxopt.repair.targets import targets

NOT_FINITE = "outputs of the original, or those without it, hold NaN or infinity on calibration samples"
"""Why it is not known what a block is worth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneLayers(GraphPass):
    """Leave out residual blocks: what goes in also comes out, as if the layers between computed nothing.

    Any stretch that carries its input around its layers qualifies: a bottleneck of a ResNet, the attention or the
    feed-forward half of a transformer layer. Each is left out on trial, and the model run on calibration samples: how
    similar a block's output is to its input says little about what it is worth. All are tried on a few samples, and
    those that do best there on all of them. The one with the smallest error of the model's outputs goes first; the
    others are tried again without it. Behind every removal the layers that are left are fitted to what they computed
    in the original, by least squares and without labels.

    Attributes:
        count: How many blocks to leave out.
        samples: Calibration samples that a trial of the best runs on; others stop at a quarter of them, or at 8.
        repair: Whether to fit the layers that are left.
    """

    name: ClassVar[str] = "prune-layers"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs_data: ClassVar[bool] = True
    repairs: ClassVar[bool] = True

    count: int = 1
    samples: int = 32
    repair: bool = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        for name, number in (("count", self.count), ("samples", self.samples)):
            if number < 1:
                raise UsageError(f"prune-layers: {name} is {number}; use 1 or more.")

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why the pass does not apply."""
        if ctx.calibration is None:
            return NEEDS_DATA
        if not residual_blocks(model, ctx.shapes):
            return "it has no residual block that could be left out"
        if not any(ctx.shapes.dtype(v) in FLOATS for v in model.graph.outputs):
            return "no output holds floating-point numbers, which trials could be compared by"
        return None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield the removal of a block, then the repair of the layers that are left, as often as asked."""
        assert ctx.calibration is not None, "skip_reason looked"
        original = copied(model)
        outputs = [v.name or "" for v in model.graph.outputs if ctx.shapes.dtype(v) in FLOATS]
        show = ctx.calibration.observe_beside(original, outputs)
        samples = min(self.samples, ctx.calibration.samples)
        stands_for: dict[str, str] = {}
        left = self.count
        while left:
            # A removal changes what is known about shapes nowhere but for names.
            ctx = dataclasses.replace(ctx, shapes=Shapes(model))
            contest = Contest(model, residual_blocks(model, ctx.shapes), outputs, show, samples)
            removed = False
            for block, error in contest.ranked():
                site = Site(self.name, "", block.end.name or "")
                if not math.isfinite(error):
                    yield Refusal(site, NOT_FINITE)
                    continue
                trial = _Trial(block, error)
                edit = _Removal(trial, model, stands_for)
                yield Edit(site, trial.summary, edit, _removed(trial, model, ctx.shapes))
                removed = edit.done
                if removed:
                    break
            if not removed:
                return
            left -= 1
            if self.repair:
                ctx = dataclasses.replace(ctx, shapes=Shapes(model))
                behind = _behind(model, block.start.name or "")
                wanted = [
                    target
                    for target in targets(model, ctx.shapes, stands_for=stands_for)
                    if target.layer in behind or (target.through or target.layer) == block.start.name
                ]
                yield from repair(self.name, original, model, wanted, ctx)


@dataclasses.dataclass(frozen=True, slots=True)
class _Trial:
    """A block that was left out.

    Attributes:
        block: The block.
        error: Error of the model's outputs then.
    """

    block: Block
    error: float

    @property
    def summary(self) -> str:
        """What is left out and what that costs, in words."""
        weights = sum(
            t.size for n in self.block.layers for v in n.inputs if v is not None and (t := v.const_value) is not None
        )
        kinds = ", ".join(node.op_type for node in self.block.layers)
        return (
            f"block from {self.block.start.name} on left out ({kinds}; {weights:,} weights): outputs deviate by "
            f"{self.error:.1%} before repair"
        )


class _Removal:
    """Leaves a block out when it is called.

    Attributes:
        done: Whether it was.
    """

    def __init__(self, trial: _Trial, model: ir.Model, stands_for: dict[str, str]) -> None:
        """Take down what is known when it is done in `stands_for`: which value plays which part of the original."""
        self._block, self._model, self._stands_for = trial.block, model, stands_for
        self.done = False

    def __call__(self) -> None:
        """Leave it out."""
        start, end = self._block.start.name or "", self._block.end.name or ""
        leave_out(self._model, self._block)
        self._stands_for[start] = self._stands_for.get(end, end)
        self.done = True


def _removed(trial: _Trial, model: ir.Model, shapes: Shapes) -> Removed:
    """Return what goes with a block."""
    shorter = copied(model)
    leave_out(shorter, trial.block)
    sizes = [(summary_stats(each).parameters, count(each).macs) for each in (model, shorter)]
    return Removed(
        name=f"{trial.block.start.name} to {trial.block.end.name}",
        unit="residual block",
        units=Change(1, 0),
        widths=tuple(_widths(trial.block, shapes)),
        channels=None,
        parameters=Change(sizes[0][0], sizes[1][0]),
        macs=Change(sizes[0][1], sizes[1][1]),
        unrepaired=Damage(trial.error, "outputs"),
    )


def _widths(block: Block, shapes: Shapes) -> Iterator[Width]:
    """Yield the layers of a block, of which nothing is left."""
    for node in block.layers:
        shape = shapes.of(node.outputs[0])
        size = None if not shape else shape[1 if is_op(node, "Conv", "ConvTranspose") else -1]
        weight = next((v.name for v in node.inputs if v is not None and constant_tensor(v) is not None), None)
        if isinstance(size, int) and weight:
            yield Width(weight, "outputs", size, 0)


def _behind(model: ir.Model, name: str) -> set[str | None]:
    """Return the names of the values that are computed from a value."""
    found: set[str | None] = {name}
    for node in model.graph:
        if any(v is not None and v.name in found for v in node.inputs) or any(bodies(node)):
            found.update(v.name for v in node.outputs)
    return found - {name}
