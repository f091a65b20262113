from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxopt.contract import AppliedEdit, DroppedEdit, PassReport, Site
from onnxopt.report.data import SCHEMA_VERSION, Comparison, Environment, Report, SlowPass
from onnxopt.report.json import plain, to_json

SCHEMA = Path(__file__).parents[2] / "docs" / "report-schema.md"
DERIVED = ["headline", "warnings", "applied", "dropped"]


def sections() -> dict[str, list[str]]:
    """Return the documented fields of each object."""
    parts = re.split(r"^## (\w+)$", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        name: re.findall(r"^\| `(\w+)` \|", body, flags=re.MULTILINE)
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def dataclasses_in(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from dataclasses_in(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from dataclasses_in(item)


@pytest.fixture
def full(make: Callable[..., Report], removals: Report, beside: Comparison) -> Report:
    """A report in which every type is found."""
    return make(metric={}, search={}, passes=removals.passes, reached=removals.reached, alone=beside)


def test_the_document_names_every_field_and_no_other(full: Report) -> None:
    documented = sections()
    found = {type(v).__name__: v for v in dataclasses_in(full)}
    assert set(documented) == set(found)
    for name, value in found.items():
        fields = [f.name for f in dataclasses.fields(value)]
        assert documented[name] == fields + (DERIVED if name == "Report" else []), name


def test_the_document_explains_every_field() -> None:
    for row in re.findall(r"^\| `.*$", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.fullmatch(r"\| `\w+` \| [^|]+ \| [A-Z\"].*\S \|", row), row


def test_the_types_of_the_document_hold(full: Report) -> None:
    """Each documented type starts with the word for what the JSON has."""
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", type(None): "null"}
    text = SCHEMA.read_text(encoding="utf-8")
    documented: dict[tuple[str, str], str] = {}
    parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        for field, kind in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", body, flags=re.MULTILINE):
            documented[name, field] = kind.strip()
    for value in dataclasses_in(full):
        for field, content in plain(value).items():
            kind = documented[type(value).__name__, field]
            if isinstance(content, dict):
                assert kind.startswith(("object", "[")), (field, kind)
            else:
                assert kinds[type(content)] in kind, (field, kind)


def test_it_is_json_with_a_schema_version(report: Report) -> None:
    content = json.loads(to_json(report))
    assert content["schema_version"] == SCHEMA_VERSION
    assert to_json(report).endswith("}\n")


def test_everything_is_in_it(make: Callable[..., Report]) -> None:
    content = json.loads(to_json(make(metric={}, search={})))
    assert content["headline"].startswith("encoder.onnx: 1,234 -> 1,190 nodes")
    assert content["warnings"] == []
    assert content["applied"] == 35
    assert content["dropped"] == 3
    assert content["passes"][2]["applied"][0]["site"]["graph"] == "If_3.then_branch"
    assert content["passes"][1]["refusals"] == {"Dropout in training mode": 2}
    assert content["environment"]["versions"]["onnxruntime"] == "1.32.0"
    assert content["measurement"]["placement"] == {"CPUExecutionProvider": 1190}
    assert content["verification"]["shapes"] == {"batch": [1, 2]}
    assert list(content["seconds"]) == ["load", "passes", "measure"]
    assert content["metric"]["drop"] == 0.001


def test_what_was_removed_is_in_it_as_numbers(removals: Report) -> None:
    content = json.loads(to_json(removals))
    first, second, fitted = content["passes"][-1]["applied"]
    assert first["removed"]["units"] == {"before": 64, "after": 48}
    assert first["removed"]["predicted"] == {"share": 0.0213, "of": "outputs"}
    assert second["removed"]["widths"] == [{"layer": "attention.weight", "side": "outputs", "before": 12, "after": 3}]
    assert second["removed"]["measured"] is None
    assert (fitted["removed"], fitted["fit"]["after"]) == (None, 0.034)
    assert content["reached"][0]["reached"] == 0.862


def test_numbers_that_json_lacks_are_strings(make: Callable[..., Report]) -> None:
    text = to_json(make(measurement={"ratio": math.nan, "low": -math.inf, "high": math.inf}))
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [content["measurement"][k] for k in ("ratio", "low", "high")] == ["NaN", "-Infinity", "Infinity"]


def test_names_that_are_no_unicode_survive(make: Callable[..., Report]) -> None:
    text = to_json(make(model="lone\ud800.onnx"))
    assert text.isascii()
    assert json.loads(text)["model"] == "lone\ud800.onnx"


def test_what_json_lacks_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        plain({"a": {1}})


def test_every_type_of_the_report_is_frozen() -> None:
    for cls in (Report, Environment, SlowPass, PassReport, AppliedEdit, DroppedEdit, Site):
        assert vars(cls)["__dataclass_params__"].frozen
