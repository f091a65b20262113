"""Runs passes on a clone, keeps what verifies, and finds the edit that is to blame when something does not.

A trial flows one way: clone the checkpoint, let each pass propose edits, apply them. On the green path a
run of exact passes costs one clone and one verification. When the verdict is bad or a pass crashes, the trial is
replayed from the checkpoint with a limit on the number of edits, bisecting to the first edit that breaks it
(LLVM's opt-bisect does the same); that site is denied, reported, and the trial is run again without it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from onnxopt.contract import AppliedEdit, Context, DroppedEdit, GraphPass, Guarantee, PassReport, Progress, Silent
from onnxopt.errors import VerificationError
from onnxopt.pipeline import spec
from onnxopt.removed import Damage, Fit
from onnxopt.trial import CRASHED, Crash, Denials, Numbered, Trial, attempt

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_GUILTY = 5
"""After this many guilty edits of one pass, an exact pass is dropped as a whole and a lossy one stops."""

MAX_UNEQUAL = 25
"""Edits of a lossy pass that do not compute what they should are left out one by one; after so many it stops."""

UNEQUAL = "it does not compute what it should"
"""How the reason of an edit begins that does not equal its reference."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a trial may be kept; `reason` says in one sentence why not."""

    ok: bool
    reason: str = ""


class Judge(Protocol):
    """Compares a trial with the reference."""

    def __call__(self, model: ir.Model, guarantee: Guarantee) -> Verdict:
        """Return the verdict on a model made by passes of this guarantee."""

    def equal(self, model: ir.Model, reference: ir.Model) -> Verdict:
        """Return whether a trial computes what another model does, to rounding."""

    def rebase(self, model: ir.Model, guarantee: Guarantee) -> None:
        """Take the result of a pass that is not exact as what later exact passes are compared with.

        A pass that redefines the function makes it the reference of every later comparison.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The last checkpoint and how it came about.

    Attributes:
        model: The model; the given one itself when nothing was changed.
        passes: One report per pass of the pipeline, in order.
        denials: What was found guilty; hand it to another run to leave the same things out.
    """

    model: ir.Model
    passes: tuple[PassReport, ...]
    denials: Denials


def run(
    model: ir.Model,
    passes: Sequence[GraphPass],
    ctx: Context,
    judge: Judge | None = None,
    *,
    progress: Progress | None = None,
    denials: Denials | None = None,
) -> Outcome:
    """Run passes over a model and keep what the judge accepts.

    Args:
        model: The model; it is not changed.
        passes: The passes, in order.
        ctx: What passes may know.
        judge: Compares trials with the reference; None keeps every edit that does not crash.
        progress: Told what is being done.
        denials: What to leave out from the start.

    Returns:
        The resulting model and one report per pass.

    Raises:
        VerificationError: If the unchanged model itself is judged bad.
    """
    progress = progress or Silent()
    denials = denials.copy() if denials else Denials()
    checkpoint, trials = model, []
    for segment in _segments(passes):
        trial = _settle(checkpoint, segment, ctx, judge, denials, progress)
        trials.append(trial)
        if not trial.applied:
            continue
        checkpoint = trial.model
        guarantee = segment[0][1].guarantee
        if judge is not None and guarantee is not Guarantee.EXACT:
            judge.rebase(checkpoint, guarantee)
    return Outcome(checkpoint, tuple(_reports(passes, trials, denials)), denials)


def _segments(passes: Sequence[GraphPass]) -> Iterable[Numbered]:
    """Group consecutive exact passes; every other pass stands alone and is judged alone."""
    numbered = enumerate(passes)
    for exact, group in itertools.groupby(numbered, key=lambda item: item[1].guarantee is Guarantee.EXACT):
        if exact:
            yield list(group)
        else:
            yield from ([item] for item in group)


