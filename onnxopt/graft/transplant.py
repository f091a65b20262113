"""Putting a part of one model into another, with the proof of what it computes there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import onnx_ir as ir

from onnxopt import model as models
from onnxopt.compare.structure import checker_complaint, checker_level
from onnxopt.contract import Progress, Silent
from onnxopt.errors import ModelError, UsageError
from onnxopt.feeds import Data, Feed, load_data
from onnxopt.graft.certificate import (
    SCHEMA_VERSION,
    Fitted,
    GraftCertificate,
    Mapped,
    files_of,
)
from onnxopt.graft.cut import Block, Cut, Flow, Part, Tensors, parse_cut, resolve
from onnxopt.graft.extraction import Source
from onnxopt.graft.fitting import fit
from onnxopt.graft.interface import FITTED, Adapter, Slot, adapters, described, slot
from onnxopt.graft.pairing import Link, Side, pair_in_order, pair_inputs, pair_outputs
from onnxopt.graft.probe import Match, Probe, distance, find_feeds, matches, outputs_of, run
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.slicing import Types, standalone
from onnxopt.graft.splice import Copy, Fit, Splice, insertion, unify
from onnxopt.runtime import RunOptions

Consent = Literal["allow", "none"] | Callable[[Sequence[str]], bool]
"""Whether adapters may be put in: always, never, or asked about with a sentence each."""

_FIT_SAMPLES = 64
"""Of the user's data, adapters are fitted to at most this many samples."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grafted:
    """What `graft` returns.

    Attributes:
        model: The host with the donor's part in it.
        certificate: What was put where, and the proof.
    """

    model: ir.Model
    certificate: GraftCertificate


