from __future__ import annotations

import io

import pytest
from rich.console import Console

from onnxopt.cli import progress
from onnxopt.cli.progress import LiveProgress, PlainProgress, drawing
from onnxopt.contract import Silent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_short_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    plain = PlainProgress(interval=5, clock=clock)
    for _ in range(10):
        clock.now += 0.4
        plain.stage("loading")
        plain.advance()
    assert capsys.readouterr() == ("", "")


def test_a_long_run_says_now_and_then_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    plain = PlainProgress(interval=5, clock=clock)
    plain.stage("looking for the \x1b[31m edit", total=20)
    for _ in range(12):
        clock.now += 1
        plain.advance()
    out, error = capsys.readouterr()
    assert out == ""
    assert error.splitlines() == [
        r"[5 s] looking for the \x1b[31m edit (5 of 20)",
        r"[10 s] looking for the \x1b[31m edit (10 of 20)",
    ]


def test_the_live_line_shows_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    bars = progress._bars()
    bars.live.console = Console(file=stream, force_terminal=True, width=80)
    with bars:
        live = LiveProgress(bars)
        live.stage("[bold]measuring", total=4)
        live.advance(3)
        bars.refresh()
        assert [(t.description, t.completed, t.total) for t in bars.tasks] == [("[bold]measuring", 3, 4)]
    assert "[bold]measuring" in stream.getvalue()


def test_quiet_is_silent() -> None:
    with drawing(quiet=True) as quiet:
        assert isinstance(quiet, Silent)


def test_without_a_terminal_it_is_plain() -> None:
    with drawing() as plain:
        assert isinstance(plain, PlainProgress)


def test_on_a_terminal_it_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with drawing() as live:
        assert isinstance(live, LiveProgress)
