"""The command line. Commands are imported when they are called, so that `--help` answers at once.

Exit codes: 0 done; 1 verification failed or a stated requirement is not met; 2 usage, unreadable input or
unwritable output; 70 a defect of onnxopt itself or a crash of native code; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import re
import signal
import sys
import traceback
from typing import NoReturn

import click

from onnxopt import __version__
from onnxopt.cli import crash
from onnxopt.errors import OnnxOptError, UsageError
from onnxopt.report.words import sentence

_COMMANDS: dict[str, tuple[str, str]] = {
    "optimize": ("onnxopt.cli.optimize", "Optimize a model; verify, measure and report what changed."),
    "quantize": ("onnxopt.cli.quantize", "Quantize a model in one way that you choose."),
    "merge-trunk": (
        "onnxopt.cli.merge_trunk",
        "Merge models that share their first layers into one with several heads.",
    ),
    "advise": ("onnxopt.cli.advise", "Say whether a model helps with another task, and how to use it."),
    "head": ("onnxopt.cli.head", "Give a classifier a new head for other classes, from labelled samples."),
    "finetune": ("onnxopt.cli.finetune", "Train a model's parameters on labelled samples; the graph stays as it is."),
    "transfer": ("onnxopt.cli.transfer", "Move the parameters of one model into the graph of another."),
    "distill": ("onnxopt.cli.distill", "Train a model on unlabelled samples to compute what another one computes."),
    "inspect": ("onnxopt.cli.inspect", "Show what a model consists of and what the passes would do."),
    "verify": ("onnxopt.cli.verify", "Compare the outputs of two models."),
    "extract": ("onnxopt.cli.extract", "Cut a part out of a model, and prove that it computes the same alone."),
    "graft": ("onnxopt.cli.graft", "Put a part of one model into another, and prove what it computes there."),
    "bench": ("onnxopt.cli.bench", "Time a model, or two against each other."),
    "passes": ("onnxopt.cli.passes", "List the passes and recipes, or describe one."),
    "explain": ("onnxopt.cli.explain", "Show every edit a pass would make, and why it left the rest alone."),
}
"""Name -> (module with the click command `command`, one line)."""

EXIT_INTERNAL = 70
"""What a defect ends with (EX_SOFTWARE of sysexits.h)."""

EXIT_INTERRUPTED = 130

DEBUG_VARIABLE = "ONNXOPT_DEBUG"

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What writing to a stream, such as stdout on a full disk, fails with."""

_EPILOG = """
\b
Examples:
  onnxopt optimize model.onnx -o model.opt.onnx
  onnxopt inspect model.onnx
  onnxopt passes quantize-weights

\b
Shell completion (bash; zsh and fish work alike):
  eval "$(_ONNXOPT_COMPLETE=bash_source onnxopt)"

Exit codes: 0 done; 1 verification failed or a requirement not met; 2 usage, unreadable input or unwritable output;
70 a defect of onnxopt (ONNXOPT_DEBUG=1 shows its traceback); 130 interrupted.
"""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports them when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, the main one first."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None when there is none of this name."""
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with the nearest name."""
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.4)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            ctx.fail(f'There is no command "{name}".{hint} There are: {", ".join(_COMMANDS)}.')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; turn what goes wrong into one sentence and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except UsageError as error:
            _end(ctx, f"Error: {sentence(_with_option_names(error))}", error.exit_code)
        except OnnxOptError as error:
            _end(ctx, f"Error: {sentence(str(error))}", error.exit_code)
        except KeyboardInterrupt:
            stands = f"{' and '.join(written())} had been written" if written() else "nothing was written"
            _end(ctx, " ".join((f"\nInterrupted; {stands}.", *_kept())), EXIT_INTERRUPTED)
        except MemoryError:
            _end(ctx, "Error: There is not enough memory for this model on this machine.", 2)
        except Exception as error:  # the last line of defence: a user gets a sentence, not a traceback
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if isinstance(error, OSError) and error.errno in _UNWRITABLE and error.filename is None:
                _end(ctx, f"Error: The output cannot be written: {error.strerror}.", 2)
            if os.environ.get(DEBUG_VARIABLE):
                traceback.print_exc()
            what = sentence(f"{type(error).__name__}: {error}").rstrip(".")
            _end(
                ctx,
                f"Error: Internal error in onnxopt {__version__} ({what}). Please report it; run with "
                f"{DEBUG_VARIABLE}=1 for the traceback.",
                EXIT_INTERNAL,
            )


def _with_option_names(error: UsageError) -> str:
    """Return the message with arguments of the library under the names that the command line has for them."""
    message = str(error)
    for option in error.options:
        message = re.sub(rf"(?<![\w-]){option}\b", f"--{option.replace('_', '-')}", message)
    return message


def _end(ctx: click.Context, message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # stderr may lie on the same full disk
        click.echo(message, err=True)
    ctx.exit(code)


def written() -> list[str]:
    """Return the list of files the running command has finished writing; commands append to it."""
    paths: list[str] = click.get_current_context().meta.setdefault("onnxopt.written", [])
    return paths


def keep(sentence: str) -> None:
    """Note what an interrupted command leaves to go on from; it is said at the end."""
    _kept().append(sentence)


def _kept() -> list[str]:
    sentences: list[str] = click.get_current_context().meta.setdefault("onnxopt.kept", [])
    return sentences


@click.group(
    cls=LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="onnxopt", message="%(prog)s %(version)s")
def cli() -> None:
    """Optimize ONNX models. Every edit is verified against the original, measured and reported."""


def main() -> None:
    """Run the command line; the entry point of the `onnxopt` script."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        # a model's names may hold characters that the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    if not os.environ.get(DEBUG_VARIABLE):  # a core file says more
        crash.install()
    cli(prog_name="onnxopt")


def _open_standard_streams() -> None:
    """Open what the caller has closed, or the next file, a model for one, would get the number of stdout or stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _terminate(number: int, frame: object) -> NoReturn:
    """End in order, so that temporary files are removed."""
    raise SystemExit(128 + number)
