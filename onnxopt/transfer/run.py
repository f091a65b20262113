"""`onnxopt.transfer`: the parameters of one model in the graph of another."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxopt import model as models
from onnxopt.contract import Progress, Silent
from onnxopt.errors import DataError, RuntimeFailure, UsageError
from onnxopt.feeds import Data, Feed, load_data
from onnxopt.graph import constant_tensor, copied
from onnxopt.ground import Source
from onnxopt.runtime import RunOptions
from onnxopt.transfer.certify import Finding, Trial, as_run, certify, renamed, rounding
from onnxopt.transfer.initialize import initialize
from onnxopt.transfer.match import Pair, match
from onnxopt.transfer.move import Moved, move
from onnxopt.transfer.ranges import rescale
from onnxopt.transfer.result import Certificate, Kind, Parameter, Status, Transfer
from onnxopt.transfer.skeleton import Group, Skeleton
from onnxopt.transfer.view import Viewer

_TURNS = 2
"""Orders that layers which swap places are tried in."""

KINDS: tuple[Kind, ...] = ("direct", "feature", "structure")


def transfer(
    source: Source,
    target: Source | None = None,
    *,
    kind: Kind = "direct",
    only: Sequence[str] = (),
    freeze: Sequence[str] = (),
    data: str | Data | Sequence[Feed] | None = None,
    seed: int = 0,
    shape: Mapping[str, int] | None = None,
    verify: bool = True,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Move the parameters of one model into another whose layers correspond, whatever its tensors are called.

    Layers are matched by their place in the graph, never by name or number: another exporter, an optimizer, a quantizer
    or a retraining changes neither. On the way weights are transposed, split, merged, quantized or restored, and
    BatchNormalization is folded, as the target's form asks for. A layer without a certain counterpart keeps its own
    parameters: a wrong match is worse than none.

    Args:
        source: The model that parameters come from.
        target: The model that they go to; it is not changed. With kind "structure" there is none.
        kind: "direct" moves all; "feature" leaves out the linear layers that compute the outputs; "structure" returns
            the source's graph with new random parameters.
        only: Glob patterns: of the target's parameters, only those of layers with a name that fits are moved.
        freeze: Glob patterns of parameters of the target that keep their numbers.
        data: Inputs of the source to compare outputs on; generated without any.
        seed: Seeds generated inputs, and the parameters of kind "structure".
        shape: Sizes of dynamic axes of generated inputs.
        verify: Whether to run both models and compare. Without it ambiguous matches are not moved.
        options: Provider, threads and custom operators.
        progress: Told what is being done.

    Returns:
        The target with the parameters, and what became of each.

    Raises:
        UsageError: If the options contradict each other.
        ModelError: If a model cannot be read.
    """
    progress = progress or Silent()
    if kind not in KINDS:
        raise UsageError(f'There is no kind "{kind}"; there are {", ".join(KINDS)}.')
    if (target is None) != (kind == "structure"):
        raise UsageError(
            "Kind structure takes one model, whose parameters are drawn anew."
            if target is not None
            else f"Kind {kind} needs two models: one to take parameters from, one to put them into."
        )
    progress.stage("loading")
    origin = models.load(source)
    if target is None:
        return initialize(origin, seed, only, freeze)
    samples = load_data(data, origin) if isinstance(data, str) else data
    trial = Trial(data=samples, seed=seed, shape=shape, options=options or RunOptions())
    choice = Choice(kind, tuple(only), tuple(freeze))
    return _Run(origin, models.load(target), choice, trial, progress).run(verify)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which layers take part.

    Attributes:
        kind: "direct" or "feature".
        only: Patterns of names that take part; all without any.
        freeze: Patterns of names that do not.
    """

    kind: Kind
    only: tuple[str, ...]
    freeze: tuple[str, ...]

    def reasons(self, skeleton: Skeleton) -> dict[int, str]:
        """Return for each layer that is left out why."""
        found = {}
        heads = head_layers(skeleton) if self.kind == "feature" else set()
        for group in skeleton.layers:
            names = [v.name or "" for v in group.leaves()]
            if group.index in heads:
                found[group.index] = "it is a head, which kind feature leaves out"
            elif _fits(names, self.freeze):
                found[group.index] = "it is frozen"
            elif self.only and not _fits(names, self.only):
                found[group.index] = "no pattern chose it"
        return found

    def require_used(self, skeleton: Skeleton) -> None:
        """Raise a UsageError for a pattern that fits no parameter."""
        names = [v.name or "" for g in skeleton.layers for v in g.leaves()]
        for option, patterns in (("only", self.only), ("freeze", self.freeze)):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise UsageError(f'{option} "{pattern}" fits no parameter of the target.', option)


def _fits(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in patterns)


def head_layers(skeleton: Skeleton) -> set[int]:
    """Return the linear layers that compute outputs of the model, with no other layer in between."""
    ends = {e.source for g in skeleton.groups if g.kind == "output" for e in g.edges}
    return {i for i in ends if skeleton.groups[i].kind == "linear"}


def limits_by(skeleton: Skeleton, other: Skeleton, counterparts: Mapping[int, int]) -> dict[str, float]:
    """Return where grids of a model end that take the place of a Clip, which the other model has there.

    Args:
        skeleton: The model.
        other: The other model.
        counterparts: Index of a layer -> that of its counterpart in the other model.
    """
    found = {}
    for name, place in skeleton.grids.items():
        limit = other.clips.get(frozenset((counterparts.get(index, -1), label) for index, label in place))
        if limit is not None:
            found[name] = limit
    return found


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """A target with parameters of the source, and what comparing it showed; None when nothing was compared."""

    model: ir.Model
    moved: Moved
    chosen: set[int]
    finding: Finding | None


class _Run:
    def __init__(self, source: ir.Model, target: ir.Model, choice: Choice, trial: Trial, progress: Progress) -> None:
        progress.stage("matching")
        self._source = Viewer(source).view()
        self._target = Viewer(target).view()
        choice.require_used(self._target)
        self._choice, self._trial, self._progress = choice, trial, progress
        self._pairs = match(self._source, self._target)
        self._settle_activations()
        self._left_out = choice.reasons(self._target)
        self._dropped: set[int] = set()
        self._inputs: list[Feed] = []
        self._rescaled = 0

    def _settle_activations(self) -> None:
        """Say of grids that take the place of an activation which one, where the other model tells."""
        source, target = self._source, self._target
        ours = limits_by(source, target, {p.source.index: p.target.index for p in self._pairs})
        theirs = limits_by(target, source, {p.target.index: p.source.index for p in self._pairs})
        if ours or theirs:
            self._source = Viewer(source.real.original, ours).view()
            self._target = Viewer(target.real.original, theirs).view()
            self._pairs = match(self._source, self._target)

    def run(self, verify: bool) -> Transfer:
        """Move what is sure, and what is not when outputs confirm it."""
        confirmed: set[int] = set()
        unsure = self._of_confidence(ambiguous=True)
        attempt = None
        if unsure and verify:
            attempt, confirmed = self._confirm(unsure)
        dropped: set[int] = set()
        exact = {p.target.index for p in self._pairs if p.confidence == "exact"}
        while attempt is None:
            attempt = self._try((self._of_confidence(ambiguous=False) | confirmed) - dropped, verify)
            wrong = attempt.finding.wrong - dropped - exact if attempt.finding is not None else set()
            if wrong:
                dropped |= wrong
                attempt = None
        self._dropped = dropped
        finding = attempt.finding
        if finding is not None and finding.certificate.verdict != "none":
            attempt, finding = self._as_run(attempt, finding)
        return Transfer(
            attempt.model,
            self._choice.kind,
            tuple(self._parameters(attempt.moved, unsure, confirmed)),
            self._unused(attempt.moved, attempt.chosen),
            None if finding is None else finding.certificate,
            self._notes(attempt.moved),
        )

    def _of_confidence(self, *, ambiguous: bool) -> set[int]:
        found = {p.target.index for p in self._pairs if (p.confidence == "ambiguous") == ambiguous}
        return found - self._left_out.keys()

    def _confirm(self, unsure: set[int]) -> tuple[_Attempt | None, set[int]]:
        """Return an attempt with ambiguous matches whose outputs all agree, or else those whose own values do."""
        for turn in range(_TURNS):
            self._pairs = match(self._source, self._target, turn)
            attempt = self._try(self._of_confidence(ambiguous=False) | unsure, True)
            assert attempt.finding is not None
            if attempt.finding.certificate.verdict in ("equal", "close"):
                return attempt, unsure
            if attempt.finding.consistent:
                return None, unsure & attempt.finding.equal
        return None, set()

    def _try(self, chosen: set[int], verify: bool) -> _Attempt:
        self._progress.stage("moving parameters")
        model, limits = copied(self._target.real.original), self._target.real.limits
        moved = move(self._source, model, self._pairs, chosen, limits)
        if not verify:
            return _Attempt(model, moved, chosen, None)
        self._progress.stage("comparing outputs")
        # What was moved may have been given biases: the values to compare are those of the graph as it is.
        moved = dataclasses.replace(moved, skeleton=Viewer(model, limits).view())
        try:
            feeds = self._feeds()
        except (RuntimeFailure, DataError) as error:
            reason = f"the source does not run here: {error}"
            return _Attempt(model, moved, chosen, Finding(Certificate("none", reason, None)))
        through = chosen - moved.failed.keys()
        pairs = [
            Pair(p.source, moved.skeleton.groups[p.target.index], p.confidence)
            for p in self._pairs
            if p.target.index in through
        ]
        finding = certify(self._source, moved, pairs, feeds, self._trial.options)
        return _Attempt(model, moved, chosen, finding)

    def _feeds(self) -> list[Feed]:
        if not self._inputs:
            self._inputs = self._trial.feeds(self._source.real.original)
        return self._inputs

    def _as_run(self, attempt: _Attempt, finding: Finding) -> tuple[_Attempt, Finding]:
        """Scale grids of activations where that makes the target more accurate, and compare the models as they run."""
        feeds, options, after = self._feeds(), self._trial.options, attempt.moved.skeleton
        theirs = renamed(feeds, self._source.model, after.model)
        if after.real.grids:
            self._progress.stage("scaling ranges of activations")
            other = copied(attempt.model)
            changed = rescale(self._target, Viewer(other, after.real.limits).view(), theirs, options)
            better = Viewer(other, after.real.limits).view()
            errors = [rounding(s, theirs, options) for s in (after, better)]
            if changed and errors[0] is not None and errors[1] is not None and errors[1] < errors[0]:
                self._rescaled = changed
                attempt = dataclasses.replace(
                    attempt, model=other, moved=dataclasses.replace(attempt.moved, skeleton=better)
                )
        after = attempt.moved.skeleton
        certificate = as_run(finding.certificate, self._source, self._target, after, feeds, options)
        return attempt, dataclasses.replace(finding, certificate=certificate)

    def _parameters(self, moved: Moved, unsure: set[int], confirmed: set[int]) -> Iterable[Parameter]:
        """Yield what became of the target's parameters; the worst that befell any layer that uses one."""
        by_target = {p.target.index: p for p in self._pairs}
        worst: dict[str, Parameter] = {}
        order: tuple[Status, ...] = ("exact", "aligned", "ambiguous", "left out", "unmatched")
        for group in self._target.layers:
            status, reason = self._status(group, by_target.get(group.index), moved, unsure, confirmed)
            pair = by_target.get(group.index)
            sources = tuple(v.name or "" for v in pair.source.leaves()) if pair is not None else ()
            for leaf in group.leaves():
                tensor = constant_tensor(leaf)
                found = Parameter(
                    leaf.name or "",
                    0 if tensor is None else int(tensor.size),
                    status,
                    status == "ambiguous" and not reason,
                    sources,
                    moved.how.get(group.index, ""),
                    reason,
                )
                known = worst.get(found.name)
                if known is None or order.index(known.status) < order.index(status):
                    worst[found.name] = found
        return worst.values()

    def _status(
        self, group: Group, pair: Pair | None, moved: Moved, unsure: set[int], confirmed: set[int]
    ) -> tuple[Status, str]:
        if group.index in self._left_out:
            return "left out", self._left_out[group.index]
        if pair is None:
            return "unmatched", "no layer of the source has its place"
        if group.index in moved.failed:
            return "unmatched", moved.failed[group.index]
        if group.index in self._dropped:
            return "unmatched", "on the same inputs it computes something else than its counterpart in the source"
        if group.index in unsure and group.index not in confirmed:
            return "ambiguous", "other layers have the same place, and outputs did not confirm the order they come in"
        return pair.confidence, ""

    def _unused(self, moved: Moved, chosen: set[int]) -> tuple[str, ...]:
        used = {v for p in self._pairs if p.target.index in chosen - moved.failed.keys() for v in p.source.leaves()}
        return tuple(dict.fromkeys(v.name or "" for g in self._source.layers for v in g.leaves() if v not in used))

    def _notes(self, moved: Moved) -> tuple[str, ...]:
        notes = []
        if self._rescaled:
            notes.append(f"{self._rescaled} ranges of activations were scaled to what the new parameters make of them.")
        if moved.added:
            notes.append(f"{moved.added} layers of the target had no bias and were given one.")
        if moved.unshared:
            notes.append(
                f"{moved.unshared} parameters that layers of the target shared were stored apart, because the source "
                "has different ones there."
            )
        if self._choice.kind == "feature" and not head_layers(self._target):
            notes.append("No linear layer computes an output of the target, so that nothing was left out as its head.")
        return tuple(notes)
