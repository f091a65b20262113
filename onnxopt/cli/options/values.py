"""Kinds of values that options take, and how options are added to a command."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
"""What a decorator of options takes and gives back."""
if TYPE_CHECKING:  # older versions of click have no generic ParamType
    SizesParam = click.ParamType[dict[str, int]]
    FractionParam = click.ParamType[float]
    TextParam = click.ParamType[str]
else:
    SizesParam = FractionParam = TextParam = click.ParamType


class Sizes(SizesParam):
    """`batch=1,seq=128` as a mapping."""

    name = "AXIS=N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        """Read the sizes."""
        if isinstance(value, dict):
            return value
        sizes: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in str(value).split(","))):
            axis, equals, number = (part.strip() for part in item.rpartition("="))
            if not equals or not axis:
                self.fail(f'"{item}" is not AXIS=N; write for example batch=1,seq=128.', param, ctx)
            if not (number.isascii() and number.isdigit()):
                self.fail(f'The size of "{axis}" must be a whole number, not "{number}".', param, ctx)
            if axis in sizes:
                self.fail(f'The axis "{axis}" is given twice.', param, ctx)
            sizes[axis] = int(number)
        if not sizes:
            self.fail("it is empty; write for example batch=1,seq=128.", param, ctx)
        return sizes


class Fraction(FractionParam):
    """A fraction of one, also as a percentage: `0.005` and `0.5%` are the same."""

    name = "FRACTION"

    def __init__(self, *, infinite: bool = False, below_one: bool = False) -> None:
        """Accept fractions.

        Args:
            infinite: Whether `inf` is allowed.
            below_one: Whether a number of 1 and more is refused unless written as a percentage.
        """
        self._infinite = infinite
        self._below_one = below_one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the fraction."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            self.fail(f'"{value}" is not a number; write 0.005 or 0.5%.', param, ctx)
        percent = text.endswith("%")
        if math.isnan(number) or number < 0:
            self.fail(f"it must be 0 or more, not {text}.", param, ctx)
        if math.isinf(number) and not self._infinite:
            self.fail("it must be finite; write 0.005 or 0.5%.", param, ctx)
        if self._below_one and not percent and number >= 1:
            self.fail(f"{text} is ambiguous; write {text}% or a fraction below 1.", param, ctx)
        return number / 100 if percent else number


class Choice(TextParam):
    """A name out of several that are known only when asked for; nothing is refused here.

    What the name means is decided where it is used, which gives the better message.
    """

    def __init__(self, metavar: str, known: Callable[[], list[tuple[str, str]]], *, files: bool = False) -> None:
        """Complete names.

        Args:
            metavar: What help calls the value.
            known: Returns (name, help) pairs.
            files: Whether a file is allowed as well.
        """
        self.name = metavar
        self._known = known
        self._files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names that go on from what is typed."""
        found = [CompletionItem(n, help=text) for n, text in self._known() if n.startswith(incomplete)]
        return [*found, CompletionItem(incomplete, type="file")] if self._files else found


class PipelineText(TextParam):
    """A pipeline string; completion offers pass names after each comma."""

    name = "PIPELINE"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the pass names that go on from the last comma."""
        done, comma, start = incomplete.rpartition(",")
        return [CompletionItem(done + comma + n, help=t) for n, t in pass_names() if n.startswith(start)]


def pass_names() -> list[tuple[str, str]]:
    """Return (name, summary) of every pass."""
    from onnxopt.registry import entries

    return [(e.name, e.summary) for e in entries().values()]


def recipe_names() -> list[tuple[str, str]]:
    """Return (name, summary) of every built-in recipe."""
    from onnxopt.pipeline import RECIPES

    return [(r.name, r.summary) for r in RECIPES.values()]


def names(*names: str) -> Callable[[], list[tuple[str, str]]]:
    """Return fixed names for completion."""
    return lambda: [(name, "") for name in names]


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in settings.items() if value is not None}


def decorated(function: F, *decorators: Callable[[F], F]) -> F:
    """Add options to a command; the first comes first in its help."""
    for decorate in reversed(decorators):  # the last one applied comes first in the help
        function = decorate(function)
    return function
