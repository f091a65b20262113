"""The report as JSON, for programs. docs/report-schema.md says what each field means."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from onnxopt.report import summary

if TYPE_CHECKING:
    from onnxopt.report.data import Report


def to_json(report: Report) -> str:
    """Return a report as JSON, with the fields of `Report` and what is derived from them.

    Numbers that JSON lacks become the strings "NaN", "Infinity" and "-Infinity". Pairs of a name and a value
    become objects.
    """
    content = plain(report)
    content |= {
        "headline": summary.headline(report),
        "warnings": summary.warnings(report),
        "applied": report.applied,
        "dropped": report.dropped,
    }
    return dump(content)


def dump(content: Any) -> str:
    """Return plain values as indented JSON that ends with a line break."""
    return json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Turn dataclasses, tuples and numbers into what JSON has.

    Raises:
        TypeError: If there is a value that JSON has no form for.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _field(f, getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return _number(value)
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"A report cannot hold a {type(value).__name__}.")


def is_mapping(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field holds pairs of a name and a value, which become an object."""
    return str(field.type).startswith("tuple[tuple[str, ")


def _field(field: dataclasses.Field[Any], value: Any) -> Any:
    if is_mapping(field):
        return {name: plain(item) for name, item in value}
    return plain(value)


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
