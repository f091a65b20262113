"""What shows that a graft computes in the host what the donor's part computes, and that nothing else changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxopt.compare.structure import checker_complaint, checker_level
from onnxopt.graft.certificate import SCHEMA_VERSION, Fitted, GraftCertificate, files_of
from onnxopt.graft.cut import Flow
from onnxopt.graft.nested import Place
from onnxopt.graft.probe import Match, Probe, distance, matches, run
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.request import Request
from onnxopt.graft.slicing import forget_sizes
from onnxopt.graft.splice import Copy
from onnxopt.graft.wiring import Wiring
from onnxopt.graph import all_nodes

_LEVELS = ("none", "basic", "full")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A graft that was made and is still to be proven.

    Attributes:
        result: The host with the donor's part in it.
        reference: The donor's part alone, as it is in the donor.
        wiring: What was connected to what.
        copies: Where the part now stands.
        fitted: The adapters that were fitted.
        opsets: Whose operator set was converted, and how.
        shared_bytes: Bytes of constants that the host already had.
    """

    result: ir.Model
    reference: ir.Model
    wiring: Wiring
    copies: Sequence[Copy]
    fitted: tuple[Fitted, ...]
    opsets: tuple[tuple[str, str], ...]
    shared_bytes: int


def certify(request: Request, outcome: Outcome, before: Probe) -> GraftCertificate:
    """Prove a graft.

    Args:
        request: What was wanted.
        outcome: What was made.
        before: Runs the host as it was.

    Raises:
        RefusedError: If it does not hold.
    """
    result, wiring, copies = outcome.result, outcome.wiring, outcome.copies
    complaint = checker_complaint(result, min(map(checker_level, (request.host, request.donor)), key=_LEVELS.index))
    if complaint:
        raise RefusedError("not reproduced", f"The ONNX checker rejects the result: {complaint}")
    after = Probe(result, before.feeds, request.options)
    flow = Flow(result)
    downstream = {v for node in flow.after([v for c in copies for v in c.outputs]) for v in node.outputs}
    downstream |= {v for c in copies for v in c.outputs}
    boundary = [n for c in copies for v in (*c.inputs, *c.outputs) if (n := v.name or "")]
    untouched = [v.name or "" for v in result.graph.outputs if v not in downstream]
    around = {name: name for name in untouched} | wiring.read
    changed = [v.name or "" for v in result.graph.outputs if v in downstream]
    inside = after.values([*boundary, *around.values(), *changed])
    slices = tuple(m for copy in copies for m in _slice(outcome.reference, copy, inside, request))
    was = before.values([*around, *changed])
    rest = _same(request.host, was, around, inside)
    wrong = next((m for m in (*slices, *rest) if not m.ok), None)
    if wrong is not None:
        raise RefusedError("not reproduced", f"The graft does not compute what the donor's part does: {wrong.note}.")
    return GraftCertificate(
        SCHEMA_VERSION,
        "graft",
        host=files_of(request.host),
        donor=files_of(request.donor),
        result=(),
        replaced=request.place,
        inserted=str(request.take),
        copies=len(copies),
        inputs=wiring.mapped_inputs,
        outputs=wiring.mapped_outputs,
        kept=tuple(wiring.host_out.slots[i].name for i in wiring.kept),
        brought=wiring.brought,
        nodes=(len(request.host.graph), len(result.graph)),
        shared_bytes=outcome.shared_bytes,
        opsets=outcome.opsets,
        sets=len(before.feeds),
        slices=slices,
        untouched=rest,
        changed=tuple(distance(name, was, inside) for name in changed),
        fitted=outcome.fitted,
    )


def certify_body(
    request: Request,
    result: ir.Model,
    place: Place,
    note: str,
    body: GraftCertificate,
    opsets: tuple[tuple[str, str], ...],
    before: Probe,
) -> GraftCertificate:
    """Prove a model in whose body something was grafted.

    Args:
        request: What was wanted.
        result: The model.
        place: Where the body is.
        note: On which values it was run.
        body: The proof for the body alone.
        opsets: How the host's operator set was converted.
        before: Runs the host as it was.

    Raises:
        RefusedError: If anything changed that does not depend on the body.
    """
    complaint = checker_complaint(result, min(map(checker_level, (request.host, request.donor)), key=_LEVELS.index))
    if complaint:
        raise RefusedError("not reproduced", f"The ONNX checker rejects the result: {complaint}")
    carrier = list(result.graph)[place.steps[0][0]]
    downstream = {v for node in Flow(result).after(carrier.outputs) for v in node.outputs} | set(carrier.outputs)
    untouched = [v.name or "" for v in result.graph.outputs if v not in downstream]
    changed = [v.name or "" for v in result.graph.outputs if v in downstream]
    after = Probe(result, before.feeds, request.options).values([*untouched, *changed])
    was = before.values([*untouched, *changed])
    rest = _same(request.host, was, {name: name for name in untouched}, after)
    wrong = next((m for m in rest if not m.ok), None)
    if wrong is not None:
        raise RefusedError("not reproduced", f"What does not depend on the graft changed: {wrong.note}.")
    return dataclasses.replace(
        body,
        host=files_of(request.host),
        donor=files_of(request.donor),
        replaced=request.place,
        opsets=(*opsets, *body.opsets),
        nodes=(sum(1 for _ in all_nodes(request.host)), sum(1 for _ in all_nodes(result))),
        untouched=(*body.untouched, *rest),
        changed=tuple(distance(name, was, after) for name in changed),
        body=place.path,
        note=note,
    )


def _slice(reference: ir.Model, copy: Copy, inside: Sequence[dict[str, Any]], request: Request) -> tuple[Match, ...]:
    """Compare one copy with the donor's part alone, on what the copy reads."""
    names = [v.name or "" for v in reference.graph.inputs if not v.is_initializer()]
    feeds = [
        {name: values[value.name or ""] for name, value in zip(names, copy.inputs, strict=True)} for values in inside
    ]
    try:
        alone = run(reference, feeds, request.options)
    except RefusedError:
        forget_sizes(reference)
        alone = run(reference, feeds, request.options)
    outputs = {
        one.name or "": other.name or "" for one, other in zip(reference.graph.outputs, copy.outputs, strict=True)
    }
    return matches(reference, alone, inside, outputs)


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
