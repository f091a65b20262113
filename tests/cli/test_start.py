from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import onnx
import pytest
from click.testing import CliRunner

import onnxopt
from onnxopt import cli
from onnxopt.cli import EXIT_INTERNAL, LazyGroup
from onnxopt.errors import ModelError, VerificationError

FULL = Path("/dev/full")
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "torch")


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnxopt", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )


@pytest.mark.parametrize("command", [None, *cli._COMMANDS])
def test_help_imports_nothing_heavy(command: str | None) -> None:
    args = [command, "--help"] if command else ["--help"]
    script = (
        "import sys, onnxopt.cli\n"
        f"try: onnxopt.cli.cli({args!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("command", [None, *cli._COMMANDS])
def test_help_is_complete_with_an_example(command: str | None) -> None:
    args = [command, "--help"] if command else ["--help"]
    done = CliRunner().invoke(cli.cli, args, prog_name="onnxopt")
    assert done.exit_code == 0
    assert f"onnxopt {command or 'optimize'} " in done.output.split("Example", 1)[1]


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and option.help.endswith((".", "]")), option.name


def test_the_same_option_means_the_same_in_every_command() -> None:
    seen: dict[str, tuple[object, ...]] = {}
    for name in cli._COMMANDS:
        command = cli.cli.get_command(click.Context(cli.cli), name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option):
                shape = (type(option.type), option.is_flag, option.multiple, option.default)
                assert seen.setdefault(option.opts[0], shape) == shape, f"{name} {option.opts[0]}"


def test_version() -> None:
    done = run("--version")
    assert done.stdout == f"onnxopt {onnxopt.__version__}\n"


def test_an_unknown_command_suggests_the_nearest() -> None:
    done = run("optimise")
    assert done.returncode == 2
    assert 'There is no command "optimise". Did you mean "optimize"?' in done.stderr


def test_an_unknown_option_suggests_the_nearest() -> None:
    done = run("optimize", "model.onnx", "--recpe", "small")
    assert done.returncode == 2
    assert "--recipe" in done.stderr.splitlines()[-1]


def raising(error: BaseException) -> LazyGroup:
    """Return a group whose command raises."""

    class Group(LazyGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            def fail() -> None:
                raise error

            return click.Command("optimize", callback=fail)

    return Group("onnxopt")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            ModelError("Cannot read m.onnx:\n it is\x1b[2J short."),
            2,
            r"Error: Cannot read m.onnx: it is\x1b[2J short.",
        ),
        (VerificationError("It differs."), 1, "Error: It differs."),
        (OSError(28, "No space left on device"), 2, "Error: The output cannot be written: No space left on device."),
        (MemoryError(), 2, "Error: There is not enough memory for this model on this machine."),
        (KeyboardInterrupt(), 130, "\nInterrupted; nothing was written."),
    ],
)
def test_errors_become_one_sentence_and_an_exit_code(error: BaseException, code: int, message: str) -> None:
    done = CliRunner().invoke(raising(error), ["optimize"])
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr == message + "\n"


def test_a_defect_is_told_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNXOPT_DEBUG", raising=False)
    done = CliRunner().invoke(raising(ZeroDivisionError("division by zero")), ["optimize"])
    assert done.exit_code == EXIT_INTERNAL
    assert "Traceback" not in done.stderr
    assert "Internal error" in done.stderr and "ZeroDivisionError: division by zero" in done.stderr
    assert "ONNXOPT_DEBUG=1" in done.stderr


def test_a_defect_shows_its_traceback_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXOPT_DEBUG", "1")
    done = CliRunner().invoke(raising(EOFError("end")), ["optimize"])
    assert done.exit_code == EXIT_INTERNAL
    assert "Traceback" in done.stderr and "EOFError: end" in done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f'"{sys.executable}" -m onnxopt passes | true; exit "${{PIPESTATUS[0]}}"',
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "<&-"])
def test_closed_streams_are_no_error(closed: str, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    done = subprocess.run(
        f'"{sys.executable}" -m onnxopt optimize "{model}" -o "{output}" --no-measure {closed}',
        shell=True,
        executable="/bin/bash",
        check=False,
    )
    assert done.returncode == 0
    assert onnx.load(output).graph.node


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("stderr", [subprocess.PIPE, None])
def test_results_that_cannot_be_written_are_no_defect(stderr: int | None) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "onnxopt", "passes"], stdout=full, stderr=stderr or full, text=True, check=False
        )
    assert done.returncode == 2
    if stderr:
        assert done.stderr == "Error: The output cannot be written: No space left on device.\n"


def test_the_completion_script_is_offered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from onnxopt.cli import main; main()"],
        capture_output=True,
        text=True,
        env={**os.environ, "_ONNXOPT_COMPLETE": "zsh_source"},
        check=True,
    )
    assert "#compdef onnxopt" in done.stdout
