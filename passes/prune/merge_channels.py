"""Merge channels, neurons and heads that do nearly the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.coupling.analysis import Group, analyse
from onnxopt.coupling.ledger import Ledger
from onnxopt.coupling.likeness import Plan, inseparable, plans, rounded, sum_up
from onnxopt.coupling.preparation import preparations
from onnxopt.coupling.removal import Removal
from onnxopt.coupling.selection import MAX_MULTIPLE, kept
from onnxopt.errors import UsageError
from onnxopt.graph import copied, scopes
from onnxopt.removed import Damage, Goal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeChannels(GraphPass):
    """Replace channels, neurons and heads by multiples of others that do nearly the same.

    The one that stays takes over the weights behind those that go, times the factor that comes closest to them. How
    alike they are is seen on data; without any, by the weights that make them. What stays equals the original with
    these weights summed up and zeros for the others; that is verified, and what fails is dropped and named.

    Attributes:
        ratio: The part of the channels of each layer that goes, above 0 and below 1.
        multiple: What is left of a layer is a multiple of this where it is wide enough; of halves of it where it is
            narrower. From 1 to 1024.
        min_channels: No layer gets narrower than this. Layers of whole blocks, such as heads, may go down to one.
    """

    name: ClassVar[str] = "merge-channels"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE

    ratio: float = 0.25
    multiple: int = 8
    min_channels: int = 4

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        if not 0 < self.ratio < 1:
            raise UsageError(f"merge-channels: ratio is {self.ratio}; use a number above 0 and below 1.")
        if not 1 <= self.multiple <= MAX_MULTIPLE:
            raise UsageError(f"merge-channels: multiple is {self.multiple}; use 1 to {MAX_MULTIPLE}.")
        if self.min_channels < 1:
            raise UsageError(f"merge-channels: min_channels is {self.min_channels}; use 1 or more.")

    def wants_data(self) -> bool:
        """Return that likeness is better seen on data."""
        return True

    def goal(self) -> Goal:
        """Return what is to be left."""
        return Goal("channels", 1 - self.ratio)

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per group of channels that go together."""
        original = copied(model)
        coupling = analyse(model, ctx.shapes)
        for value, summary, apply in preparations(model, coupling, ctx.evaluate):
            reference = functools.partial(copied, original)
            yield Edit(Site(self.name, "", value.name or ""), summary, apply, reference=reference)
            coupling = analyse(model, ctx.shapes)
        paths = {scope.graph: scope.path for scope in scopes(model)}
        sites = {group.name: Site(self.name, paths[group.makers[0].graph], group.name) for group in coupling.groups}
        counts = {group.name: group.units - self._keep(group) for group in coupling.groups}
        wanted = {}
        for group in coupling.groups:
            if counts[group.name] < 1:
                yield Refusal(sites[group.name], f"its {group.units} {group.noun} are too few to merge any")
            elif rounded(group):
                yield Refusal(sites[group.name], "a weight behind it is quantized, and sums of its slices would not be")
            elif reason := inseparable(group, coupling):
                yield Refusal(sites[group.name], reason)
            else:
                wanted[group.name] = counts[group.name]
        # All of it before the first edit: the model that is looked at is the original.
        found = list(plans(model, coupling, wanted, ctx.calibration))
        removal = Removal(model, coupling, original)
        ledger = Ledger(removal)
        seen: Literal["weights", "activations"] = "weights" if ctx.calibration is None else "activations"
        for group, plan in found:
            if plan is None:
                yield Refusal(sites[group.name], "not all that it is multiplied by could be seen")
                continue
            keep = self._keep(group)
            yield Edit(
                sites[group.name],
                f"{group.units} to {keep} {group.noun}, the others merged into them",
                functools.partial(_apply, removal, group, plan),
                ledger.removed(group, plan.merge.gone, Damage(plan.lost, seen)),
                reference=removal.zeroed,
            )

    def _keep(self, group: Group) -> int:
        return kept(group, self.ratio, self.multiple, self.min_channels)


def _apply(removal: Removal, group: Group, plan: Plan) -> None:
    sum_up(removal, group, plan)
    removal.remove(group.roots[plan.merge.gone])
