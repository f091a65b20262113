"""Draws what a long run is doing, on stderr: a live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from onnxopt.contract import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

PLAIN_SECONDS = 5.0
"""Without a terminal, a line is written at most this often, and never for a short run."""


@contextlib.contextmanager
def drawing(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield the progress that suits stderr; what it drew on a terminal is gone afterwards."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield LiveProgress(bars)
    else:
        yield PlainProgress()


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class LiveProgress:
    """One line that moves."""

    def __init__(self, bars: Bars) -> None:
        """Draw with rich."""
        self._bars = bars
        self._task = bars.add_task("starting", total=None)

    def stage(self, text: str, total: int | None = None) -> None:
        """Show the new stage; a bar pulses while the number of steps is unknown."""
        from onnxopt.report.words import fold

        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(fold(text, max(20, self._bars.console.width - 40)), total=total)

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        self._bars.advance(self._task, steps)


class PlainProgress:
    """Lines for logs: the stage and the time so far, when a run takes long."""

    def __init__(self, interval: float = PLAIN_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        """Write at most one line per `interval` seconds."""
        self._interval = interval
        self._clock = clock
        self._start = self._last = clock()
        self._text = ""
        self._done = 0
        self._total: int | None = None

    def stage(self, text: str, total: int | None = None) -> None:
        """Note the new stage."""
        self._text, self._total, self._done = text, total, 0
        self._say()

    def advance(self, steps: int = 1) -> None:
        """Note the steps."""
        self._done += steps
        self._say()

    def _say(self) -> None:
        from onnxopt.report.words import printable

        now = self._clock()
        if now - self._last < self._interval:
            return
        self._last = now
        part = f" ({self._done:,} of {self._total:,})" if self._total else ""
        click.echo(f"[{now - self._start:,.0f} s] {printable(self._text)}{part}", err=True)
