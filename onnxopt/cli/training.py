"""How commands that train end: what was done is told, and the result is written when it is better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxopt.cli import written
from onnxopt.cli.output import show
from onnxopt.errors import VerificationError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt.training.trained import Trained


def keep(found: Trained, path: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Tell what was trained, and write the model.

    Raises:
        VerificationError: If it is not better than it was; then nothing is written.
    """
    from onnxopt.model import save

    assert path is not None, "the commands require an output"
    if as_json:
        from onnxopt.report.json import dump, plain

        click.echo(dump(plain(found.summary)), nl=False)
    elif not quiet:
        show(lambda console: _render(found, console))
    if found.best == 0 or found.is_worse:
        raise VerificationError(
            "No epoch did better on the samples that judge than what was there, so nothing was written; use more "
            "samples or a lower --learning-rate, or --validation 0 to keep the last epoch unjudged. What the model has "
            "learnt from before, as a new head has, cannot judge it."
        )
    save(found.model, path)
    written().append(str(path))


def _render(found: Trained, console: Console) -> None:
    from rich.text import Text

    for sentence in found.sentences():
        console.print(Text(sentence))
