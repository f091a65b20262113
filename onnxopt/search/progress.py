"""Says which candidate a stage is about."""

from __future__ import annotations

from onnxopt.contract import Progress


class Labelled:
    """Puts a label before the text of every stage.

    Attributes:
        label: What the stages are about; empty for nothing.
    """

    def __init__(self, progress: Progress) -> None:
        """Pass everything on to `progress`."""
        self.label = ""
        self._progress = progress

    def stage(self, text: str, total: int | None = None) -> None:
        """Pass the stage on."""
        self._progress.stage(f"{self.label}: {text}" if self.label else text, total)

    def advance(self, steps: int = 1) -> None:
        """Pass the steps on."""
        self._progress.advance(steps)
