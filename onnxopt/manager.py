"""Runs passes on a clone, keeps what verifies, and finds the edit that is to blame when something does not.

A trial flows one way: clone the checkpoint, let each pass propose edits, apply them. On the green path a
run of exact passes costs one clone and one verification. When the verdict is bad or a pass crashes, the trial is
replayed from the checkpoint with a limit on the number of edits, bisecting to the first edit that breaks it
(LLVM's opt-bisect does the same); that site is denied, reported, and the trial is run again without it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import (
    AppliedEdit,
    Context,
    DroppedEdit,
    Edit,
    GraphPass,
    Guarantee,
    PassReport,
    Progress,
    Refusal,
    Silent,
    Site,
    Width,
)
from onnxopt.errors import VerificationError
from onnxopt.pipeline import spec
from onnxopt.proto.collector import garbage_collection_paused

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_ROUNDS = 8
"""A run of exact passes is repeated until it finds nothing more, at most this often."""

MAX_GUILTY = 5
"""After this many guilty edits of one pass, an exact pass is dropped as a whole and a lossy one stops."""

MAX_UNEQUAL = 25
"""Edits of a lossy pass that do not compute what they should are left out one by one; after so many it stops."""

UNEQUAL = "it does not compute what it should"
"""How the reason of an edit begins that does not equal its reference."""

CRASHED = "crashed with"
"""How the reason of what crashed begins."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Applied:
    position: int
    site: Site
    summary: str
    widths: tuple[Width, ...]
    repairs: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Crash:
    position: int
    site: Site | None
    summary: str
    reason: str


@dataclasses.dataclass(slots=True)
class _Trial:
    """One way through a run of passes on one clone.

    Attributes:
        reference: Makes what the last edit says that the result must equal.
        unrepaired: The model as it was before the first edit that repairs, and what it must equal.
    """

    model: ir.Model
    reference: Callable[[], ir.Model] | None = None
    unrepaired: tuple[ir.Model, ir.Model] | None = None
    applied: list[_Applied] = dataclasses.field(default_factory=list)
    refusals: dict[int, Counter[str]] = dataclasses.field(default_factory=dict)
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    crash: _Crash | None = None

    @property
    def culprits(self) -> list[_Applied]:
        """The edits that can be to blame: those that do more than repair."""
        return [edit for edit in self.applied if not edit.repairs]


_Numbered = Sequence[tuple[int, GraphPass]]


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


def _segments(passes: Sequence[GraphPass]) -> Iterable[_Numbered]:
    """Group consecutive exact passes; every other pass stands alone and is judged alone."""
    numbered = enumerate(passes)
    for exact, group in itertools.groupby(numbered, key=lambda item: item[1].guarantee is Guarantee.EXACT):
        if exact:
            yield list(group)
        else:
            yield from ([item] for item in group)


def _settle(
    checkpoint: ir.Model,
    segment: _Numbered,
    ctx: Context,
    judge: Judge | None,
    denials: Denials,
    progress: Progress,
) -> _Trial:
    """Repeat trials, denying one culprit after the other, until one stands."""
    guarantee = segment[0][1].guarantee
    while True:
        progress.stage(segment[0][1].name if len(segment) == 1 else f"running {len(segment)} exact passes")
        trial = _trial(checkpoint, segment, ctx, denials)
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
        guilty = _bisect(checkpoint, segment, ctx, judge, denials, trial, verdict, progress, repairing=equal.ok)
        _deny_guilty(segment, guilty, trial, denials)


def _equal(judge: Judge, trial: _Trial) -> Verdict:
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


def _bisect(
    checkpoint: ir.Model,
    segment: _Numbered,
    ctx: Context,
    judge: Judge,
    denials: Denials,
    whole: _Trial,
    verdict: Verdict,
    progress: Progress,
    *,
    repairing: bool,
) -> _Guilty:
    """Find a k so that the first k edits pass and the first k + 1 fail, as `whole` does.

    `repairing` tells that it passed before repairs. Only then repairs are made, and only then the guarantee is asked
    for; otherwise it is what the edits must equal that fails.
    """
    passing, failing, reason = 0, len(whole.culprits), verdict.reason
    progress.stage("looking for the edit to blame", total=failing.bit_length())
    while failing - passing > 1:
        middle = (passing + failing) // 2
        trial = _trial(checkpoint, segment, ctx, denials, limit=middle, repairing=repairing)
        middle_verdict = judge(trial.model, segment[0][1].guarantee) if repairing else _equal(judge, trial)
        if middle_verdict.ok:
            passing = middle
        else:
            failing, reason = middle, middle_verdict.reason
        progress.advance()
    if passing == 0:
        baseline = judge(checkpoint, segment[0][1].guarantee)
        if not baseline.ok:
            raise VerificationError(f"The model fails verification before any edit: {baseline.reason}")
    return _Guilty(failing - 1, reason)


def _deny_guilty(segment: _Numbered, guilty: _Guilty, trial: _Trial, denials: Denials) -> None:
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


def _deny_crash(crash: _Crash, denials: Denials) -> None:
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


def _trial(
    checkpoint: ir.Model,
    segment: _Numbered,
    ctx: Context,
    denials: Denials,
    limit: int | None = None,
    *,
    repairing: bool = True,
) -> _Trial:
    """Clone the checkpoint and run the passes on it, to a fixed point when they are exact.

    Only the first `limit` edits are made, not counting those that repair, which are made when `repairing`.
    """
    trial = _Trial(clone(checkpoint))
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
    trial: _Trial,
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
                    trial.unrepaired = clone(trial.model), trial.reference()
                edit = item
                item.apply()
                edit = None
                trial.reference = item.reference or trial.reference
                trial.applied.append(_Applied(position, item.site, item.summary, item.widths, item.repairs))
        return True
    except Exception as error:  # a pass may be anybody's code; whatever it raises is reported, never fatal
        reason = f"{CRASHED} {type(error).__name__}: {error}".strip().rstrip(":")
        if edit is None:
            trial.crash = _Crash(position, None, "", reason)
        else:
            trial.crash = _Crash(position, edit.site, edit.summary, reason)
        return False
    finally:
        trial.seconds[position] = trial.seconds.get(position, 0.0) + time.perf_counter() - start


def clone(model: ir.Model) -> ir.Model:
    """Copy a model's graphs; tensors are shared."""
    with garbage_collection_paused():
        copy = model.clone()
    copy.meta.update(model.meta)
    return copy


def _reports(passes: Sequence[GraphPass], trials: Sequence[_Trial], denials: Denials) -> Iterable[PassReport]:
    """Sum up what the standing trials did, pass by pass."""
    applied: dict[int, list[AppliedEdit]] = {}
    refusals: dict[int, Counter[str]] = {}
    skipped: dict[int, str] = {}
    seconds: dict[int, float] = {}
    for trial in trials:
        for edit in trial.applied:
            applied.setdefault(edit.position, []).append(AppliedEdit(edit.site, edit.summary, edit.widths))
        refusals.update(trial.refusals)
        skipped.update(trial.skipped)
        seconds.update(trial.seconds)
    first = {p.name: i for i, p in reversed(list(enumerate(passes)))}
    for position, graph_pass in enumerate(passes):
        kept = tuple(applied.get(position, ()))
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
