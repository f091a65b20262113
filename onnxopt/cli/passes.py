"""`onnxopt passes`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from typing import TYPE_CHECKING, Any, cast

import click

from onnxopt.cli import options

if TYPE_CHECKING:
    from onnxopt.contract import GraphPass
    from onnxopt.registry import Entry

_EPILOG = """
\b
Examples:
  onnxopt passes
  onnxopt passes quantize-weights
"""

_GUARANTEES = {
    "exact": "Only floating-point rounding may differ.",
    "approximate": "Outputs may move; --max-error and --max-drop judge by how much.",
    "redefines": "A new function: the result becomes the reference for what follows.",
}


@click.command("passes", epilog=_EPILOG)
@click.argument("name", metavar="[NAME]", required=False, type=options.Choice("NAME", options.pass_names))
def command(name: str | None) -> None:
    """List the passes and recipes, or describe the pass NAME: its guarantee, its options and their defaults."""
    if name is None:
        _list()
    else:
        _describe(name)


def _list() -> None:
    from onnxopt.pipeline import RECIPES
    from onnxopt.registry import entries

    groups: dict[str, list[Entry]] = {}
    for entry in entries().values():
        groups.setdefault(_group(entry), []).append(entry)
    for title, members in groups.items():
        _heading(title)
        _rows([(e.name, e.summary) for e in members])
        click.echo()
    _heading("Recipes")
    for recipe in RECIPES.values():
        _rows([(recipe.name, recipe.summary)])
        _rows([("", recipe.passes.replace(",", ", "))], dim=True)
    click.echo('\n"onnxopt passes NAME" describes one pass.')


def _group(entry: Entry) -> str:
    """Return the folder a built-in pass lives in as a title, e.g. "Simplify"."""
    if entry.package:
        return "From other packages"
    return entry.location.removeprefix("onnxopt.passes.").partition(".")[0].capitalize()


def _describe(name: str) -> None:
    from onnxopt.pipeline import describe_type, option_types
    from onnxopt.registry import entries, load

    cls = load(name)
    entry = entries()[name]
    summary, body, meanings = docstring(cls)
    _heading(name)
    click.echo(_wrapped(summary or entry.summary))
    for paragraph in body:
        click.echo()
        click.echo(_wrapped(paragraph))
    click.echo()
    guarantee = cls.guarantee.value
    click.echo(_wrapped(f"Guarantee: {guarantee}. {_GUARANTEES[guarantee]}"))
    if entry.package:
        click.echo(f"Package: {entry.package} ({entry.location})")
    click.echo()
    types = option_types(cls)
    if not types:
        click.echo("It has no options.")
    else:
        _heading("Options")
    for field in dataclasses.fields(cast("Any", cls)):
        kind = describe_type(types[field.name])
        click.echo(f"  {click.style(field.name, bold=True)}: {kind}; {_default(field)}")
        if meanings.get(field.name):
            click.echo(_wrapped(meanings[field.name], indent="      "))
    click.echo()
    click.echo(f'Use: onnxopt optimize MODEL -o OUT --passes "{_example(cls, types)}"')


def _default(field: dataclasses.Field[Any]) -> str:
    return f"by default {_value(field.default)}" if field.default is not dataclasses.MISSING else "required"


def _value(value: object) -> str:
    """Return an option's value as pipelines write it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _example(cls: type[GraphPass], types: dict[str, Any]) -> str:
    """Return a pipeline item that sets the first option to its default."""
    fields = [f for f in dataclasses.fields(cast("Any", cls)) if f.default is not dataclasses.MISSING]
    if not types or not fields:
        return cls.name
    return f"{cls.name}{{{fields[0].name}={_value(fields[0].default)}}}"


def docstring(cls: type[GraphPass]) -> tuple[str, list[str], dict[str, str]]:
    """Split a class docstring into its summary, its other paragraphs, and the meaning of each attribute."""
    text, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    paragraphs = [_joined(p) for p in re.split(r"\n\s*\n", text.strip()) if p.strip()]
    meanings: dict[str, str] = {}
    section = re.split(r"\n(?=\S)", attributes)[0]
    for item in re.split(r"\n(?= {4}\S)", "\n" + section):
        key, colon, meaning = item.strip().partition(":")
        if colon:
            meanings[key.strip()] = _joined(meaning)
    return (paragraphs[0] if paragraphs else ""), paragraphs[1:], meanings


def _joined(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def _heading(text: str) -> None:
    click.secho(text, bold=True)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _rows(rows: list[tuple[str, str]], *, dim: bool = False) -> None:
    """Print names with their texts in two columns."""
    column = 2 + max(len("merge-common-subexpressions"), *(len(n) for n, _ in rows)) + 2
    for name, text in rows:
        line = f"  {name}".ljust(column) + _wrapped(text, " " * column)[column:]
        click.echo(click.style(line, dim=True) if dim else line)


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 115))
