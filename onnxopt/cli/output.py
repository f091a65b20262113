"""How commands print: a rich console where a person reads, plain lines where a program does."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 120
"""Tables are not stretched beyond this many columns."""


def show(draw: Callable[[Console], None]) -> None:
    """Print what `draw` draws: in colour on a terminal, without trailing blanks elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    width = min(console.width, WIDEST)
    if console.is_terminal:
        draw(Console(highlight=False, markup=False, width=width))
        return
    text = io.StringIO()
    draw(Console(file=text, highlight=False, markup=False, width=width, color_system=None))
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def tell_output(path: str) -> None:
    """Say where the result was written, or how it would be where there is no path."""
    if path:
        click.echo(f"Written to {path}.")
    else:
        click.echo("Nothing was written; name a file with -o to keep the result.")
