"""Leave out the residual blocks that matter least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.blocks import Block, residual_blocks
from onnxopt.analysis.flops import count
from onnxopt.analysis.inspect import summary_stats
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import bodies, constant_tensor, copied, is_op, remove_unused, replace_value
from onnxopt.removed import Change, Damage, Removed, Width
from onnxopt.repair.fit import repair
from onnxopt.repair.outputs import FLOATS, OutputError
from onnxopt.repair.targets import targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneLayers(GraphPass):
    """Leave out residual blocks: what goes in also comes out, as if the layers between computed nothing.

    Any stretch that carries its input around its layers qualifies: a bottleneck of a ResNet, the attention or the
    feed-forward half of a transformer layer. Each is left out on trial, and the model run on calibration samples: how
    similar a block's output is to its input says little about what it is worth. The one with the smallest error of
    the model's outputs goes first; the others are tried again without it. Behind every removal the layers that are
    left are fitted to what they computed in the original, by least squares and without labels.

    Attributes:
        count: How many blocks to leave out.
        samples: Calibration samples that a trial runs on.
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
        return None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield the removal of a block, then the repair of the layers that are left, as often as asked."""
        original = copied(model)
        stands_for: dict[str, str] = {}
        left = self.count
        while left:
            # A removal changes what is known about shapes nowhere but for names.
            ctx = dataclasses.replace(ctx, shapes=Shapes(model))
            trials = sorted(self._trials(original, model, ctx), key=lambda trial: trial.error)
            removed = False
            for trial in trials:
                edit = _Removal(trial, model, stands_for)
                yield Edit(trial.site, trial.summary, edit, _removed(trial, model, ctx.shapes))
                removed = edit.done
                if removed:
                    break
            if not removed:
                return
            left -= 1
            if self.repair:
                ctx = dataclasses.replace(ctx, shapes=Shapes(model))
                behind = _behind(model, trial.block.start.name or "")
                wanted = [
                    target
                    for target in targets(model, ctx.shapes, stands_for=stands_for)
                    if target.layer in behind or (target.through or target.layer) == trial.block.start.name
                ]
                yield from repair(self.name, original, model, wanted, ctx)

    def _trials(self, original: ir.Model, model: ir.Model, ctx: Context) -> Iterator[_Trial]:
        assert ctx.calibration is not None, "skip_reason looked"
        for block in residual_blocks(model, ctx.shapes):
            trial = copied(model)
            _leave_out(trial, block.start.name or "", block.end.name or "")
            outputs = OutputError([v.name or "" for v in model.graph.outputs if ctx.shapes.dtype(v) in FLOATS])
            ctx.calibration.observe_both(original, trial, [outputs], most=self.samples)
            if math.isfinite(outputs.error):
                yield _Trial(block, outputs.error, Site(self.name, "", block.end.name or ""))


@dataclasses.dataclass(frozen=True, slots=True)
class _Trial:
    """A block that was left out.

    Attributes:
        block: The block.
        error: Error of the model's outputs then.
        site: Where it is.
    """

    block: Block
    error: float
    site: Site

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
        self._start, self._end = trial.block.start.name or "", trial.block.end.name or ""
        self._model, self._stands_for = model, stands_for
        self.done = False

    def __call__(self) -> None:
        """Leave it out."""
        _leave_out(self._model, self._start, self._end)
        self._stands_for[self._start] = self._stands_for.get(self._end, self._end)
        self.done = True


def _removed(trial: _Trial, model: ir.Model, shapes: Shapes) -> Removed:
    """Return what goes with a block."""
    shorter = copied(model)
    start, end = trial.block.start.name or "", trial.block.end.name or ""
    _leave_out(shorter, start, end)
    sizes = [(summary_stats(each).parameters, count(each).macs) for each in (model, shorter)]
    return Removed(
        name=f"{start} to {end}",
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


def _leave_out(model: ir.Model, start: str, end: str) -> None:
    """Let the value called `start` take the place of the one called `end`."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    old, new = values[end], values[start]
    producer = old.producer()
    assert producer is not None, "nodes compute it"
    replace_value(old, new)
    remove_unused(producer)
