"""Whether pruning is to be recommended, against quantization alone."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import onnxopt
from onnxopt.cli import cli
from onnxopt.metrics import MetricResult
from onnxopt.search import lab
from onnxopt.search.decision import Record, Speed
from onnxopt.search.rivals import strongest, unrivalled, verdict

MODELS = Path(__file__).parents[2] / "models"


def record(name: str, ratio: float, drop: float, **changes: Any) -> Record:
    metric = MetricResult("top1", 1.0, 1.0 - drop, drop, drop - 0.005, drop + 0.005, samples=100, labelled=False)
    plain = {"speed": Speed(ratio, ratio - 0.02, ratio + 0.02, effort=0), "metric": metric, "worst": drop}
    return Record(name, "passes", **(plain | changes))


OWN = record("this result", 0.6, 0.05)


@pytest.mark.parametrize(
    ("ratio", "drop", "against", "said"),
    [
        (0.5, 0.01, 1.2, "Pruning is not to be recommended here: quantization alone is faster and closer"),
        (0.5, 0.05, 1.2, "not to be recommended here: quantization alone is faster, and no difference in quality"),
        (0.6, 0.01, 1.0, "not to be recommended here: quantization alone is closer to the original, and no difference"),
        (0.6, 0.05, 1.0, "of the two, that is the simpler one"),
        (0.9, 0.09, 0.7, "Pruning pays here: it is faster than quantization alone, and closer"),
        (0.9, 0.05, 0.7, "Pruning pays here: it is faster than quantization alone, and no difference in quality"),
        (0.6, 0.09, 1.0, "Pruning pays here: it is closer to the original than quantization alone, and as fast"),
        (0.5, 0.09, 1.2, "Quantization alone is faster, and this result closer to the original"),
        (0.9, 0.01, 0.7, "Pruned, it is faster than with quantization alone, which is closer"),
    ],
)
def test_it_is_recommended_where_it_is_better_at_something_and_worse_at_nothing(
    ratio: float, drop: float, against: float, said: str
) -> None:
    told = verdict(OWN, record("int8", ratio, drop), Speed(against, against - 0.05, against + 0.05, effort=1))
    assert said in told
    assert f"int8: {1 / ratio:.2f}x as fast as the original, top1 drops by {drop:.2g} (95% interval" in told


def test_without_a_metric_the_worst_deviation_decides() -> None:
    own, rival = (record(name, 0.6, drop, metric=None) for name, drop in (("own", 0.2), ("int8", 0.19)))
    equal = Speed(1.0, 0.95, 1.05, effort=1)
    assert "No difference from quantization alone" in verdict(own, rival, equal)
    told = verdict(own, record("int8", 0.6, 0.17, metric=None), equal)
    assert "outputs deviate by up to 1.7e-01 of their range" in told
    assert "quantization alone is closer" in told


def test_the_rival_is_the_one_that_speaks_most_against_pruning() -> None:
    better, faster, like = record("better", 0.55, 0.02), record("faster", 0.4, 0.2), record("like", 0.6, 0.05)
    assert strongest(OWN, [like, faster, better]) is better
    assert strongest(OWN, [like, faster]) is faster
    assert strongest(OWN, [like]) is like


def test_what_fails_or_is_slower_is_no_rival_and_is_told() -> None:
    none = [record("slower", 1.1, 0.0), record("failed", 0.1, 0.0, failure="it crashed")]
    assert strongest(OWN, none) is None
    told = "Quantization alone is no alternative here (slower: slower than the original; failed: it crashed)."
    assert unrivalled(none) == told
    nothing = dataclasses.replace(record("nothing", 1.0, 0.0, failure="it has no layers"), applies=False)
    assert unrivalled([*none, nothing]) == told
    assert unrivalled([nothing]).startswith("There is no way to quantize")


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = onnxopt.measure

    def short(*models: Any, **options: Any) -> Any:
        return measure(*models, **(options | {"budget_seconds": 0.2, "memory": False}))

    monkeypatch.setattr(importlib.import_module("onnxopt.ground"), "measure_models", short)
    monkeypatch.setattr(lab, "measure", short)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("data", [True, False])
def test_a_pruned_model_is_compared_where_there_is_data(tmp_path: Path, *, data: bool) -> None:
    images = np.load(MODELS / "mnist_calibration.npz")["image"][:64]
    np.savez(tmp_path / "images.npz", image=images)
    given = ["--data", tmp_path / "images.npz"] if data else []
    model, passes = MODELS / "mnist_cnn.onnx", "prune-channels{ratio=0.5}"
    told = ["--report", tmp_path / "report.json"]
    arguments = [
        "optimize",
        model,
        "-o",
        tmp_path / "out.onnx",
        "--passes",
        passes,
        "--max-error",
        "inf",
        *given,
        *told,
    ]
    result = CliRunner().invoke(cli, [str(a) for a in arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert ("Tried for comparison without pruning, " in result.output) is data
    assert ("top1 drops by" in result.output) is data
    found = json.loads((tmp_path / "report.json").read_text())["alone"]
    assert (found is not None) is data
    if data:
        assert found["rival"] in {rival["name"] for rival in found["rivals"]}
        assert found["low"] <= found["ratio"] <= found["high"]
        assert found["result"]["pipeline"] == passes
        assert found["result"]["bytes"] > 0
        assert found["verdict"] in " ".join(result.output.split())
