"""One way of passes through a clone of a model: what they propose is applied, or left out when it is denied."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, DroppedEdit, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import copied
from onnxopt.removed import Fit, Removed

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_ROUNDS = 8
"""A run of exact passes is repeated until it finds nothing more, at most this often."""

CRASHED = "crashed with"
"""How the reason of what crashed begins."""

Numbered = Sequence[tuple[int, GraphPass]]
"""Passes and their positions in the pipeline."""


@dataclasses.dataclass(slots=True)
class Denials:
    """What must not be done.

    Attributes:
        sites: Edits that were found guilty.
        passes: Whole passes that were, by their position in the pipeline, and why.
        spared: Sites that the user wants left alone, and in which words a report says so.
    """

    sites: dict[Site, DroppedEdit] = dataclasses.field(default_factory=dict)
    passes: dict[int, str] = dataclasses.field(default_factory=dict)
    spared: Mapping[Site, str] = dataclasses.field(default_factory=dict)

    def deny(self, site: Site, summary: str, reason: str) -> None:
        """Remember a guilty site."""
        self.sites[site] = DroppedEdit(site, summary, reason)

    def copy(self) -> Denials:
        """Return a copy that can be added to."""
        return Denials(dict(self.sites), dict(self.passes), self.spared)


@dataclasses.dataclass(frozen=True, slots=True)
class Applied:
    """An edit that was made, and the position in the pipeline of the pass that made it."""

    position: int
    site: Site
    summary: str
    removed: Removed | None = None
    fit: Fit | None = None
    repairs: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Crash:
    """What raised an error; without a site it was the pass itself, between two edits."""

    position: int
    site: Site | None
    summary: str
    reason: str


@dataclasses.dataclass(slots=True)
class Trial:
    """One way through a run of passes on one clone.

    Attributes:
        reference: Makes what the last edit says that the result must equal.
        unrepaired: The model as it was before the first edit that repairs, and what it must equal.
        left: How far layers are off that were not fitted, with the position of the pass that looked.
    """

    model: ir.Model
    reference: Callable[[], ir.Model] | None = None
    unrepaired: tuple[ir.Model, ir.Model] | None = None
    applied: list[Applied] = dataclasses.field(default_factory=list)
    left: list[tuple[int, Fit]] = dataclasses.field(default_factory=list)
    refusals: dict[int, Counter[str]] = dataclasses.field(default_factory=dict)
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    crash: Crash | None = None

    @property
    def culprits(self) -> list[Applied]:
        """The edits that can be to blame: those that do more than repair."""
        return [edit for edit in self.applied if not edit.repairs]


def attempt(
    checkpoint: ir.Model,
    segment: Numbered,
    ctx: Context,
    denials: Denials,
    limit: int | None = None,
    *,
    repairing: bool = True,
) -> Trial:
    """Clone the checkpoint and run the passes on it, to a fixed point when they are exact.

    Only the first `limit` edits are made, not counting those that repair, which are made when `repairing`.
    """
    trial = Trial(copied(checkpoint))
    rounds = MAX_ROUNDS if segment[0][1].guarantee is Guarantee.EXACT else 1
    for _ in range(rounds):
        before = len(trial.applied)
        # Edits let more be known than what is remembered about the values they are behind.
        ctx = dataclasses.replace(ctx, shapes=Shapes(trial.model))
        for position, graph_pass in segment:
            if position in denials.passes:
                continue
            finished = _run_pass(trial, position, graph_pass, ctx, denials, limit, repairing=repairing)
            if not finished:
                return trial
        if len(trial.applied) == before:
            break
    return trial


def _run_pass(
    trial: Trial,
    position: int,
    graph_pass: GraphPass,
    ctx: Context,
    denials: Denials,
    limit: int | None,
    *,
    repairing: bool,
) -> bool:
    """Run one pass once; return False when the trial must end here (a crash, or the limit is reached)."""
    start = time.perf_counter()
    refusals: Counter[str] = Counter()
    trial.refusals[position] = refusals
    edit: Edit | None = None
    try:
        reason = graph_pass.skip_reason(trial.model, ctx)
        if reason is not None:
            trial.skipped[position] = reason
            return True
        trial.skipped.pop(position, None)
        for item in graph_pass.run(trial.model, ctx):
            if isinstance(item, Refusal):
                refusals[item.reason] += 1
                trial.left += [] if item.fit is None else [(position, item.fit)]
            elif item.site in denials.spared:
                refusals[denials.spared[item.site]] += 1
            elif item.site not in denials.sites:
                if item.repairs and not repairing:
                    return True
                if limit is not None and not item.repairs and len(trial.culprits) >= limit:
                    if graph_pass.repairs and repairing:
                        continue  # what is made so far is judged as it is when repaired
                    return False
                if item.repairs and trial.reference is not None and trial.unrepaired is None:
                    trial.unrepaired = copied(trial.model), trial.reference()
                edit = item
                item.apply()
                edit = None
                trial.reference = item.reference or trial.reference
                trial.applied.append(Applied(position, item.site, item.summary, item.removed, item.fit, item.repairs))
        return True
    except Exception as error:  # a pass may be anybody's code; whatever it raises is reported, never fatal
        reason = f"{CRASHED} {type(error).__name__}: {error}".strip().rstrip(":")
        if edit is None:
            trial.crash = Crash(position, None, "", reason)
        else:
            trial.crash = Crash(position, edit.site, edit.summary, reason)
        return False
    finally:
        trial.seconds[position] = trial.seconds.get(position, 0.0) + time.perf_counter() - start