def graft(
    host: Source,
    donor: Source,
    *,
    with_: str | Cut,
    replace: str | Cut | None = None,
    after: str | None = None,
    repeat: int = 1,
    adapters: Consent = "none",
    data: str | os.PathLike[str] | Data | None = None,
    seed: int = 0,
    shape: Mapping[str, int] | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> Grafted:
    """Put a part of a donor into a host, in the place of a part of the host or behind a tensor.

    Operator sets are reconciled: the donor's part is converted to the host's, or the host is raised when the donor is
    newer. Names are made new, equal weights are stored once. Where types or shapes do not agree, the smallest adapter
    does, if it is allowed: Cast, Transpose, Reshape, Resize, or a linear layer fitted to data.

    The donor's part is then run alone, as it is in the donor, on the values that it reads in the host, and must
    compute what it computes there; what does not depend on it must be as it was.

    Args:
        host: The host; it is not changed.
        donor: The donor; it is not changed. It may be the host itself.
        with_: What to take from the donor: "a,b->c", "nodes:GLOB", "block:N" or "backbone".
        replace: What to replace in the host, in the same form.
        after: Instead of replacing: the tensor behind which to insert.
        repeat: How many copies in a row; each reads what the one before it gives.
        adapters: Whether adapters are allowed.
        data: Real inputs of the host to prove it on, instead of generated ones; adapters are fitted to them.
        seed: Seeds generated inputs.
        shape: Sizes of dynamic axes for generated inputs.
        options: Provider, threads and custom operators to run with.
        progress: Told what is being done.

    Returns:
        The result and its certificate.

    Raises:
        UsageError: If options contradict each other, or a cut means nothing in its model.
        RefusedError: If it cannot be done, or not proven; `reason` says which.
    """
    if (replace is None) == (after is None):
        raise UsageError("Give either replace, a part of the host, or after, a tensor.", "replace", "after")
    if repeat < 1:
        raise UsageError(f"repeat must be at least 1, not {repeat}.", "repeat")
    progress = progress or Silent()
    progress.stage("cutting")
    request = Request(
        host=models.load(host),
        donor=models.load(donor),
        replace=parse_cut(replace) if isinstance(replace, str) else replace,
        after=after,
        take=parse_cut(with_) if isinstance(with_, str) else with_,
        repeat=repeat,
        consent=adapters,
        options=options or RunOptions(),
    )
    samples = load_data(data, request.host) if isinstance(data, (str, os.PathLike)) else data
    progress.stage("running the host")
    feeds = find_feeds(request.host, samples, request.options, seed=seed, shape=shape)
    return Grafting(request, Probe(request.host, feeds, request.options), samples, progress).run()


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted; see `graft`."""

    host: ir.Model
    donor: ir.Model
    replace: Cut | None
    after: str | None
    take: Cut
    repeat: int
    consent: Consent
    options: RunOptions


class Grafting:
    """One graft, from the cuts to the certificate."""

    def __init__(self, request: Request, before: Probe, samples: Data | None, progress: Progress) -> None:
        """Nothing is done yet.

        Args:
            request: What is wanted.
            before: Runs the host.
            samples: What adapters are fitted to.
            progress: Told what is being done.
        """
        self._request = request
        self._feeds = before.feeds
        self._samples = samples
        self._progress = progress
        self._opsets: list[tuple[str, str]] = []
        self._before = before

    def run(self) -> Grafted:
        """Do it."""
        request = self._request
        donor_part = resolve(request.donor, request.take)
        donor_types = Types(request.donor)
        reference = standalone(donor_part, donor_types)
        self._progress.stage("grafting")
        result, converted = self._reconciled(request.host, reference)
        result, host_part = self._host_part(result)
        host_types = Types(result)
        sides = _Sides(host_part, host_types, donor_part, donor_types, request)
        inputs, outputs, kept = sides.pair(lambda: self._seen(sides))
        inputs = [_adapted(link, sides.host_in, sides.donor_in, forward=True) for link in inputs]
        outputs = [_adapted(link, sides.host_out, sides.donor_out, forward=False, free=sides.free) for link in outputs]
        self._ask(inputs, outputs, sides)
        note = f"{request.take}"
        splice = Splice(result, converted, _anchor(host_part), note)
        copies, fits = self._splice(splice, host_part, sides, inputs, outputs)
        splice.finish(host_part.nodes)
        fitted = tuple(self._fit(result, pending) for pending in fits)
        return Grafted(result, self._certify(result, reference, sides, copies, splice, inputs, outputs, kept, fitted))

    # Before anything is put in -------------------------------------------------------------------------------

    def _reconciled(self, host: ir.Model, part: ir.Model) -> tuple[ir.Model, ir.Model]:
        """Return a copy of the host and the donor's part in the same version of the standard operator set."""
        ours, theirs = _opset(host), _opset(part)
        result = host.clone()
        result.meta.update(host.meta)
        if ours == theirs or not ours or not theirs:
            return result, part
        try:
            if theirs < ours:
                self._opsets.append(("donor", f"its part was converted from opset {theirs} to {ours}"))
                return result, models.convert_opset(part, ours)
            result = models.convert_opset(result, theirs)
        except ModelError as error:
            raise RefusedError("opset", str(error)) from error
        found = outputs_of(Probe(result, self._feeds, self._request.options))
        names = {v.name or "": v.name or "" for v in host.graph.outputs}
        for match in matches(host, outputs_of(self._before), found, names):
            if not match.ok:
                raise RefusedError("opset", f"Converting the host to opset {theirs} changes it: {match.note}.")
        self._opsets.append(("host", f"it was converted from opset {ours} to {theirs}, which the donor is in"))
        return result, part

    def _host_part(self, result: ir.Model) -> tuple[ir.Model, Part]:
        request = self._request
        if request.replace is not None:
            return result, resolve(result, request.replace)
        assert request.after is not None, "one of both is given"
        value = Flow(result).value(request.after)
        identity = insertion(result, value.name or "")
        source = identity.inputs[0]
        assert source is not None, "an Identity reads something"
        return result, Part(result, (source,), (identity.outputs[0],), (identity,))

    def _seen(self, sides: _Sides) -> tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]] | None:
        """Return the boundary values of host and donor on the same inputs, where the donor takes the host's."""
        feeds = _feeds_for(self._request.donor, self._feeds)
        if feeds is None:
            return None
        try:
            donor = Probe(self._request.donor, feeds, self._request.options).values(
                s.name for s in sides.donor_in.slots
            )
        except RefusedError:
            return None
        return self._before.values(s.name for s in sides.host_in.slots), donor

    def _ask(self, inputs: Sequence[Link], outputs: Sequence[Link], sides: _Sides) -> None:
        """Make sure that the adapters are wanted, and that there is data for those that are fitted.

        Raises:
            RefusedError: If they are not, or there is none.
        """
        needed = [
            *(_sentence(link, sides.host_in, sides.donor_in, forward=True) for link in inputs),
            *(_sentence(link, sides.host_out, sides.donor_out, forward=False) for link in outputs),
        ]
        needed = [text for text in needed if text]
        if not needed:
            return
        consent = self._request.consent
        if consent == "none" or (callable(consent) and not consent(needed)):
            raise RefusedError("adapter", f"An adapter is needed: {'; '.join(needed)}. --adapters allow puts it in.")
        if any(a.kind in FITTED for link in (*inputs, *outputs) for a in link.adapters):
            if self._samples is None:
                raise RefusedError("data", f"{'; '.join(needed)}: it is fitted to real inputs; give some with --data.")
            if any(a.kind in FITTED for link in inputs for a in link.adapters) and self._request.repeat > 1:
                raise RefusedError("shape", "Copies in a row cannot have adapters between them.")

    # Putting it in -------------------------------------------------------------------------------------------

    def _splice(
        self, splice: Splice, part: Part, sides: _Sides, inputs: Sequence[Link], outputs: Sequence[Link]
    ) -> tuple[list[Copy], list[tuple[Fit, str, str]]]:
        """Copy the donor's part; return the copies, and each adapter to fit with whose value it should give."""
        fits: list[tuple[Fit, str, str]] = []
        given: list[ir.Value | None] = [None] * len(inputs)
        for link in (link for link in inputs if link.host is not None):
            given[link.donor], pending = splice.adapt(part.inputs[link.host or 0], link.adapters)
            fits += [(p, "donor", sides.donor_in.slots[link.donor].name) for p in pending]
        for link in (link for link in inputs if link.sizes is not None):
            assert link.sizes is not None
            given[link.donor] = splice.sizes(link.sizes, given)
        values = [v for v in given if v is not None]
        copies = [splice.copy(values)]
        for _ in range(self._request.repeat - 1):
            copies.append(splice.copy([copies[-1].outputs[0], *values[1:]]))
        for link in outputs:
            value, pending = splice.adapt(copies[-1].outputs[link.donor], link.adapters)
            assert link.host is not None, "outputs have a counterpart"
            old = part.outputs[link.host]
            fits += [(p, "host", sides.host_out.slots[link.host].name) for p in pending]
            splice.replace(old, value, free=sides.free[link.host])
        moved = any(a.kind == "Transpose" for link in inputs for a in link.adapters)
        pairs = [
            (sides.donor_in.slots[link.donor].dims, sides.host_in.slots[link.host].dims)
            for link in inputs
            if link.host is not None and not link.adapters
        ]
        splice.name_axes(copies, None if moved else unify(pairs))
        return copies, fits

    def _fit(self, result: ir.Model, pending: tuple[Fit, str, str]) -> Fitted:
        """Fit an adapter to the activations of host and donor on the same samples.

        Raises:
            RefusedError: If the donor does not take the host's inputs.
        """
        adapter, whose, name = pending
        assert self._samples is not None, "was asked for"
        feeds = list(self._samples.take(_FIT_SAMPLES))
        source = self._request.host if whose == "host" else self._request.donor
        own = feeds if whose == "host" else _feeds_for(source, feeds)
        if own is None:
            raise RefusedError(
                "data",
                f"The {adapter.adapter} is fitted to what the donor computes on the same inputs, but the donor does "
                "not take the host's.",
            )
        before = adapter.before.name or ""
        inputs = [v[before] for v in Probe(result, feeds, self._request.options).values([before])]
        targets = [v[name] for v in Probe(source, own, self._request.options).values([name])]
        return fit(adapter, inputs, targets)

    # The proof -----------------------------------------------------------------------------------------------

    def _certify(
        self,
        result: ir.Model,
        reference: ir.Model,
        sides: _Sides,
        copies: Sequence[Copy],
        splice: Splice,
        inputs: Sequence[Link],
        outputs: Sequence[Link],
        kept: Sequence[int],
        fitted: tuple[Fitted, ...],
    ) -> GraftCertificate:
        """Prove the result.

        Raises:
            RefusedError: If it does not hold.
        """
        request = self._request
        self._progress.stage("comparing")
        complaint = checker_complaint(result, min(map(checker_level, (request.host, reference)), key=_LEVELS.index))
        if complaint:
            raise RefusedError("not reproduced", f"The ONNX checker rejects the result: {complaint}")
        after = Probe(result, self._feeds, request.options)
        flow = Flow(result)
        downstream = {v for node in flow.after([v for c in copies for v in c.outputs]) for v in node.outputs}
        downstream |= {v for c in copies for v in c.outputs}
        boundary = [n for c in copies for v in (*c.inputs, *c.outputs) if (n := v.name or "")]
        untouched = [v.name or "" for v in result.graph.outputs if v not in downstream]
        around = {name: name for name in untouched} | sides.still_read(inputs)
        changed = [v.name or "" for v in result.graph.outputs if v in downstream]
        inside = after.values([*boundary, *around.values(), *changed])
        slices = tuple(m for copy in copies for m in self._slice(reference, copy, inside))
        before = self._before.values([*around, *changed])
        rest = _same(request.host, before, around, inside)
        wrong = next((m for m in (*slices, *rest) if not m.ok), None)
        if wrong is not None:
            raise RefusedError(
                "not reproduced", f"The graft does not compute what the donor's part does: {wrong.note}."
            )
        return GraftCertificate(
            SCHEMA_VERSION,
            "graft",
            host=files_of(request.host),
            donor=files_of(request.donor),
            result=(),
            replaced=str(request.replace) if request.after is None else f"after {request.after}",
            inserted=str(request.take),
            copies=len(copies),
            inputs=tuple(_mapped(link, sides.host_in, sides.donor_in) for link in inputs),
            outputs=tuple(_mapped(link, sides.host_out, sides.donor_out) for link in outputs),
            kept=tuple(sides.host_out.slots[i].name for i in kept),
            nodes=(len(request.host.graph), len(result.graph)),
            shared_bytes=splice.shared,
            opsets=tuple(self._opsets),
            sets=len(self._feeds),
            slices=slices,
            untouched=rest,
            changed=tuple(distance(name, before, inside) for name in changed),
            fitted=fitted,
        )

    def _slice(self, reference: ir.Model, copy: Copy, inside: Sequence[dict[str, Any]]) -> tuple[Match, ...]:
        """Compare one copy with the donor's part alone, on what the copy reads."""
        names = [v.name or "" for v in reference.graph.inputs if not v.is_initializer()]
        feeds = [
            {name: values[value.name or ""] for name, value in zip(names, copy.inputs, strict=True)}
            for values in inside
        ]
        alone = run(reference, feeds, self._request.options)
        outputs = {
            one.name or "": other.name or "" for one, other in zip(reference.graph.outputs, copy.outputs, strict=True)
        }
        return matches(reference, alone, inside, outputs)


