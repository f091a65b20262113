"""Pipelines: an ordered list of passes, written as `fuse-conv-bn,prune-weights{ratio=0.5}`.

A recipe is a named pipeline. It is built in, or a TOML file:

    name = "edge"
    passes = ["fold-constants", "fuse-conv-bn", "quantize-weights{mode=minmax}"]
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from onnxopt import registry
from onnxopt.contract import GraphPass
from onnxopt.errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """A named pipeline.

    Attributes:
        name: What `--recipe` calls it.
        summary: One line.
        passes: The pipeline string.
    """

    name: str
    summary: str
    passes: str


_LOSSLESS = ",".join(
    (
        # what is known is settled first, so that fusions see through it
        "inline-functions",
        "inline-branches",
        "unroll-loops",
        "fold-constants",
        "settle-shapes",
        "remove-identities",
        "unpack-sequences",
        "simplify-algebra",
        "merge-layout",
        "merge-chains",
        "merge-concats",
        "drop-unused-outputs",
        # spelled-out functions, then linear layers, which take their scales and biases in
        "fuse-exponentials",
        "fuse-activations",
        "fuse-gelu",
        "fuse-instance-norm",
        "fuse-group-norm",
        "fuse-normalization",
        "unflatten-linear",
        "fuse-batch-norm",
        "fuse-conv-bn",
        "fuse-pad",
        "merge-branches",
        "fuse-linear",
        "merge-consecutive-linear",
        # attention: masks and rotary embeddings before it; its projections are merged after it, because the runtime's
        # Attention, which takes merged ones, is slower than GroupQueryAttention at few tokens
        "simplify-masks",
        "fuse-rotary",
        "fuse-attention",
        "merge-parallel-linear",
        "share-layout",
        "sum-residuals",
        "fuse-conv-add",
        "remove-dead-code",
        "deduplicate-initializers",
        "merge-common-subexpressions",
    )
)

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("lossless", "Everything that changes no output beyond floating-point rounding.", _LOSSLESS),
        Recipe(
            "small",
            "lossless, then 8-bit weights: a quarter of the size, at a deviation that is reported.",
            f"{_LOSSLESS},quantize-weights,strip-metadata",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An ordered list of configured passes.

    Attributes:
        passes: The passes, in order.
        name: Name of the recipe it comes from; "custom" otherwise.
    """

    passes: tuple[GraphPass, ...]
    name: str = "custom"

    @classmethod
    def parse(cls, text: str, name: str = "custom") -> Pipeline:
        """Read a pipeline string.

        Raises:
            UsageError: If the string is malformed, or names an unknown pass or option.
        """
        passes = tuple(make_pass(n, options) for n, options in _split(text))
        if not passes:
            raise UsageError('The pipeline is empty; name at least one pass, for example --passes "fuse-conv-bn".')
        return cls(passes, name)

    @classmethod
    def recipe(cls, name: str) -> Pipeline:
        """Return a built-in recipe, or read one from a TOML file.

        Raises:
            UsageError: If there is no such recipe, or the file is not one.
        """
        if name in RECIPES:
            return cls.parse(RECIPES[name].passes, name)
        if name.endswith(".toml"):
            return _from_toml(Path(name))
        hint = registry.nearest(name, list(RECIPES))
        raise UsageError(f'There is no recipe "{name}".{hint} Known: {", ".join(RECIPES)}, or a FILE.toml.')

    def __str__(self) -> str:
        """Return the pipeline string; parsing it gives an equal pipeline."""
        return ",".join(spec(p) for p in self.passes)


_NAME = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*")


