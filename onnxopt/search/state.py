"""What a search has found out so far, in a file, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Site
from onnxopt.errors import OutputError
from onnxopt.feeds import Feed
from onnxopt.graph import scopes
from onnxopt.metrics import MetricResult
from onnxopt.report.data import FloatLayer
from onnxopt.report.json import dump, plain
from onnxopt.search.decision import Record, Speed
from onnxopt.textfile import write_text

FORMAT = 4

Spared = dict[Site, str]


class State:
    """Records by name. Without a path nothing is written and nothing is known from before."""

    def __init__(self, path: Path | None, key: str) -> None:
        """Read the file if it is about the same search.

        Args:
            path: The file; None for none.
            key: What the search depends on; a file with another key is started anew.

        Raises:
            OutputError: If the file cannot be written.
        """
        self._path, self._key = path, key
        self._records: dict[str, Any] = _read(path, key) if path is not None else {}
        self._save()

    def record(self, name: str) -> Record | None:
        """Return what is known about a candidate."""
        found = self._records.get(name)
        return None if found is None else _record(found["record"])

    def spared(self, name: str) -> Spared:
        """Return the layers a candidate leaves in floating point."""
        return {Site(*site): reason for *site, reason in self._records[name]["spared"]}

    def remember(self, name: str, record: Record, spared: Mapping[Site, str]) -> None:
        """Add or replace what is known about a candidate, and write it.

        Raises:
            OutputError: If the file cannot be written.
        """
        sites = [[s.pass_name, s.graph, s.output, reason] for s, reason in spared.items()]
        self._records[name] = {"record": plain(record), "spared": sites}
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            write_text(self._path, dump({"format": FORMAT, "key": self._key, "records": self._records}))
        except OutputError as error:
            raise OutputError(f"The state of the search cannot be kept: {error}") from error


def _read(path: Path, key: str) -> dict[str, Any]:
    """Return the records of a file; none where it is missing, damaged or about another search."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("key") != key:
        return {}
    records = content.get("records")
    return records if isinstance(records, dict) else {}


def _record(content: dict[str, Any]) -> Record:
    """Turn JSON into a record; numbers that JSON lacks come as words that `float` reads."""
    speed, metric, worst = content["speed"], content["metric"], content["worst"]
    return Record(
        name=content["name"],
        pipeline=content["pipeline"],
        failure=content["failure"],
        bytes=content["bytes"],
        speed=None if speed is None else _speed(speed),
        worst=None if worst is None else float(worst),
        metric=None if metric is None else _metric(metric),
        in_float=tuple(FloatLayer(**layer) for layer in content["in_float"]),
        applies=content["applies"],
        moved=None if content["moved"] is None else float(content["moved"]),
        tried=content["tried"],
    )


def _speed(content: dict[str, Any]) -> Speed:
    return Speed(float(content["ratio"]), float(content["low"]), float(content["high"]), content["effort"])


def _metric(content: dict[str, Any]) -> MetricResult:
    numbers = {name: float(content[name]) for name in ("baseline", "candidate", "drop", "low", "high")}
    return MetricResult(name=content["name"], samples=content["samples"], labelled=content["labelled"], **numbers)


def fingerprint(model: ir.Model, feeds: Iterable[Feed], labels: np.ndarray | None, options: Any) -> str:
    """Return a digest of everything that what is known about candidates depends on.

    Args:
        model: The original, weights included.
        feeds: The samples.
        labels: Their labels.
        options: A dataclass or other plain value with the options.
    """
    digest = hashlib.blake2b(digest_size=20)
    for part in _model_parts(model):
        digest.update(part)
    for feed in feeds:
        for name in sorted(feed):
            digest.update(name.encode())
            _update(digest.update, feed[name])
    _update(digest.update, labels)
    digest.update(repr(options).encode())
    return digest.hexdigest()


def _model_parts(model: ir.Model) -> Iterator[bytes | memoryview]:
    for scope in scopes(model):
        yield scope.path.encode()
        for value in (*scope.graph.inputs, *scope.graph.outputs):
            yield f"{value.name}:{value.type}:{value.shape}".encode()
        for node in scope.graph:
            yield str(node).encode()
        for name, value in scope.graph.initializers.items():
            if value.const_value is not None:
                yield f"{name}:{value.const_value.dtype}:{value.const_value.shape}".encode()
                yield value.const_value.tobytes()


def _update(update: Callable[[Any], None], value: Any) -> None:
    if isinstance(value, np.ndarray):
        update(f"{value.dtype}{value.shape}".encode())
        update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list):
        for item in value:
            _update(update, item)
    else:
        update(repr(value).encode())