_LEVELS = ("none", "basic", "full")


class _Sides:
    """The boundaries of host and donor.

    Attributes:
        host_in: What goes into the host's part.
        host_out: What comes out of it.
        donor_in: What goes into the donor's part.
        donor_out: What comes out of it.
        free: For each of the host's outputs, whether its type may change: it is an output of the model, read by none.
    """

    def __init__(self, host: Part, host_types: Types, donor: Part, donor_types: Types, request: Request) -> None:
        named = isinstance(request.replace, Tensors) or request.after is not None
        taken = isinstance(request.take, Tensors)
        self.host_in = _side(host.inputs, host_types, named)
        self.host_out = _side(host.outputs, host_types, named)
        self.donor_in = _side(donor.inputs, donor_types, taken)
        self.donor_out = _side(donor.outputs, donor_types, taken)
        inside = set(host.nodes)
        self.free = [
            v.is_graph_output() and all(u.node in inside for u in v.uses()) and request.after is None
            for v in host.outputs
        ]
        self._types = host_types, donor_types
        self._inputs = host.inputs
        self._blocks = isinstance(request.take, Block) and (
            isinstance(request.replace, Block) or request.replace is None
        )
        if request.after is not None:
            # An output that something is put behind gives its name to what comes out.
            self.host_in = dataclasses.replace(
                self.host_in, slots=(dataclasses.replace(self.host_in.slots[0], name=request.after),)
            )
        self._same_model = request.host is request.donor or (
            bool(files_of_path(request.host)) and files_of_path(request.host) == files_of_path(request.donor)
        )

    def still_read(self, links: Sequence[Link]) -> dict[str, str]:
        """Return for the values of the host that the graft reads their names in the host and in the result."""
        return {
            self.host_in.slots[link.host].name: self._inputs[link.host].name or ""
            for link in links
            if link.host is not None
        }

    def pair(
        self, seen: Callable[[], tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]] | None]
    ) -> tuple[list[Link], list[Link], list[int]]:
        """Return what each input reads, what each output replaces, and which of the host's outputs nobody does."""
        if self.host_in.named and self.donor_in.named:
            inputs = pair_in_order(self.host_in, self.donor_in, "input")
            return inputs, pair_in_order(self.host_out, self.donor_out, "output"), []
        host_types, donor_types = self._types
        inputs = pair_inputs(
            self.host_in,
            self.donor_in,
            host_types.shapes,
            donor_types.shapes,
            first=self._blocks,
            same_model=self._same_model,
            seen=seen,
        )
        outputs, kept = pair_outputs(self.host_out, self.donor_out)
        return inputs, outputs, kept


