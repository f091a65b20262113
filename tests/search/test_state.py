"""What is remembered comes back as it was, or not at all."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.contract import Site
from onnxopt.errors import OutputError
from onnxopt.metrics import MetricResult
from onnxopt.report.data import FloatLayer
from onnxopt.search.decision import Record, Speed
from onnxopt.search.state import State, fingerprint

RECORD = Record(
    "static int8",
    "quantize-static",
    bytes=12345,
    speed=Speed(0.4, 0.39, math.inf, 1),
    worst=math.inf,
    metric=MetricResult("top1", 1.0, 0.9, 0.1, -math.inf, math.inf, 50, False),
    in_float=(FloatLayer("", "conv", "it costs most"),),
)
SPARED = {Site("quantize-static", "If_3.then_branch", "conv"): "it costs most"}


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    state = State(path, "key")
    assert state.record("a") is None
    state.remember("a", RECORD, SPARED)
    state.remember("b", Record("b", "p", failure="crashed"), {})
    again = State(path, "key")
    assert again.record("a") == RECORD
    assert again.spared("a") == SPARED
    assert again.record("b") == Record("b", "p", failure="crashed")
    assert again.spared("b") == {}
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"], "no temporary file is left"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 0, "key": "key", "records": {}}'])
def test_damaged_files_are_started_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    state = State(path, "key")
    assert state.record("a") is None
    state.remember("a", RECORD, {})
    assert State(path, "key").record("a") == RECORD


def test_a_file_that_cannot_be_written_is_said_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="The state of the search cannot be kept: .* cannot be written"):
        State(tmp_path / "missing" / "s.json", "key")


def test_without_a_path_nothing_is_written() -> None:
    state = State(None, "key")
    state.remember("a", RECORD, {})
    assert state.record("a") == RECORD


def model(weight: float = 1.0, op: str = "Add") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) <float[2] w = {{{weight}, 2}}> '
        f"{{ y = {op}(x, w) }}"
    )


@dataclasses.dataclass(frozen=True)
class Options:
    threads: int = 1


def test_the_fingerprint_depends_on_model_data_labels_and_options() -> None:
    feeds = [{"x": np.array([1, 2], np.float32)}, {"x": np.array([3, 4], np.float32)}]
    labels = np.array([0, 1])
    base = fingerprint(model(), feeds, labels, Options())
    assert base == fingerprint(model(), feeds, labels, Options())
    others = [
        fingerprint(model(1.5), feeds, labels, Options()),
        fingerprint(model(op="Mul"), feeds, labels, Options()),
        fingerprint(model(), feeds[:1], labels, Options()),
        fingerprint(model(), feeds[::-1], labels, Options()),
        fingerprint(model(), [{"x": f["x"].astype(np.float64)} for f in feeds], labels, Options()),
        fingerprint(model(), feeds, None, Options()),
        fingerprint(model(), feeds, labels[::-1], Options()),
        fingerprint(model(), feeds, labels, Options(2)),
    ]
    assert len({base, *others}) == 9


def test_text_and_sequences_have_a_fingerprint() -> None:
    one = fingerprint(
        model(), [{"x": np.array(["a", "bc"], object), "s": [np.ones(2), np.ones(3)], "o": None}], None, ()
    )
    two = fingerprint(
        model(), [{"x": np.array(["ab", "c"], object), "s": [np.ones(2), np.ones(3)], "o": None}], None, ()
    )
    assert one != two