def _settle(
    checkpoint: ir.Model,
    segment: Numbered,
    ctx: Context,
    judge: Judge | None,
    denials: Denials,
    progress: Progress,
) -> Trial:
    """Repeat trials, denying one culprit after the other, until one stands."""
    guarantee = segment[0][1].guarantee
    while True:
        progress.stage(segment[0][1].name if len(segment) == 1 else f"running {len(segment)} exact passes")
        trial = attempt(checkpoint, segment, ctx, denials)
        if trial.crash is not None:
            _deny_crash(trial.crash, denials)
            continue
        if judge is None or not trial.applied:
            return trial
        progress.stage(f"verifying {len(trial.applied)} edits")
        verdict = equal = _equal(judge, trial)
        if equal.ok:
            verdict = judge(trial.model, guarantee)
        if verdict.ok:
            return trial
        judged = functools.partial(_judged, checkpoint, segment, ctx, judge, denials, repairing=equal.ok)
        guilty = _bisect(len(trial.culprits), verdict.reason, judged, progress)
        if guilty.index < 1:
            _require_sound(checkpoint, judge, guarantee)
        _deny_guilty(segment, guilty, trial, denials)


def _equal(judge: Judge, trial: Trial) -> Verdict:
    """Judge a trial, as it was before repairs, by the reference that its edits name."""
    if trial.reference is None:
        return Verdict(True)
    equal = judge.equal(*(trial.unrepaired or (trial.model, trial.reference())))
    return equal if equal.ok else Verdict(False, f"{UNEQUAL}: {equal.reason}")


@dataclasses.dataclass(frozen=True, slots=True)
class _Guilty:
    """The first edit whose prefix fails; `index` counts from 0."""

    index: int
    reason: str


def _judged(
    checkpoint: ir.Model,
    segment: Numbered,
    ctx: Context,
    judge: Judge,
    denials: Denials,
    edits: int,
    *,
    repairing: bool,
) -> Verdict:
    """Judge the first so many edits.

    `repairing` tells that all of them pass before repairs. Only then repairs are made, and only then the guarantee is
    asked for; otherwise it is what the edits must equal that fails.
    """
    trial = attempt(checkpoint, segment, ctx, denials, limit=edits, repairing=repairing)
    return judge(trial.model, segment[0][1].guarantee) if repairing else _equal(judge, trial)


def _bisect(edits: int, reason: str, judged: Callable[[int], Verdict], progress: Progress) -> _Guilty:
    """Find a k so that the first k edits pass and the first k + 1 fail.

    Args:
        edits: How many edits there are; all of them together fail.
        reason: Why they do.
        judged: Judges the first so many.
        progress: Told what is being done.
    """
    passing, failing = 0, edits
    progress.stage("looking for the edit to blame", total=failing.bit_length())
    while failing - passing > 1:
        middle = (passing + failing) // 2
        verdict = judged(middle)
        if verdict.ok:
            passing = middle
        else:
            failing, reason = middle, verdict.reason
        progress.advance()
    return _Guilty(failing - 1, reason)


def _require_sound(checkpoint: ir.Model, judge: Judge, guarantee: Guarantee) -> None:
    """Judge the model without any edit: where the first one is to blame, it may be bad by itself.

    Raises:
        VerificationError: If it is judged bad.
    """
    baseline = judge(checkpoint, guarantee)
    if not baseline.ok:
        raise VerificationError(f"The model fails verification before any edit: {baseline.reason}")


def _deny_guilty(segment: Numbered, guilty: _Guilty, trial: Trial, denials: Denials) -> None:
    edit = trial.culprits[guilty.index]
    denials.deny(edit.site, edit.summary, guilty.reason)
    unequal = guilty.reason.startswith(UNEQUAL)
    convicted = sum(
        d.site.pass_name == edit.site.pass_name and d.reason.startswith(UNEQUAL) == unequal
        for d in denials.sites.values()
    )
    if convicted < (MAX_UNEQUAL if unequal else MAX_GUILTY):
        return
    if dict(segment)[edit.position].guarantee is Guarantee.EXACT:
        denials.passes[edit.position] = (
            f"{convicted} of its edits failed verification, so none of it is trusted; the last: {guilty.reason}"
        )
        return
    missed = "did not compute what they should" if unequal else "missed the budget"
    for later in trial.culprits[guilty.index + 1 :]:
        denials.deny(later.site, later.summary, f"not kept after {convicted} edits {missed}")


