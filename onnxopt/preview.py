"""What passes would do to a model, without keeping, verifying or measuring anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import NEEDS_DATA, Context, GraphPass, Guarantee, Progress, Refusal, Silent, Site
from onnxopt.errors import UsageError
from onnxopt.graph import copied
from onnxopt.pipeline import make_pass, spec
from onnxopt.registry import entries
from onnxopt.trial import MAX_ROUNDS

if TYPE_CHECKING:
    import onnx_ir as ir


UNTRIED = (
    "what it would do depends on the values that the model computes with, and nothing is run here; try it with "
    "`onnxopt optimize --data`"
)
"""Why a pass that depends on data is not tried: a preview has no data to be given."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedEdit:
    """An edit that a pass would make."""

    site: Site
    summary: str


@dataclasses.dataclass(frozen=True, slots=True)
class Preview:
    """What one pass would do.

    Attributes:
        name: Name of the pass.
        spec: The pass as a pipeline string.
        guarantee: "exact", "approximate" or "redefines".
        skipped: Why it does not apply to this model; empty when it does.
        crashed: How it crashed, in words; empty when it did not.
        edits: What it would change, in order.
        refusals: Near misses that are left after the edits, each with its reason.
    """

    name: str
    spec: str
    guarantee: str
    skipped: str
    crashed: str
    edits: tuple[PlannedEdit, ...]
    refusals: tuple[Refusal, ...]


def preview(model: ir.Model, passes: Sequence[GraphPass], ctx: Context) -> tuple[Preview, ...]:
    """Run passes one after the other on one clone.

    Args:
        model: The model; it is not changed.
        passes: The passes. Exact ones are repeated until they find nothing more, as in a real run.
        ctx: What passes may know.
    """
    trial = copied(model)
    return tuple(_preview(trial, graph_pass, ctx, apply=True) for graph_pass in passes)


def survey(model: ir.Model, ctx: Context, progress: Progress | None = None) -> tuple[Preview, ...]:
    """Run every registered pass with its default options, each on a clone of its own.

    Edits of lossy passes are counted but not made: they would compute new weights that nobody looks at.

    Args:
        model: The model; it is not changed.
        ctx: What passes may know.
        progress: Told which pass is tried.
    """
    return tuple(_previewed(model, ctx, progress or Silent()))


def _previewed(model: ir.Model, ctx: Context, progress: Progress) -> Iterator[Preview]:
    for name in entries():
        progress.stage(f"trying {name}")
        yield _survey(model, name, ctx)


def _survey(model: ir.Model, name: str, ctx: Context) -> Preview:
    try:
        graph_pass = make_pass(name, {})
    except UsageError as error:  # it has options without which it does nothing, or cannot be imported
        return Preview(name, name, "", str(error), "", (), ())
    return _preview(copied(model), graph_pass, ctx, apply=graph_pass.guarantee is Guarantee.EXACT)


def _preview(trial: ir.Model, graph_pass: GraphPass, ctx: Context, *, apply: bool) -> Preview:
    edits: list[PlannedEdit] = []
    refusals: list[Refusal] = []
    skipped = crashed = ""
    ctx = dataclasses.replace(ctx, shapes=Shapes(trial))
    try:
        skipped = graph_pass.skip_reason(trial, ctx) or ""
        skipped = UNTRIED if skipped == NEEDS_DATA else skipped
        if not skipped:
            _run(trial, graph_pass, ctx, edits, refusals, apply=apply)
    except Exception as error:  # a pass may be anybody's code; what it raises is what the user asked to see
        crashed = f"crashed with {type(error).__name__}: {error}".strip().rstrip(":")
    return Preview(
        name=graph_pass.name,
        spec=spec(graph_pass),
        guarantee=graph_pass.guarantee.value,
        skipped=skipped,
        crashed=crashed,
        edits=tuple(edits),
        refusals=tuple(refusals),
    )


def _run(
    trial: ir.Model,
    graph_pass: GraphPass,
    ctx: Context,
    edits: list[PlannedEdit],
    refusals: list[Refusal],
    *,
    apply: bool,
) -> None:
    """Note what the pass yields as it comes, so that a crash loses nothing of what came before."""
    for _ in range(MAX_ROUNDS if graph_pass.guarantee is Guarantee.EXACT else 1):
        before = len(edits)
        refusals.clear()
        for item in graph_pass.run(trial, ctx):
            if isinstance(item, Refusal):
                refusals.append(item)
                continue
            if apply:
                item.apply()
            edits.append(PlannedEdit(item.site, item.summary))
        if len(edits) == before:
            return