def _split(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (pass name, raw options) of each item of a pipeline string."""
    position = 0
    while position < len(text):
        match = _NAME.match(text, position)
        if match is None:
            raise UsageError(
                f'Cannot read the pipeline "{text}" at "{text[position : position + 20]}": expected a pass name.'
            )
        name, position = match.group(1), match.end()
        options: dict[str, str] = {}
        if position < len(text) and text[position] == "{":
            end = text.find("}", position)
            if end < 0:
                raise UsageError(f'Cannot read the pipeline "{text}": the brace after "{name}" is not closed.')
            options = _options(name, text[position + 1 : end])
            position = end + 1
        while position < len(text) and text[position].isspace():
            position += 1
        if position < len(text):
            if text[position] != ",":
                raise UsageError(
                    f'Cannot read the pipeline "{text}" after "{name}": '
                    f'expected "," or "{{" but found "{text[position]}".'
                )
            position += 1
        yield name, options


def _options(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f'Option "{item}" of the pass "{name}" has no value; write {item}=VALUE.')
        options[key.strip()] = value.strip()
    return options


def option_types(cls: type[GraphPass]) -> dict[str, Any]:
    """Return the option names of a pass with their types, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(typing.cast("Any", cls))}


def make_pass(name: str, options: dict[str, Any]) -> GraphPass:
    """Configure a pass by name.

    Args:
        name: Name of the pass.
        options: Values as strings (converted to the option's type) or already as Python values.

    Raises:
        UsageError: If the pass or an option is unknown, or a value does not fit.
    """
    cls = registry.load(name)
    known = option_types(cls)
    values: dict[str, Any] = {}
    for key, raw in options.items():
        field = key.replace("-", "_")
        if field not in known:
            offer = f" It has: {', '.join(known)}." if known else " It has none."
            raise UsageError(f'The pass "{name}" has no option "{key}".{registry.nearest(field, list(known))}{offer}')
        values[field] = _convert(name, key, raw, known[field])
    return cls(**values)


def _convert(name: str, key: str, raw: Any, wanted: Any) -> Any:
    """Convert one raw option value to the type its field declares."""
    choices = _alternatives(wanted)
    for kind in choices:
        converted = _convert_to(raw, kind)
        if converted is not _UNFIT:
            return converted
    expected = " or ".join(_describe(c) for c in choices)
    raise UsageError(f'Option "{key}" of the pass "{name}" must be {expected}, not "{raw}".')


_UNFIT = object()
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _convert_to(raw: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        return next((a for a in typing.get_args(kind) if a == raw or str(a) == str(raw)), _UNFIT)
    if kind is types.NoneType:
        return None if raw is None or raw == "none" else _UNFIT
    if kind is bool:
        return raw if isinstance(raw, bool) else _WORDS.get(str(raw).lower(), _UNFIT)
    if isinstance(raw, bool) or raw is None:
        return _UNFIT
    if kind is str:
        return raw if isinstance(raw, str) else _UNFIT
    if kind in (int, float):
        try:
            return kind(raw) if isinstance(raw, (str, int)) or kind is float else _UNFIT
        except (TypeError, ValueError):
            return _UNFIT
    return _UNFIT


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    """Flatten a union; None first, so that "none" is not read as a string."""
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        return tuple(sorted(typing.get_args(wanted), key=lambda a: a is not types.NoneType))
    return (wanted,)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(str(a) for a in typing.get_args(kind))
    if kind is types.NoneType:
        return "none"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def describe_type(wanted: Any) -> str:
    """Return the type of an option in words, e.g. "symmetric or minmax"."""
    return " or ".join(_describe(c) for c in reversed(_alternatives(wanted)))


def spec(graph_pass: GraphPass) -> str:
    """Return a configured pass as a pipeline item, with the options that differ from their defaults."""
    changed = [
        f"{f.name}={'none' if value is None else value}"
        for f in dataclasses.fields(typing.cast("Any", graph_pass))
        if (value := getattr(graph_pass, f.name)) != f.default
    ]
    return graph_pass.name + (f"{{{','.join(changed)}}}" if changed else "")


def _from_toml(path: Path) -> Pipeline:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} is not valid TOML: {error}.") from error
    unknown = sorted(set(content) - {"name", "summary", "passes"})
    if unknown:
        raise UsageError(f'The recipe {path} has an unknown key "{unknown[0]}"; it may have name, summary and passes.')
    items = content.get("passes")
    if not isinstance(items, list) or not items or not all(isinstance(i, str) for i in items):
        raise UsageError(f'The recipe {path} needs passes = ["fold-constants", ...], a list of at least one pass.')
    return Pipeline.parse(",".join(items), str(content.get("name", path.stem)))
