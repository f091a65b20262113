"""What is found about one output of a model, added up feed by feed into a verdict in words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from onnxopt.compare.deviation import Difference, Extent, Kind, blank, difference


@dataclasses.dataclass(frozen=True, slots=True)
class OutputDeviation:
    """How far one output lies from the reference, over all feeds.

    Attributes:
        name: Name of the output.
        kind: "float", "integer", "boolean", "string", or "empty" when it had no elements to compare.
        max_abs: Largest absolute difference.
        relative: Deviation relative to the output's range; for indices, booleans and strings the share of the
            elements that differ. Infinite when NaN or infinity is new, or shape or type are wrong.
        cosine: Cosine between both; None for booleans and strings, and when both are zero.
        first_index: First element that differs by more than is allowed, else the first that differs at all; None
            when all are equal. In front of it stand positions in sequences and keys in maps.
        tolerance: Allowed value of `relative`.
        ok: Whether the output may be as it is.
        note: What else there is to know, in words.
        compared: Whether its values were compared; otherwise only type and shape, or it holds no number.
        lost: Norm of the difference by that of the reference, over all numbers; below 1e-7 it is rounding. None for
            booleans and strings, and when the reference is zero.
    """

    name: str
    kind: Kind
    max_abs: float
    relative: float
    cosine: float | None
    first_index: tuple[int | str, ...] | None
    tolerance: float
    ok: bool
    note: str = ""
    compared: bool = True
    lost: float | None = None


class Tally:
    """Adds up what is found about one output, feed by feed."""

    def __init__(
        self, name: str, *, extent: Extent, tolerance: float, discrete_tolerance: float, is_index: bool
    ) -> None:
        """Start with nothing found.

        Args:
            name: Name of the output.
            extent: Of the reference, over all feeds; deviations are relative to its scale.
            tolerance: Allowed deviation of floating-point elements.
            discrete_tolerance: Allowed deviation of integers, or share of booleans and strings that differ.
            is_index: Whether the output holds indices, of which the share that differs counts.
        """
        self.name = name
        self._scale = extent.scale
        self._float_tolerance = tolerance
        self._discrete_tolerance = discrete_tolerance
        self._is_index = is_index
        self._found = Difference("empty")
        self._failed = False
        self._notes: dict[str, None] = {}
        self._compared = True

    @property
    def allowed(self) -> float:
        """Largest absolute difference of floating-point elements."""
        return self._float_tolerance * self._scale

    def add(self, found: Difference, excuse: str = "") -> None:
        """Add what a feed showed; an excuse says why what differs is no fault."""
        if excuse:
            self._notes[excuse] = None
        elif found.exceeded:
            self._failed = True
        self._found |= found

    def add_layout(self, reference: Any, other: Any, why: str, *, same_shape: bool = True) -> None:
        """Compare type and shape alone, and note why."""
        self._compared = False
        self._notes[f"{why}; only type{' and shape' if same_shape else ''} can be compared"] = None
        if same_shape:
            self.add(difference(blank(reference), blank(other)))
        elif isinstance(reference, np.ndarray) and isinstance(other, np.ndarray):
            self.add(difference(reference.reshape(-1)[:0], other.reshape(-1)[:0]))

    @property
    def relative(self) -> float:
        """Deviation relative to the range; for what has none, the share of elements that differ."""
        if self._found.broken:
            return math.inf
        if self._is_share:
            return self._found.share
        return self._found.max_abs / self._scale

    @property
    def ok(self) -> bool:
        """Whether the output may be as it is."""
        if not self._failed:
            return True
        return not self._found.broken and self._is_discrete and self.relative <= self._discrete_tolerance

    @property
    def reason(self) -> str:
        """What is wrong, in words."""
        found = self._found
        at = f", first at {_index(found.first)}" if found.first else ""
        if found.broken:
            return f'output "{self.name}" {found.broken}{at}'
        if self._is_share or (self._is_discrete and self._discrete_tolerance == 0.0):
            return (
                f'output "{self.name}" differs in {_percent(found.share)} of its elements '
                f"(allowed {_percent(self._discrete_tolerance)}){at}"
            )
        return f'output "{self.name}" deviates by {self.relative:.1e} of its range (allowed {self._tolerance:.1e}){at}'

    @property
    def deviation(self) -> OutputDeviation:
        """Everything that was found."""
        found = self._found
        notes = list(self._notes)
        numberless = self._compared and 0 < found.elements == found.nonfinite and not found.broken
        if numberless:
            notes.append("holds nothing but NaN and infinity, so there was no number to compare")
        return OutputDeviation(
            name=self.name,
            kind=found.kind,
            max_abs=found.max_abs,
            relative=self.relative,
            cosine=found.cosine,
            first_index=found.first,
            tolerance=self._tolerance,
            ok=self.ok,
            note="; ".join(notes),
            compared=self._compared and not numberless,
            lost=found.lost,
        )

    @property
    def _is_discrete(self) -> bool:
        return self._found.kind in ("integer", "boolean", "string")

    @property
    def _is_share(self) -> bool:
        return self._is_discrete and (self._is_index or self._found.kind != "integer")

    @property
    def _tolerance(self) -> float:
        return self._discrete_tolerance if self._is_discrete else self._float_tolerance


def _index(position: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(p) for p in position) + "]"


def _percent(share: float) -> str:
    return "none" if share == 0.0 else f"{share:.2g}" if share > 1 else f"{100 * share:.3g}%"
