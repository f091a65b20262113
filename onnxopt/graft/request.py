"""What graft is wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import onnx_ir as ir

from onnxopt.graft.cut import Cut
from onnxopt.runtime import RunOptions

Consent = Literal["allow", "none"] | Callable[[Sequence[str]], bool]
"""Whether adapters may be put in: always, never, or asked about with a sentence each."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted; see `graft`.

    Attributes:
        fixed: Whether outputs of the host keep their types: where it is a body, nodes behind it read them.
    """

    host: ir.Model
    donor: ir.Model
    replace: Cut | None
    after: str | None
    take: Cut
    repeat: int
    consent: Consent
    options: RunOptions
    fixed: bool = False

    @property
    def place(self) -> str:
        """Where the donor's part goes, in words."""
        return str(self.replace) if self.after is None else f"after {self.after}"
