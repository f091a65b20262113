"""What a report says of what was removed: what each group saves and costs, and whether goals are met."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxopt.pipeline import spec
from onnxopt.removed import Change, Damage, Goal, Removed
from onnxopt.report import words
from onnxopt.report.data import Reached

if TYPE_CHECKING:
    from onnxopt.compare.verdict import Verification
    from onnxopt.contract import GraphPass, PassReport
    from onnxopt.measure import Measurement
    from onnxopt.report.data import Report

TITLES = ("group", "width", "params", "mult-adds", "expected", "measured")
"""Of the columns of `Line.cells`."""

SPARED = (3, 4)
"""Columns that are left out first where there is no room for all."""

HOPEFUL = 2.0
"""Outputs that deviate by more than so many times what was expected are worth a word."""

_HOPEFUL = (
    "That was too hopeful: with few samples to learn from, or many groups that work on each other's losses, outputs "
    "deviate by more than is expected; more samples help with the first."
)
_EXPECTED = {
    "outputs": "how far the outputs deviate, with the layers behind making up for it where they can be read",
    "weights": "the part of the group's weights that is lost, by squared norm",
    "activations": "the part of what the group brings into the layers behind it that is lost",
}
_MEASURED = {
    "outputs": "how far the outputs deviate, before the layers left are fitted",
    "layers": "how far the worst layer behind is off, before and after it was fitted, with all that goes in front of "
    "it gone as well; by the spread of what it computed, on samples held back",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One group in the table of what was removed.

    Attributes:
        removed: The group.
        parameters: What it saves of the parameters that the pass found.
        macs: What it saves of the multiply-accumulates that the pass found.
    """

    removed: Removed
    parameters: float
    macs: float

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands below `TITLES`."""
        done = self.removed
        measured = dict.fromkeys(words.share(d.share) for d in (done.unrepaired, done.measured) if d is not None)
        return (
            words.printable(done.name),
            f"{done.units.before:,} -> {done.units.after:,}",
            words.saved(self.parameters),
            words.saved(self.macs),
            "-" if done.predicted is None else words.share(done.predicted.share),
            " -> ".join(measured) or "-",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """What one pass removed.

    Attributes:
        spec: The pass as a pipeline string.
        lines: The groups, in order.
    """

    spec: str
    lines: tuple[Line, ...]

    @property
    def parameters(self) -> Change:
        """Parameters of the model before the first removal and after the last."""
        return Change(self.lines[0].removed.parameters.before, self.lines[-1].removed.parameters.after)

    @property
    def macs(self) -> Change:
        """Multiply-accumulates of the model, likewise."""
        return Change(self.lines[0].removed.macs.before, self.lines[-1].removed.macs.after)

    @property
    def total(self) -> str:
        """What is gone in all, in a sentence."""
        parts = []
        channels = channels_of([line.removed for line in self.lines])
        if channels is not None:
            parts.append(f"{_gone(channels)} of the channels that could go")
        parts.append(f"{_gone(self.parameters)} of the parameters")
        parts.append(f"{_gone(self.macs)} of the multiply-adds")
        return f"Gone: {', '.join(parts)}."

    def together(self, verification: Verification | None) -> str:
        """Return how far the outputs of the result deviate, and what was expected, in a sentence; maybe none.

        Square errors of groups add up where they have nothing to do with one another.
        """
        outputs = () if verification is None else verification.outputs
        lost = [o.lost for o in outputs if o.kind == "float" and o.compared and o.lost is not None]
        if not lost:
            return ""
        found = f"Outputs of the result deviate by {words.share(sum(lost) / len(lost))}, root of the lost part of "
        predicted = [line.removed.predicted for line in self.lines]
        losses = [damage.share**2 for damage in predicted if damage is not None and damage.of == "outputs"]
        if len(losses) < len(predicted):
            return f"{found}their power."
        expected = math.sqrt(sum(losses))
        told = f"{found}their power; expected of these groups together: {words.share(expected)}."
        return told if sum(lost) / len(lost) <= HOPEFUL * expected else f"{told} {_HOPEFUL}"

    @property
    def legend(self) -> list[str]:
        """What the last two columns show, in sentences."""
        expected = _meanings([line.removed.predicted for line in self.lines], _EXPECTED)
        measured = _meanings([line.removed.measured or line.removed.unrepaired for line in self.lines], _MEASURED)
        told = (("Expected", expected), ("Measured", measured), ("Measured", self._unmeasured))
        return [f"{title}: {text}." for title, text in told if text]

    @property
    def _unmeasured(self) -> str:
        """Why groups have no measured damage; empty where all have."""
        missing = [line.removed.measured is None and line.removed.unrepaired is None for line in self.lines]
        if not any(missing):
            return ""
        if not all(missing):
            return "- where no layer behind the group could be fitted"
        if self.spec.startswith("merge-channels"):
            return (
                "-, because merge-channels fits no layers behind, and it is when they are fitted that they are measured"
            )
        if "repair=False" in self.spec:
            return "-, because without repair no layers are fitted, and it is then that they are measured"
        return "-, because layers behind are measured when they are fitted, which needs data and layers that can be"

    def largest(self, count: int) -> list[Line]:
        """Return the groups that save most parameters, in their order."""
        ranked = sorted(self.lines, key=lambda line: -line.parameters)[:count]
        chosen = {id(line) for line in ranked}
        return [line for line in self.lines if id(line) in chosen]


def tables(passes: Sequence[PassReport]) -> Iterator[Table]:
    """Yield a table for each pass that removed something."""
    for done in passes:
        removed = [edit.removed for edit in done.applied if edit.removed is not None]
        if removed:
            parameters, macs = removed[0].parameters.before, removed[0].macs.before
            lines = [Line(r, _part(r.parameters, parameters), _part(r.macs, macs)) for r in removed]
            yield Table(done.spec, tuple(lines))


def reached(
    passes: Sequence[GraphPass], reports: Sequence[PassReport], measurement: Measurement | None
) -> Iterator[Reached]:
    """Yield what passes were asked to leave of a model, and what is left.

    Args:
        passes: The passes.
        reports: What each of them did; those that were skipped, or whose edits do not stand, have nothing to tell.
        measurement: The time of the result by that of the original.
    """
    goals = {spec(graph_pass): goal for graph_pass in passes if (goal := graph_pass.goal()) is not None}
    for done in reports:
        goal = goals.get(done.spec)
        removed = [edit.removed for edit in done.applied if edit.removed is not None]
        if goal is None or not (removed or done.status == "unchanged"):
            continue
        if goal.of == "time":
            low_high = (None, None) if measurement is None else (measurement.low, measurement.high)
            yield Reached(done.spec, goal.of, goal.part, None if measurement is None else measurement.ratio, *low_high)
        else:
            yield Reached(done.spec, goal.of, goal.part, _left(goal, removed))


def _left(goal: Goal, removed: Sequence[Removed]) -> float | None:
    """Return which part of what a goal is about is left; None where it was not counted."""
    if not removed:
        return 1.0
    parameters = Change(removed[0].parameters.before, removed[-1].parameters.after)
    change = parameters if goal.of == "parameters" else channels_of(removed)
    return None if change is None or not change.before else change.after / change.before


def missed(report: Report) -> list[str]:
    """Return what was asked for of passes that removed nothing, in sentences."""
    told_with = {table.spec for table in tables(report.passes)}
    return [f"{told(goal)} Nothing was removed." for goal in report.reached if goal.spec not in told_with]


def sentences(table: Table, report: Report) -> list[str]:
    """Return what a pass took out and reached in all, and how far the result is off, in sentences."""
    goals = [told(goal) for goal in report.reached if goal.spec == table.spec]
    return [text for text in (table.total, *goals, table.together(report.verification)) if text]


def told(goal: Reached) -> str:
    """Return what was asked for and what was reached, in a sentence."""
    name, asked = words.printable(goal.spec), words.share(goal.asked)
    if goal.of != "time":
        left = "an unknown part" if goal.reached is None else words.share(goal.reached)
        return f"{name}: asked to leave {asked} of the {goal.of}; {left} is left."
    if goal.reached is None:
        return f"{name}: asked for {asked} of the time; the result was not measured."
    interval = "" if goal.low is None or goal.high is None else _interval(goal.low, goal.high)
    return f"{name}: asked for {asked} of the time, reached {words.share(goal.reached)}{interval}."


def _interval(low: float, high: float) -> str:
    return f" (95% interval {words.share(low)} to {words.share(high)})"


def channels_of(removed: Sequence[Removed]) -> Change | None:
    """Return the channels of the model that could go before and after removals; None where they were not counted."""
    first, last = removed[0].channels, removed[-1].channels
    return None if first is None or last is None else Change(first.before, last.after)


def _part(change: Change, whole: int) -> float:
    return change.gone / whole if whole else 0.0


def _gone(change: Change) -> str:
    return words.share(_part(change, change.before))


def _meanings(damages: Sequence[Damage | None], texts: dict[str, str]) -> str:
    """Return what damages of a table are shares of."""
    kinds = dict.fromkeys(damage.of for damage in damages if damage is not None)
    return "; or ".join(texts[kind] for kind in kinds)
