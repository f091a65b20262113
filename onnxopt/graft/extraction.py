"""Cutting a part out of a model, with the proof that it computes what it computed inside."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from onnxopt import model as models
from onnxopt.compare.structure import checker_complaint, checker_level
from onnxopt.contract import Progress, Silent
from onnxopt.feeds import Data, load_data
from onnxopt.graft.certificate import SCHEMA_VERSION, ExtractCertificate, files_of, typed
from onnxopt.graft.cut import Cut, Part, parse_cut, resolve
from onnxopt.graft.nested import locate, opened, with_advice
from onnxopt.graft.probe import Match, Probe, find_feeds, matches, run
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.slicing import Types, forget_sizes, standalone
from onnxopt.runtime import RunOptions

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


@dataclasses.dataclass(frozen=True, slots=True)
class Extraction:
    """What `extract` returns.

    Attributes:
        model: The part as a model.
        certificate: What was cut out, and the proof.
    """

    model: ir.Model
    certificate: ExtractCertificate


def extract(
    model: Source,
    cut: str | Cut,
    *,
    data: str | os.PathLike[str] | Data | None = None,
    seed: int = 0,
    shape: Mapping[str, int] | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Cut a part out of a model.

    The part is closed: constants, functions, and what bodies of its nodes read from around them come along. It is
    run alone on the values that the whole model computes at the boundary, and must compute what the model does.

    Args:
        model: The model; it is not changed.
        cut: "a,b->c" from tensors to tensors, "nodes:GLOB", "block:N" or "backbone", with " in PATH" behind it for one
            within a body; see `onnxopt.graft.cut`.
        data: Real inputs of the model to prove it on, instead of generated ones.
        seed: Seeds generated inputs.
        shape: Sizes of dynamic axes for generated inputs.
        options: Provider, threads and custom operators to run with.
        progress: Told what is being done.

    Returns:
        The part and its certificate.

    Raises:
        UsageError: If the cut means nothing in this model.
        RefusedError: If it cannot be made, or not proven; `reason` says which.
    """
    progress = progress or Silent()
    progress.stage("cutting")
    source = models.load(model)
    place, inner = locate(source, parse_cut(cut) if isinstance(cut, str) else cut)
    if not place.path:
        resolve(source, inner)
    options = options or RunOptions()
    samples = load_data(data, source) if isinstance(data, (str, os.PathLike)) else data
    progress.stage("running the model")
    probe = Probe(source, find_feeds(source, samples, options, seed=seed, shape=shape), options)
    body = opened(source, place, probe)
    if place.path:
        probe = Probe(body.model, body.feeds, options)
    part = resolve(body.model, inner)
    progress.stage("comparing")
    try:
        alone, proof = take_out(part, Types(body.model, probe), probe)
    except RefusedError as refused:
        raise with_advice(body, refused) from refused
    certificate = ExtractCertificate(
        SCHEMA_VERSION,
        "extract",
        source=files_of(source),
        result=(),
        cut=str(cut),
        inputs=typed(alone.graph.inputs),
        outputs=typed(alone.graph.outputs),
        nodes=len(part.nodes),
        captures=part.captures,
        functions=len(alone.functions),
        opsets=tuple((domain or "ai.onnx", version) for domain, version in alone.opset_imports.items()),
        sets=len(probe.feeds),
        matches=proof,
        body=place.path,
        note=body.note,
    )
    return Extraction(alone, certificate)


def take_out(part: Part, types: Types, probe: Probe) -> tuple[ir.Model, tuple[Match, ...]]:
    """Return a part as a model, with the proof that it computes what it computes inside.

    Args:
        part: The part.
        types: Types and shapes of the values of its model.
        probe: Runs the model that the part lies in.

    Raises:
        RefusedError: If it does not, or does not run.
    """
    alone = standalone(part, types)
    try:
        return alone, prove(part, alone, probe)
    except RefusedError:
        forget_sizes(alone)
        return alone, prove(part, alone, probe)


def prove(part: Part, alone: ir.Model, probe: Probe) -> tuple[Match, ...]:
    """Show that a part alone computes what it computes inside its model.

    Args:
        part: The part.
        alone: The same as a model.
        probe: Runs the model that the part lies in.

    Raises:
        RefusedError: If it does not, or does not run.
    """
    complaint = checker_complaint(alone, checker_level(part.model))
    if complaint:
        raise RefusedError("not reproduced", f"The ONNX checker rejects what was cut out: {complaint}")
    inputs, outputs = [v.name or "" for v in part.inputs], [v.name or "" for v in part.outputs]
    inside = probe.values([*inputs, *outputs])
    found = run(alone, [{name: values[name] for name in inputs} for values in inside], probe.options)
    proof = matches(alone, inside, found, {name: name for name in outputs})
    wrong = next((m for m in proof if not m.ok), None)
    if wrong is not None:
        raise RefusedError(
            "not reproduced", f"What was cut out does not compute what it computes inside: {wrong.note}."
        )
    return proof