def _deny_crash(crash: Crash, denials: Denials) -> None:
    if crash.site is None:
        denials.passes[crash.position] = crash.reason
        return
    denials.deny(crash.site, crash.summary, crash.reason)
    name = crash.site.pass_name
    crashed = sum(d.site.pass_name == name and d.reason.startswith(CRASHED) for d in denials.sites.values())
    if crashed >= MAX_GUILTY:
        denials.passes[crash.position] = (
            f"{crashed} of its edits crashed, so none of it is trusted; the last {crash.reason}"
        )


def _reports(passes: Sequence[GraphPass], trials: Sequence[Trial], denials: Denials) -> Iterable[PassReport]:
    """Sum up what the standing trials did, pass by pass."""
    applied: dict[int, list[AppliedEdit]] = {}
    refusals: dict[int, Counter[str]] = {}
    skipped: dict[int, str] = {}
    seconds: dict[int, float] = {}
    left: dict[int, list[Fit]] = {}
    for trial in trials:
        for edit in trial.applied:
            applied.setdefault(edit.position, []).append(AppliedEdit(edit.site, edit.summary, edit.removed, edit.fit))
        for position, fit in trial.left:
            left.setdefault(position, []).append(fit)
        refusals.update(trial.refusals)
        skipped.update(trial.skipped)
        seconds.update(trial.seconds)
    first = {p.name: i for i, p in reversed(list(enumerate(passes)))}
    for position, graph_pass in enumerate(passes):
        kept = tuple(_measured(applied.get(position, ()), left.get(position, ())))
        dropped = tuple(
            d
            for d in denials.sites.values()
            if d.site.pass_name == graph_pass.name and first[graph_pass.name] == position
        )
        reason = denials.passes.get(position) or skipped.get(position, "")
        yield PassReport(
            name=graph_pass.name,
            spec=spec(graph_pass),
            guarantee=graph_pass.guarantee.value,
            status=_status(position, kept, dropped, denials, skipped),
            reason=reason,
            applied=kept,
            dropped=dropped,
            refusals=tuple(sorted(refusals.get(position, Counter()).items())),
            seconds=seconds.get(position, 0.0),
        )


def _measured(edits: Sequence[AppliedEdit], left: Sequence[Fit]) -> Iterable[AppliedEdit]:
    """Yield edits, those that removed something with how far the layers behind are off.

    Args:
        edits: The edits of a pass.
        left: What it found out about layers that it did not fit.
    """
    fits = {fit.layer: fit for fit in (*left, *(edit.fit for edit in edits)) if fit is not None}
    for edit in edits:
        behind = () if edit.removed is None else edit.removed.behind
        found = [fits[layer] for layer in behind if layer in fits]
        if edit.removed is None or not found:
            yield edit
            continue
        before, after = max(fit.before for fit in found), max(fit.after for fit in found)
        removed = dataclasses.replace(
            edit.removed, unrepaired=Damage(before, "layers"), measured=Damage(after, "layers")
        )
        yield dataclasses.replace(edit, removed=removed)


def _status(
    position: int,
    kept: tuple[AppliedEdit, ...],
    dropped: tuple[DroppedEdit, ...],
    denials: Denials,
    skipped: dict[int, str],
) -> Literal["kept", "dropped", "unchanged", "skipped"]:
    if kept:
        return "kept"
    if dropped or position in denials.passes:
        return "dropped"
    return "skipped" if position in skipped else "unchanged"
