"""Values inside a model, shown to observers sample by sample."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.calibrate import collector
from onnxopt.calibrate.collector import calibration

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2] x) => (float[N, 2] y) {
  a = Neg(x)
  b = Exp(a)
  y = Relu(b)
}
"""


class Kept:
    """Keeps copies of what it sees."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> None:
        self.seen.append(array.copy())


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.full((1, 2), float(i), np.float32)} for i in range(count)]


def test_inputs_inner_values_and_outputs_are_shown_once_per_sample() -> None:
    seen = {name: Kept() for name in ("x", "a", "b", "y")}
    found = calibration(feeds(3), real=True)
    found.observe(ir.from_onnx_text(MODEL), {name: [kept] for name, kept in seen.items()})
    assert found.samples == 3
    for kept in seen.values():
        assert len(kept.seen) == 3
    x = np.concatenate(seen["x"].seen)
    np.testing.assert_array_equal(np.concatenate(seen["a"].seen), -x)
    np.testing.assert_allclose(np.concatenate(seen["b"].seen), np.exp(-x), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(seen["y"].seen), np.exp(-x), rtol=1e-5)


def test_the_model_is_not_changed() -> None:
    model = ir.from_onnx_text(MODEL)
    before = ir.to_proto(model).SerializeToString()
    calibration(feeds(1), real=True).observe(model, {"b": [Kept()]})
    assert ir.to_proto(model).SerializeToString() == before


def test_what_does_not_fit_is_fetched_in_further_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "FETCH_BYTES", 8)
    monkeypatch.setattr(collector, "FIRST_FETCH", 1)
    seen = {name: Kept() for name in ("a", "b")}
    calibration(feeds(2), real=True).observe(ir.from_onnx_text(MODEL), {n: [k] for n, k in seen.items()})
    assert [len(kept.seen) for kept in seen.values()] == [2, 2]
    assert list(collector._portions(["a", "b"], {"a": 8, "b": 8})) == [["a"], ["b"]]


def test_unknown_values_are_named() -> None:
    with pytest.raises(ValueError, match='computes no value "nowhere"'):
        calibration(feeds(1), real=True).observe(ir.from_onnx_text(MODEL), {"nowhere": [Kept()]})
