"""Putting a part of one model into another, with the proof of what it computes there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxopt import model as models
from onnxopt.contract import Progress, Silent
from onnxopt.errors import ModelError, UsageError
from onnxopt.feeds import Data, Feed, load_data
from onnxopt.graft.axes import rename_axes, unify
from onnxopt.graft.certificate import Fitted, GraftCertificate
from onnxopt.graft.cut import WITHIN, Cut, Flow, Inside, Part, Plain, Tensors, parse_cut, resolve
from onnxopt.graft.extraction import Source
from onnxopt.graft.fitting import fit
from onnxopt.graft.interface import FITTED
from onnxopt.graft.nested import Place, locate, opened, put_back, with_advice
from onnxopt.graft.probe import Probe, Values, find_feeds, matches, outputs_of
from onnxopt.graft.proof import Outcome, certify, certify_body
from onnxopt.graft.reasons import RefusedError, about
from onnxopt.graft.request import Consent, Request
from onnxopt.graft.slicing import Types, standalone
from onnxopt.graft.splice import Copy, Fit, Splice, insertion
from onnxopt.graft.wiring import Plan, Wiring, wire
from onnxopt.graph import copied
from onnxopt.runtime import RunOptions

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
    return carry_out(request, Probe(request.host, feeds, request.options), samples, progress)


def carry_out(request: Request, before: Probe, samples: Data | None, progress: Progress) -> Grafted:
    """Carry out a graft, in the main graphs or in bodies.

    Args:
        request: What is wanted.
        before: Runs the host.
        samples: What adapters are fitted to.
        progress: Told what is being done.

    Raises:
        UsageError: If a cut means nothing in its model.
        RefusedError: If it cannot be done, or not proven.
    """
    source, take = locate(request.donor, request.take)
    donor = opened(request.donor, source).model if source.path else request.donor
    request = dataclasses.replace(request, donor=donor, take=take)
    place, inner = locate(request.host, _wanted(request))
    if not place.path:
        return Grafting(request, before, samples, progress).run()
    return _in_body(request, inner, place, before, progress)


def _wanted(request: Request) -> Cut:
    """Return what is replaced, or the tensor behind which something is inserted, as a cut."""
    if request.after is None:
        assert request.replace is not None, "one of both is given"
        return request.replace
    name, within, path = request.after.rpartition(WITHIN)
    behind = Tensors((name or path,), (name or path,))
    return Inside(behind, path) if within else behind


def _in_body(request: Request, inner: Plain, place: Place, before: Probe, progress: Progress) -> Grafted:
    """Carry out a graft in a body of the host, and put the body back.

    Raises:
        RefusedError: If it cannot be done, or not proven.
    """
    host, converted = raised(request, before)
    # Raising the operator set may add nodes in front of the one that carries the body.
    place, _ = locate(host, Inside(inner, place.path))
    body = opened(host, place, Probe(host, before.feeds, request.options))
    replaced = dataclasses.replace(
        request,
        host=body.model,
        replace=inner if request.after is None else None,
        after=inner.outputs[0] if request.after is not None and isinstance(inner, Tensors) else None,
        fixed=True,
    )
    try:
        done = Grafting(replaced, Probe(body.model, body.feeds, request.options), None, progress).run()
    except RefusedError as refused:
        raise with_advice(body, refused) from refused
    result = put_back(host, place, done.model)
    return Grafted(result, certify_body(request, result, place, body.note, done.certificate, converted, before))


def raised(request: Request, before: Probe) -> tuple[ir.Model, tuple[tuple[str, str], ...]]:
    """Return a copy of the host, in the donor's version of the standard operator set if that is newer, and the change.

    Raises:
        RefusedError: If it cannot be converted, or computes something else then.
    """
    host, opset = request.host, _opset(request.donor)
    result = copied(host)
    if not 0 < _opset(host) < opset:
        return result, ()
    try:
        result = models.convert_opset(result, opset)
    except ModelError as error:
        raise RefusedError("opset", str(error)) from error
    found = outputs_of(Probe(result, before.feeds, request.options))
    names = {v.name or "": v.name or "" for v in host.graph.outputs}
    for match in matches(host, outputs_of(before), found, names):
        if not match.ok:
            raise RefusedError("opset", f"Converting the host to opset {opset} changes it: {match.note}.")
    return result, (("host", f"it was converted from opset {_opset(host)} to {opset}, which the donor is in"),)


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
        with about("donor"):
            donor_part = resolve(request.donor, request.take)
        self._progress.stage("grafting")
        result, converted = raised(request, self._before)
        self._opsets.extend(converted)
        with about("host"):
            host_part = self._host_part(result)
        host_types, donor_types = Types(result), Types(request.donor)
        wiring = wire(
            Plan(
                host=host_part,
                host_types=host_types,
                donor=donor_part,
                donor_types=donor_types,
                replace=request.replace,
                after=request.after or "",
                take=request.take,
                same_model=_same_model(request.host, request.donor),
                values=self._values,
                fixed=request.fixed,
            )
        )
        self._ask(wiring)
        reference = standalone(wiring.donor, donor_types)
        splice = Splice(result, self._converted(reference, _opset(result)), _anchor(host_part), str(request.take))
        copies, fits = self._splice(splice, host_part, wiring)
        splice.finish(host_part.nodes)
        fitted = tuple(self._fit(result, pending) for pending in fits)
        self._progress.stage("comparing")
        outcome = Outcome(result, reference, wiring, copies, fitted, tuple(self._opsets), splice.shared)
        return Grafted(result, certify(request, outcome, self._before))

    # Before anything is put in -------------------------------------------------------------------------------

    def _converted(self, part: ir.Model, opset: int) -> ir.Model:
        """Return the donor's part in the host's version of the standard operator set."""
        if not 0 < _opset(part) < opset:
            return part
        self._opsets.append(("donor", f"its part was converted from opset {_opset(part)} to {opset}"))
        try:
            return models.convert_opset(part, opset)
        except ModelError as error:
            raise RefusedError("opset", str(error)) from error

    def _host_part(self, result: ir.Model) -> Part:
        request = self._request
        if request.replace is not None:
            return resolve(result, request.replace)
        assert request.after is not None, "one of both is given"
        value = Flow(result).value(request.after)
        identity = insertion(result, value.name or "")
        source = identity.inputs[0]
        assert source is not None, "an Identity reads something"
        return Part(result, (source,), (identity.outputs[0],), (identity,))

    def _values(self, host: Sequence[str], donor: Sequence[str]) -> tuple[Sequence[Values], Sequence[Values]] | None:
        """Return values of host and donor on the same inputs, where the donor takes the host's."""
        feeds = _feeds_for(self._request.donor, self._feeds)
        if feeds is None:
            return None
        try:
            return self._before.values(host), Probe(self._request.donor, feeds, self._request.options).values(donor)
        except RefusedError:
            return None

    def _ask(self, wiring: Wiring) -> None:
        """Make sure that the adapters are wanted, and that there is data for those that are fitted.

        Raises:
            RefusedError: If they are not, or there is none.
        """
        needed = "; ".join(wiring.adapters)
        if not needed:
            return
        consent = self._request.consent
        if consent == "none" or (callable(consent) and not consent(wiring.adapters)):
            raise RefusedError("adapter", f"An adapter is needed: {needed}. --adapters allow puts it in.")
        fitted = [a for link in (*wiring.inputs, *wiring.outputs) for a in link.adapters if a.kind in FITTED]
        if fitted and self._samples is None:
            raise RefusedError("data", f"{needed}: it is fitted to real inputs; give some with --data.")
        if self._request.repeat > 1 and wiring.inputs[0].adapters:
            raise RefusedError("shape", f"Copies in a row cannot have adapters between them, but need: {needed}.")

    # Putting it in -------------------------------------------------------------------------------------------

    def _splice(self, splice: Splice, part: Part, wiring: Wiring) -> tuple[list[Copy], list[tuple[Fit, str, str]]]:
        """Copy the donor's part; return the copies, and each adapter to fit with whose value it should give."""
        fits: list[tuple[Fit, str, str]] = []
        given: list[ir.Value | None] = [None] * len(wiring.inputs)
        for link in wiring.inputs:
            if link.host is not None:
                given[link.donor], pending = splice.adapt(wiring.host_in.values[link.host], link.adapters)
                fits += [(p, "donor", wiring.donor_in.slots[link.donor].name) for p in pending]
        for link in wiring.inputs:
            if link.sizes is not None:
                given[link.donor] = splice.sizes(link.sizes, given)
        values = [v for v in given if v is not None]
        copies = [splice.copy(values)]
        for _ in range(self._request.repeat - 1):
            copies.append(splice.copy([copies[-1].outputs[0], *values[1:]]))
        for link in wiring.outputs:
            value, pending = splice.adapt(copies[-1].outputs[link.donor], link.adapters)
            assert link.host is not None, "outputs have a counterpart"
            fits += [(p, "host", wiring.host_out.slots[link.host].name) for p in pending]
            splice.replace(part.outputs[link.host], value, free=wiring.free[link.host] and not link.adapters)
        moved = any(a.kind == "Transpose" for link in wiring.inputs for a in link.adapters)
        pairs = [
            (wiring.donor_in.slots[link.donor].dims, wiring.host_in.slots[link.host].dims)
            for link in wiring.inputs
            if link.host is not None and not link.adapters
        ]
        rename_axes(splice.host, [n for c in copies for n in c.nodes], None if moved else unify(pairs))
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


def _same_model(host: ir.Model, donor: ir.Model) -> bool:
    """Whether two models are one, or come from one file."""
    files = [model.graph.meta.get(models.ORIGINAL) for model in (host, donor)]
    paths = {None if file is None else file.path.resolve() for file in files}
    return host is donor or (len(paths) == 1 and None not in paths and _equal_graphs(host, donor))


def _equal_graphs(host: ir.Model, donor: ir.Model) -> bool:
    """Whether two models that come from one file are still as they were."""
    return [v.name for n in host.graph for v in n.outputs] == [v.name for n in donor.graph for v in n.outputs]


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
