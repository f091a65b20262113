"""How a donor's part is wired into a host: which values it reads, which it replaces, what lies in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graft.blocks import has_weights
from onnxopt.graft.certificate import Mapped
from onnxopt.graft.cut import Block, Cut, Flow, Part, Tensors
from onnxopt.graft.interface import FITTED, adapters, described, slot
from onnxopt.graft.pairing import (
    Link,
    Side,
    no_counterpart,
    pair_in_order,
    pair_inputs,
    pair_outputs,
    sizes_of,
)
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.slicing import Types

ValuesOf = Callable[[Sequence[str], Sequence[str]], tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]] | None]
"""Takes names of values of the host and of the donor, and returns these values on the same inputs, where both take
them."""


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Where a donor's part goes in a host.

    Attributes:
        donor: The part.
        host_in: What may be read in the host: first what goes into the part that is replaced.
        host_out: What comes out of that part.
        donor_in: What goes into the donor's part.
        donor_out: What comes out of it.
        inputs: What each input of the donor's part reads.
        outputs: What each of its outputs replaces.
        kept: Positions of the host's outputs that nobody replaces.
        free: For each of the host's outputs, whether its type may change: it is an output of the model, read by none.
        brought: Names of values of the donor that the part computes besides, because the host has none like them.
    """

    donor: Part
    host_in: Side
    host_out: Side
    donor_in: Side
    donor_out: Side
    inputs: tuple[Link, ...]
    outputs: tuple[Link, ...]
    kept: tuple[int, ...]
    free: tuple[bool, ...]
    brought: tuple[str, ...]

    @property
    def adapters(self) -> list[str]:
        """What lies in between, a sentence each."""
        found = [_sentence(link, self.host_in, self.donor_in, forward=True) for link in self.inputs]
        found += [_sentence(link, self.host_out, self.donor_out, forward=False) for link in self.outputs]
        return [text for text in found if text]

    @property
    def mapped_inputs(self) -> tuple[Mapped, ...]:
        """What each input of the donor's part reads, in words."""
        return tuple(_mapped(link, self.host_in, self.donor_in) for link in self.inputs)

    @property
    def mapped_outputs(self) -> tuple[Mapped, ...]:
        """What each output replaces, in words."""
        return tuple(_mapped(link, self.host_out, self.donor_out) for link in self.outputs)

    @property
    def read(self) -> dict[str, str]:
        """Name in the host of each value that the graft reads -> its name in the result."""
        hosts = [link.host for link in self.inputs if link.host is not None]
        return {self.host_in.slots[j].name: self.host_in.values[j].name or "" for j in hosts}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a wiring is worked out from.

    Attributes:
        host: The part of the host that is replaced.
        host_types: Types of the host's values.
        donor: The part of the donor.
        donor_types: Types of the donor's values.
        replace: The cut that the host's part comes from; None where something is inserted.
        after: The tensor behind which it is inserted; empty where something is replaced.
        take: The cut that the donor's part comes from.
        same_model: Whether host and donor are the same model.
        values: Returns boundary values of both.
        fixed: Whether outputs of the host keep their types.
    """

    host: Part
    host_types: Types
    donor: Part
    donor_types: Types
    replace: Cut | None
    after: str
    take: Cut
    same_model: bool
    values: ValuesOf
    fixed: bool = False

    @property
    def first(self) -> bool:
        """Whether what goes into both parts first belongs together: the activations of blocks."""
        return isinstance(self.take, Block) and (isinstance(self.replace, Block) or self.replace is None)


def wire(plan: Plan) -> Wiring:
    """Work out a wiring.

    Raises:
        RefusedError: If values do not belong together in one way, or do not fit.
    """
    host, donor = plan.host, plan.donor
    host_named = isinstance(plan.replace, Tensors) or plan.replace is None
    host_out = _side(host.outputs, plan.host_types, host_named)
    donor_out = _side(donor.outputs, plan.donor_types, isinstance(plan.take, Tensors))
    brought: tuple[str, ...] = ()
    kept: list[int] = []
    if host_named and donor_out.named:
        host_in, donor_in = _host_side(plan, ()), _side(donor.inputs, plan.donor_types, named=True)
        links = pair_in_order(host_in, donor_in, "input")
        outputs = pair_in_order(host_out, donor_out, "output")
    else:
        host_in, donor_in, links, missing = _inputs(plan, donor)
        if missing:
            wider = _widened(donor, missing, plan.donor_types.shapes, first=plan.first)
            if wider is None:
                raise no_counterpart(host_in, donor_in, missing[0])
            brought = tuple(donor_in.slots[i].name for i in missing)
            donor = wider
            host_in, donor_in, links, missing = _inputs(plan, donor)
            if missing:
                raise no_counterpart(host_in, donor_in, missing[0])
        outputs, kept = pair_outputs(host_out, donor_out)
    inside = set(host.nodes)
    free = tuple(
        v.is_graph_output() and all(u.node in inside for u in v.uses()) and plan.replace is not None and not plan.fixed
        for v in host.outputs
    )
    return Wiring(
        donor,
        host_in,
        host_out,
        donor_in,
        donor_out,
        tuple(_adapted(link, host_in, donor_in, forward=True) for link in links),
        tuple(_adapted(link, host_out, donor_out, forward=False, free=free) for link in outputs),
        tuple(kept),
        free,
        brought,
    )


def _inputs(plan: Plan, donor: Part) -> tuple[Side, Side, list[Link], list[int]]:
    """Pair inputs where there is evidence."""
    wanted = [v.name for v in donor.inputs]
    graph = plan.host.model.graph
    others = [v for v in graph.inputs if not v.is_initializer() and v.name in wanted]
    if plan.same_model:
        others += [v for node in graph for v in node.outputs if v.name in wanted]
    host_in = _host_side(plan, others)
    donor_in = _side(donor.inputs, plan.donor_types, isinstance(plan.take, Tensors))
    links, missing = pair_inputs(
        host_in,
        donor_in,
        plan.host_types.shapes,
        plan.donor_types.shapes,
        first=plan.first,
        same_model=plan.same_model,
        seen=lambda: plan.values([s.name for s in host_in.slots], [s.name for s in donor_in.slots]),
    )
    return host_in, donor_in, links, missing


def _host_side(plan: Plan, others: Sequence[ir.Value]) -> Side:
    """Return what may be read in the host."""
    own = plan.host.inputs
    values = (*own, *(v for v in others if v not in own))
    slots = [slot(v, plan.host_types) for v in values]
    if plan.after:
        # An output that something is put behind gives its name to what comes out.
        slots[0] = dataclasses.replace(slots[0], name=plan.after)
    named = isinstance(plan.replace, Tensors) or plan.replace is None
    return Side(values, tuple(slots), named, len(own))


def _side(values: tuple[ir.Value, ...], types: Types, named: bool) -> Side:
    return Side(values, tuple(slot(v, types) for v in values), named, len(values))


def _widened(part: Part, missing: Sequence[int], shapes: Shapes, *, first: bool) -> Part | None:
    """Return a part that computes some of its inputs from the inputs of its model.

    Masks and the like are computed from the model's inputs, and from sizes, without weights.

    Args:
        part: The part.
        missing: Positions of these inputs.
        shapes: What is known about shapes of its model.
        first: Whether sizes may be told from the first input.

    Returns:
        The wider part; None where layers would be in between.
    """
    flow = Flow(part.model)
    kept = [v for i, v in enumerate(part.inputs) if i not in missing]
    nodes = set(part.nodes)
    found: dict[ir.Value, None] = {}
    waiting = [part.inputs[i] for i in missing]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in kept or value.is_initializer() or node in nodes:
            continue
        sizes = sizes_of(value, kept[:1], shapes) if first and value in flow.varying else None
        if node is None or (sizes is not None and value not in part.inputs):
            found[value] = None
            continue
        if has_weights(flow, node):
            return None
        nodes.add(node)
        waiting.extend(flow.reads[node])
    return Part(part.model, (*kept, *found), part.outputs, flow.ordered(nodes))


def _adapted(link: Link, host: Side, donor: Side, *, forward: bool, free: Sequence[bool] = ()) -> Link:
    """Add the adapters that a pair of values needs.

    Raises:
        RefusedError: If none make them fit.
    """
    if link.host is None:
        return link
    ours, theirs = host.slots[link.host], donor.slots[link.donor]
    have, want = (ours, theirs) if forward else (theirs, ours)
    found = adapters(have, want)
    if free and free[link.host] and (found is None or any(a.kind in ("Resize", *FITTED) for a in found)):
        # An output of the model that nothing reads may be something else, such as the scores of other classes.
        found = ()
    if found is None:
        raise RefusedError(
            "shape", f'"{have.name}" ({have}) does not fit in the place of "{want.name}" ({want}), nor with an adapter.'
        )
    return dataclasses.replace(link, adapters=found)


def _sentence(link: Link, host: Side, donor: Side, *, forward: bool) -> str:
    """Say which adapter a pair of values needs; empty when none."""
    name = donor.slots[link.donor].name
    if link.sizes is not None:
        return f'"{name}" of the donor is computed from the shape of what the part reads'
    if not link.adapters or link.host is None:
        return ""
    ours, theirs = host.slots[link.host], donor.slots[link.donor]
    have, want = (ours, theirs) if forward else (theirs, ours)
    return f'{described(link.adapters)} between "{have.name}" ({have}) and "{want.name}" ({want})'


def _mapped(link: Link, host: Side, donor: Side) -> Mapped:
    if link.host is None:
        return Mapped(donor.slots[link.donor].name, host.slots[0].name, ("its shape",))
    return Mapped(donor.slots[link.donor].name, host.slots[link.host].name, tuple(map(str, link.adapters)))
