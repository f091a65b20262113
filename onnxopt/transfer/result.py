"""What a transfer did."""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from onnxopt.compare.verdict import Verification

Status = Literal["exact", "aligned", "ambiguous", "unmatched", "left out"]
STATUSES: tuple[Status, ...] = ("exact", "aligned", "ambiguous", "unmatched", "left out")
MOVED: tuple[Status, ...] = ("exact", "aligned")
Verdict = Literal["equal", "close", "trunk", "none"]
Kind = Literal["direct", "feature", "structure"]


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """What became of a parameter of the target.

    Attributes:
        name: Its name in the target.
        elements: How many numbers it holds.
        status: "exact" and "aligned" were moved, and so was "ambiguous" when `confirmed`. "left out": a glob or the
            kind excluded it.
        confirmed: Whether outputs confirmed an ambiguous match.
        sources: Names of the source's parameters that it was made from.
        how: What was done to them on the way, in words; empty for a copy.
        reason: Why it was not moved; empty when it was.
    """

    name: str
    elements: int
    status: Status
    confirmed: bool
    sources: tuple[str, ...]
    how: str
    reason: str

    @property
    def moved(self) -> bool:
        """Whether the target now has the source's numbers."""
        return not self.reason


@dataclasses.dataclass(frozen=True, slots=True)
class Certificate:
    """Whether the target computes what the source computes.

    Attributes:
        verdict: "equal": all outputs agree. "close": integers stand for weights on one side, and this is the
            deviation. "trunk": the models differ as a whole, and the values between layers agree. "none": nothing could
            be compared.
        reason: Why it is not "equal", in words.
        verification: The comparison of all outputs; None where there was none.
        layers_equal: How many layers compute the same in both models.
        layers_compared: Of how many.
        first_difference: The first layer whose inputs agree and whose results do not; empty without any.
        rounding: Of a target that computes with integers: how far its outputs lie from what it computes in real
            numbers, relative to their range; None for other targets.
        rounding_before: The same of the target as it was given, with its own parameters.
    """

    verdict: Verdict
    reason: str
    verification: Verification | None
    layers_equal: int = 0
    layers_compared: int = 0
    first_difference: str = ""
    rounding: float | None = None
    rounding_before: float | None = None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A model with the parameters of another, and the account of how it came to them.

    Attributes:
        model: The target with what was moved; the target itself was not changed.
        kind: "direct", "feature" or "structure".
        parameters: Every parameter of the target.
        unused: Names of the source's parameters that went nowhere.
        certificate: Whether the outputs agree; None when verification was turned off.
        notes: What else there is to know, in sentences.
    """

    model: ir.Model
    kind: Kind
    parameters: tuple[Parameter, ...]
    unused: tuple[str, ...]
    certificate: Certificate | None
    notes: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """The share of the target's numbers, but for those left out, that came from the source."""
        meant = [p for p in self.parameters if p.status != "left out"]
        total = sum(p.elements for p in meant)
        return sum(p.elements for p in meant if p.moved) / total if total else 0.0

    def count(self, status: Status) -> tuple[int, int]:
        """Return how many parameters, and how many numbers in them, have a status."""
        found = [p.elements for p in self.parameters if p.status == status]
        return len(found), sum(found)