def files_of_path(model: ir.Model) -> str:
    """Return the path a model was loaded from; empty for one that was made in memory."""
    original = model.graph.meta.get(models.ORIGINAL)
    return "" if original is None else str(original.path.resolve())


def _side(values: tuple[ir.Value, ...], types: Types, named: bool) -> Side:
    return Side(values, tuple(slot(v, types) for v in values), named)


def _adapted(link: Link, host: Side, donor: Side, *, forward: bool, free: Sequence[bool] = ()) -> Link:
    """Add the adapters that a pair of values needs.

    Raises:
        RefusedError: If none make them fit.
    """
    if link.host is None:
        return link
    ours, theirs = host.slots[link.host], donor.slots[link.donor]
    have, want = (ours, theirs) if forward else (theirs, ours)
    found = () if free and free[link.host] else adapters(have, want)
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
    have: Slot = host.slots[link.host] if forward else donor.slots[link.donor]
    want: Slot = donor.slots[link.donor] if forward else host.slots[link.host]
    return f'{described(link.adapters)} between "{have.name}" ({have}) and "{want.name}" ({want})'


def _mapped(link: Link, host: Side, donor: Side) -> Mapped:
    if link.host is None:
        return Mapped(donor.slots[link.donor].name, host.slots[0].name, ("its shape",))
    words: tuple[Adapter, ...] = link.adapters
    return Mapped(donor.slots[link.donor].name, host.slots[link.host].name, tuple(map(str, words)))


def _same(
    host: ir.Model, before: Sequence[dict[str, Any]], names: Mapping[str, str], inside: Sequence[dict[str, Any]]
) -> tuple[Match, ...]:
    """Compare values in front of the graft, or beside it, with those of the host as it was."""
    if not names:
        return ()
    revealed = host.clone()
    values = {v.name: v for v in (*revealed.graph.inputs, *(o for n in revealed.graph for o in n.outputs))}
    revealed.graph.outputs.clear()
    revealed.graph.outputs.extend(values[name] for name in names)
    return matches(revealed, before, inside, names)


def _anchor(part: Part) -> ir.Node:
    node = part.outputs[0].producer()
    assert node is not None, "outputs of a part are computed"
    return node


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def _feeds_for(model: ir.Model, feeds: Sequence[Feed]) -> list[Feed] | None:
    """Return what a model takes out of the inputs of another; None when it takes something else."""
    names = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
    if feeds and set(names) <= set(feeds[0]):
        return [{name: feed[name] for name in names} for feed in feeds]
    if feeds and len(names) == 1 and len(feeds[0]) == 1:
        return [{names[0]: next(iter(feed.values()))} for feed in feeds]
    return None


__all__ = ["Consent", "Grafted", "graft"]
