"""The direct way to a quantized model."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxopt
from onnxopt.errors import NothingDoneError, UsageError
from onnxopt.graph import all_nodes
from onnxopt.measure import Measurement
from onnxopt.pipeline import Pipeline
from onnxopt.quantize import _WAYS, MODES, Scheme

CNN = Path(__file__).parent.parent / "models" / "mnist_cnn_bn.onnx"


def integers(result: onnxopt.Result) -> set[str]:
    """Return the names of the 8-bit constants without their endings."""
    return {
        (v.name or "").removesuffix("_int8")
        for v in result.model.graph.initializers.values()
        if v.dtype is not None and v.dtype.name == "INT8"
    }


def quantize(model: Any = CNN, **options: Any) -> onnxopt.Result:
    return onnxopt.quantize(model, **({"mode": "weights", "measure": False} | options))


def test_weights() -> None:
    result = quantize()
    assert result.report.passes[-1].name == "quantize-weights"
    assert result.report.recipe == "quantize weights"
    assert result.report.after.bytes < 0.3 * result.report.before.bytes
    assert result.report.verification is not None and result.report.verification.ok


def test_the_lossless_recipe_comes_first_unless_told_otherwise() -> None:
    assert "BatchNormalization" not in {n.op_type for n in all_nodes(quantize().model)}
    plain = quantize(simplify=False)
    assert [p.name for p in plain.report.passes] == ["quantize-weights"]
    assert "BatchNormalization" in {n.op_type for n in all_nodes(plain.model)}


def test_exclude_and_only_leave_layers_alone() -> None:
    everything = integers(quantize())
    without = integers(quantize(exclude=["conv3*"]))
    assert everything - without == {"conv3.weight_bn"}
    assert integers(quantize(only=["dense*"])) == {name for name in everything if name.startswith("dense")}


def test_what_was_spared_is_told_and_does_not_count_as_dropped() -> None:
    report = quantize(exclude=["conv3*"]).report
    assert dict(report.passes[-1].refusals)["it was to be left alone (exclude)"] == 1
    assert report.dropped == 0


def test_a_pattern_that_fits_nothing_offers_names() -> None:
    with pytest.raises(UsageError, match=r'called "conv4\.weight"\. Near it are: conv'):
        quantize(exclude=["conv4.weight"])


def test_nothing_to_quantize_is_an_error_with_the_reason() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { y = Neg(x) }'
    )
    with pytest.raises(NothingDoneError, match="Nothing was quantized: quantize-weights: the model has nothing"):
        quantize(model)
    with pytest.raises(NothingDoneError, match="near misses, because others were to be changed"):
        quantize(only=["logits"], simplify=False, exclude=["dense2*"])


def test_a_budget_holds_layers_back() -> None:
    with pytest.raises(NothingDoneError, match="edits were dropped, the last because"):
        quantize(max_error=1e-6)


def test_a_slower_result_is_kept_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    home = importlib.import_module("onnxopt.ground")
    honest = home.measure_models

    def slow(*args: Any, **kwargs: Any) -> Measurement:
        found = honest(*args, **(kwargs | {"budget_seconds": 0.1}))
        return dataclasses.replace(found, ratio=2.0, low=1.9, high=2.1, verdict="slower")

    monkeypatch.setattr(home, "measure_models", slow)
    result = quantize(measure=True)
    assert result.report.passes[-1].applied
    assert result.report.slow_passes == ()
    assert "SLOWER THAN THE ORIGINAL: 2.00x slower" in str(result.report)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mode": "statc"}, 'no mode "statc". Did you mean "static"'),
        ({"mode": "float16", "bits": 4}, "bits is for mode weights or matmul; leave it out with mode"),
        ({"mode": "weights", "ranges": "mse"}, "ranges is for mode static"),
        ({"mode": "float16", "granularity": "channel"}, "granularity is for mode weights"),
        ({"mode": "matmul", "smooth": True}, "smooth is for mode dynamic"),
        ({"mode": "weights", "smooth": False}, "smooth is for mode dynamic"),
        ({"mode": "weights", "block": 32, "granularity": "channel"}, "give one of them"),
        ({"mode": "fp16-storage", "method": "gptq"}, "method is for mode weights or matmul"),
    ],
)
def test_wrong_combinations_get_a_sentence(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Scheme(**options)


def test_a_scheme_is_a_pipeline() -> None:
    pipeline = Scheme(mode="weights", granularity="tensor").pipeline("portable", simplify=False, data=False)
    assert str(pipeline) == "quantize-weights{granularity=tensor}"
    full = Scheme(mode="weights").pipeline("portable", simplify=True, data=False)
    assert str(full) == f"{Pipeline.recipe('lossless')},quantize-weights"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_a_pass(mode: Any) -> None:
    pipeline = Scheme(mode=mode).pipeline("cpu", simplify=False, data=False)
    assert _WAYS[mode].pass_name in [p.name for p in pipeline.passes]


def test_what_is_to_learn_from_generated_inputs_does_so_though_nothing_is_verified() -> None:
    result = onnxopt.optimize(
        CNN, passes="quantize-static", force_calibration=True, verify=False, measure=False, max_error=np.inf
    )
    assert result.report.passes[-1].applied


def test_the_model_given_is_not_changed() -> None:
    model = onnxopt.load(CNN)
    before = {name: v.const_value for name, v in model.graph.initializers.items()}
    result = quantize(model, seed=1, data=None)
    assert result.model is not model
    assert {name: v.const_value for name, v in model.graph.initializers.items()} == before
    assert np.isfinite(result.report.verification.worst)  # type: ignore[union-attr]
