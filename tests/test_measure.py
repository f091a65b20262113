"""Measuring real sessions: large effects only, so that a busy machine cannot make these fail."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.errors import DataError, UsageError
from onnxopt.measure import Measurement, bench, measure
from onnxopt.runtime import RunOptions

FOUND = Measurement(
    ratio=0.8,
    low=0.78,
    high=0.82,
    verdict="faster",
    rounds=40,
    baseline_ms=5.0,
    candidate_ms=4.0,
    baseline_load_ms=10.0,
    candidate_load_ms=9.0,
    baseline_peak_mb=30.0,
    candidate_peak_mb=None,
    threads=1,
    provider="cpu",
    placement={"CPUExecutionProvider": 3},
    elsewhere=(),
    sessions=5,
)


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict", "words"),
    [
        (0.8130, 0.794, 0.833, "faster", "1.23x faster (95% interval 1.20-1.26)"),
        (1.25, 1.2, 1.31, "slower", "1.25x slower (95% interval 1.20-1.31)"),
        (1.001, 0.99, 1.02, "no difference shown", "no difference shown (0.99-1.02)"),
    ],
)
def test_the_sentence(ratio: float, low: float, high: float, verdict: Any, words: str) -> None:
    found = dataclasses.replace(FOUND, ratio=ratio, low=low, high=high, verdict=verdict)
    assert found.sentence() == words


def chain(length: int) -> ir.Model:
    """Return a model that multiplies by an orthogonal matrix, and then by it again and again, to no effect."""
    swap = np.eye(192, dtype=np.float32)[::-1].copy()
    weight = ir.tensor(swap, name="w")
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([192, 192]), const_value=weight)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 192]))
    nodes, value = [], x
    for number in range(length):
        nodes.append(ir.node("MatMul", [value, w], name=f"n{number}"))
        value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = f"v{number}", x.type, x.shape
    graph = ir.Graph([x], [value], nodes=nodes, initializers=[w], opset_imports={"": 17}, name="g")
    value.name = "y"
    return ir.Model(graph, ir_version=8)


FEED = {"x": np.ones((16, 192), np.float32)}


def test_a_slow_candidate_is_called_slower_and_a_fast_one_faster() -> None:
    slower = measure(chain(1), chain(41), feed=FEED, budget_seconds=1.0, precision=1.0, memory=False)
    assert slower.verdict == "slower"
    assert 1 < slower.low <= slower.ratio <= slower.high
    assert slower.ratio > 5
    assert slower.sentence().split(" (")[0] == f"{slower.ratio:.2f}x slower"
    faster = measure(chain(41), chain(1), feed=FEED, budget_seconds=1.0, precision=1.0, memory=False)
    assert faster.verdict == "faster"
    assert faster.baseline_ms > faster.candidate_ms > 0


def test_a_measurement_says_how_it_came_about(tmp_path: Path) -> None:
    stages: list[str] = []

    class Listener:
        def stage(self, text: str, total: int | None = None) -> None:
            stages.append(text)

        def advance(self, steps: int = 1) -> None:
            stages.append("+")

    path = tmp_path / "a.onnx"
    ir.save(chain(2), path)
    found = measure(path, chain(2), feed=FEED, budget_seconds=0.01, options=RunOptions(threads=2), progress=Listener())
    assert (found.threads, found.provider, found.placement, found.elsewhere) == (
        2,
        "cpu",
        {"CPUExecutionProvider": 2},
        (),
    )
    assert found.sessions == 2
    assert found.rounds >= 4
    assert found.baseline_load_ms > 0
    assert found.candidate_load_ms > 0
    assert stages == ["measuring", "+", "measuring memory"]
    for peak in (found.baseline_peak_mb, found.candidate_peak_mb):
        assert peak is None or peak > 0


def test_it_stops_when_the_interval_is_narrow_enough() -> None:
    found = measure(chain(1), chain(1), feed=FEED, budget_seconds=60.0, precision=100.0, memory=False)
    assert found.sessions == 4


def test_feeds_are_generated() -> None:
    found = measure(chain(1), chain(1), budget_seconds=0.01, shape={"N": 3}, memory=False)
    assert found.rounds >= 4


def test_models_that_need_different_inputs_are_an_error(tmp_path: Path) -> None:
    other = chain(1)
    other.graph.inputs[0].name = "z"
    with pytest.raises(DataError, match='the baseline needs the input "x", which the candidate lacks'):
        measure(chain(1), other, feed=FEED, budget_seconds=0.01)
    more = chain(1)
    more.graph.inputs.append(ir.val("z", ir.DataType.FLOAT, [1]))
    path = tmp_path / "more.onnx"
    ir.save(more, path)
    with pytest.raises(DataError, match='more.onnx needs the input "z", which the baseline lacks'):
        measure(chain(1), path, feed=FEED, budget_seconds=0.01)


def test_unknown_providers_are_errors() -> None:
    with pytest.raises(UsageError, match="cpu"):
        measure(chain(1), chain(1), feed=FEED, options=RunOptions(provider="gpu3000"))


def test_one_model_alone() -> None:
    found = bench(chain(3), feed=FEED, budget_seconds=0.05)
    assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms
    assert found.per_second > 0
    assert found.runs >= 10
    assert found.load_ms > 0
    assert found.placement == {"CPUExecutionProvider": 3}
    assert found.sentence().endswith("runs per second")


# ---------------------------------------------------------------------------------------------------- benchmarks/aa.py


def aa() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "aa.py"
    spec = importlib.util.spec_from_file_location("aa", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("wrong", "status"), [(1, 0), (2, 1)])
def test_the_aa_benchmark_counts_what_is_called_different(
    wrong: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of twenty comparisons may call a difference, two may not."""
    benchmark = aa()
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        ir.save(chain(1), path)
    same = dataclasses.replace(FOUND, ratio=1.0, low=0.99, high=1.01, verdict="no difference shown")
    results = iter([FOUND] * wrong + [same] * 20)
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: next(results))
    monkeypatch.setattr("sys.argv", ["aa.py", *map(str, paths), "--comparisons", "20"])
    assert benchmark.main() == status
    assert f"A/A: {wrong} of 20 comparisons of a model with itself call a difference" in capsys.readouterr().out
