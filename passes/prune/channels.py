"""Remove whole channels, heads, neurons and hidden units."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxopt.allocation.damage import unjudged
from onnxopt.allocation.plan import Allocation, Share
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.coupling.activity import activation, observe
from onnxopt.coupling.analysis import Coupling, Group, analyse
from onnxopt.coupling.goals import elements, ratio_for_elements, ratio_for_time
from onnxopt.coupling.importance import Scores, magnitude
from onnxopt.coupling.ledger import Ledger
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.preparation import preparations
from onnxopt.coupling.removal import Removal
from onnxopt.coupling.selection import LEAST, MAX_MULTIPLE, MULTIPLE, kept, least_important, part, widths
from onnxopt.errors import UsageError
from onnxopt.graph import constant_tensor, copied, scopes
from onnxopt.removed import Damage, Goal
from onnxopt.repair.targets import repair_all

Judge = Callable[[Group], tuple[Scores, Literal["weights", "activations"]]]
"""The importance of the units of a group, and by what."""

DEFAULT_RATIO = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneChannels(GraphPass):
    """Remove the least important channels, heads, neurons and hidden units, with everything that depends on them.

    What must go together follows from the graph; what is left out of a weight is gone, and the model gets smaller and
    faster. Inputs and outputs of the model keep their shapes. The result equals the original in which the removed
    channels count as zero; that is verified, and what fails is dropped and named.

    Where there is data, the layers that are left are then fitted to what they computed in the original, one after the
    other, by least squares and without labels.

    Attributes:
        ratio: The part of the channels that goes, above 0 and below 1; 0.5 when nothing is given. Of each layer, or
            with importance "loss" of all layers together.
        params: In place of ratio: at most this part of all parameters is left, above 0 and below 1.
        latency: In place of ratio: the result takes at most this part of the original's time, above 0 and below 1.
            Found by timing models of which more and more is gone.
        multiple: What is left of a layer is a multiple of this where the layer is wide enough, because kernels
            compute that many channels at once; of halves of it where it is narrower. From 1 to 1024.
        importance: What makes a channel important. "magnitude": the norm of all that it consists of. "activation": what
            it brings into the layers behind it, by the variance that it has on the data. "loss": what the layers behind
            it lose when it is gone and the other channels make up for it. Then each layer becomes as narrow as costs
            the model's outputs least, for what the goal counts: channels, parameters, or multiplications for latency.
        min_channels: No layer gets narrower than this. Layers of whole blocks, such as heads, may go down to one.
        repair: Whether to fit the layers that are left.
    """

    name: ClassVar[str] = "prune-channels"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    repairs: ClassVar[bool] = True

    ratio: float | None = None
    params: float | None = None
    latency: float | None = None
    multiple: int = MULTIPLE
    importance: Literal["magnitude", "activation", "loss"] = "magnitude"
    min_channels: int = LEAST
    repair: bool = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        goals = {name: getattr(self, name) for name in ("ratio", "params", "latency")}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"prune-channels: {' and '.join(given)} are given; use one of ratio, params and latency.")
        for name in given:
            if not 0 < goals[name] < 1:
                raise UsageError(f"prune-channels: {name} is {goals[name]}; use a number above 0 and below 1.")
        if not 1 <= self.multiple <= MAX_MULTIPLE:
            raise UsageError(f"prune-channels: multiple is {self.multiple}; use 1 to {MAX_MULTIPLE}.")
        if self.importance not in ("magnitude", "activation", "loss"):
            raise UsageError(f'prune-channels: importance is "{self.importance}"; use magnitude, activation or loss.')
        if self.min_channels < 1:
            raise UsageError(f"prune-channels: min_channels is {self.min_channels}; use 1 or more.")

    def wants_data(self) -> bool:
        """Return whether data says what is important, or what is left is fitted."""
        return self.repair or self.importance != "magnitude"

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why the pass does not apply."""
        if self.latency is not None and ctx.timed is None:
            return "latency needs models to be run, which --no-measure and --no-verify together turn off"
        return NEEDS_DATA if self.importance != "magnitude" and ctx.calibration is None else None

    def goal(self) -> Goal:
        """Return what is to be left."""
        if self.latency is not None:
            return Goal("time", self.latency)
        return Goal("channels", 1 - self._wanted) if self.params is None else Goal("parameters", self.params)

    def caveat(self) -> str:
        """Say that accuracy is to be repaired."""
        if self.repair:
            return (
                "prune-channels: outputs move; where there is real data, layers are fitted to make up for it, and the "
                "result is compared with quantization alone."
            )
        return "prune-channels: outputs move, mostly by much; repair or train the model afterwards before you trust it."

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per group of channels that go together, and the layers that must stay as they are."""
        original = copied(model)
        coupling = analyse(model, ctx.shapes)
        for value, summary, apply in preparations(model, coupling, ctx.evaluate):
            reference = functools.partial(copied, original)
            yield Edit(Site(self.name, "", value.name or ""), summary, apply, reference=reference)
            coupling = analyse(model, ctx.shapes)
        yield from self._refusals(model, coupling)
        shares = self._shares(model, coupling, ctx)
        if isinstance(shares, Refusal):
            yield shares
            return
        removal = Removal(model, coupling, original)
        ledger = Ledger(removal)
        paths = {scope.graph: scope.path for scope in scopes(model)}
        for group in coupling.groups:
            site, gone = Site(self.name, paths[group.makers[0].graph], group.name), shares[group.name].gone
            keep = group.units - len(gone)
            if not len(gone):
                yield Refusal(site, self._untouched(group, shares[group.name]))
                continue
            yield Edit(
                site,
                f"{group.units} to {keep} {group.noun}{shares[group.name]}",
                functools.partial(removal.remove, group.roots[gone]),
                ledger.removed(group, gone, shares[group.name].predicted),
                reference=removal.zeroed,
            )
        if self.repair and ctx.calibration is not None and removal.remaining:
            yield from repair_all(self.name, original, model, ctx, removal.remaining)

    def _judge(self, model: ir.Model, coupling: Coupling, ctx: Context) -> Judge:
        """Return what says how important the units of a group are; by magnitude where no data reached them."""
        data = None if self.importance == "magnitude" else ctx.calibration
        seen = None if data is None else observe(model, coupling, data)

        def judge(group: Group) -> tuple[Scores, Literal["weights", "activations"]]:
            found = None if seen is None else activation(group, coupling, seen)
            return (magnitude(group), "weights") if found is None else (found, "activations")

        return judge

    def _keep(self, group: Group, ratio: float) -> int:
        """Return how many units of a group stay."""
        return kept(group, ratio, self.multiple, self.min_channels)

    def _untouched(self, group: Group, share: Share) -> str:
        """Say why nothing of a group goes."""
        if share.stays:
            return f"its {group.noun} stay: {share.stays}"
        if self.importance == "loss" and widths(group, self.multiple, self.min_channels):
            return "its channels are worth more than those of other layers"
        return f"its {group.units} {group.noun} are too few to remove any"

    def _shares(self, model: ir.Model, coupling: Coupling, ctx: Context) -> Mapping[str, Share] | Refusal:
        """Return what goes of each group, by its name, or why the goal cannot be reached."""
        site = Site(self.name, "", model.graph.name or "")
        reason = unjudged(model, ctx) if self.importance == "loss" else ""
        if reason:
            return Refusal(site, reason)
        judge = self._judge(model, coupling, ctx)
        choose = self._allocated if self.importance == "loss" else self._uniform
        found = choose(model, coupling, ctx, judge)
        if found is not None:
            return found
        if self.params is not None:
            return Refusal(site, f"even the least that may stay is more than {self.params:.0%} of the parameters")
        if self.latency is not None:
            return Refusal(site, f"even with the least that may stay it takes more than {self.latency:.0%} of the time")
        return Refusal(site, f"not even with the least that may stay {self._wanted:.0%} of the channels are gone")

    @property
    def _wanted(self) -> float:
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    def _allocated(self, model: ir.Model, coupling: Coupling, ctx: Context, judge: Judge) -> Mapping[str, Share] | None:
        """Return what goes of each group so that the outputs lose least."""
        possible = functools.partial(widths, multiple=self.multiple, least=self.min_channels)
        found = Allocation(model, coupling, ctx, possible, lambda group: judge(group)[0])
        if self.params is not None:
            return found.for_elements(self.params)
        if self.latency is not None:
            return found.for_time(self.latency, f"{self} of {elements(model)}")
        return found.for_ratio(self._wanted)

    def _uniform(self, model: ir.Model, coupling: Coupling, ctx: Context, judge: Judge) -> Mapping[str, Share] | None:
        """Return what goes when each group loses the same part."""
        judged = [(group, *judge(group)) for group in coupling.groups]

        def shares(ratio: float) -> dict[str, Share]:
            found = {}
            for group, scores, of in judged:
                gone = least_important(scores, group.units - self._keep(group, ratio))
                found[group.name] = Share(gone, importance=Damage(part(scores, gone), of))
            return found

        total = elements(model)
        if self.params is not None:
            found = ratio_for_elements(coupling, total, self.params, self._keep)
        elif self.latency is not None:
            assert ctx.timed is not None, "skip_reason looked"

            def choose(ratio: float) -> Iterator[Ints]:
                gone = shares(ratio)
                for group in coupling.groups:
                    yield group.roots[gone[group.name].gone]

            found = ratio_for_time(model, self.latency, ctx.timed, f"{self} of {total}", choose)
        else:
            found = self._wanted
        return None if found is None else shares(found)

    def _refusals(self, model: ir.Model, coupling: Coupling) -> Iterator[Refusal]:
        """Yield the weights whose input channels must all stay, and why."""
        paths = {scope.graph: scope.path for scope in scopes(model)}
        seen = set()
        for sink in coupling.sinks:
            value = sink.node.inputs[sink.index]
            if value is None or value in seen or constant_tensor(value) is None or value.graph not in paths:
                continue
            seen.add(value)
            reason = coupling.frozen(value, sink.axis)
            if reason is not None:
                yield Refusal(Site(self.name, paths[value.graph], value.name or ""), f"its inputs stay: {reason}")
