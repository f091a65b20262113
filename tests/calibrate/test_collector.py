"""Values inside a model, shown to observers sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.calibrate import beside, collector
from onnxopt.calibrate.collector import calibration
from onnxopt.calibrate.watched import Watched, only

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


def test_outputs_need_no_node() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y, float[2] w) <float[2] w = {1, 2}> '
        "{ y = Add(x, w) }"
    )
    kept = {"y": Kept(), "w": Kept()}
    data = [{"x": np.ones(2, np.float32)}]
    calibration(data, real=True).observe(model, {name: [k] for name, k in kept.items()})
    assert [k.seen[0].tolist() for k in kept.values()] == [[2, 3], [1, 2]]


def test_unknown_values_are_named() -> None:
    with pytest.raises(ValueError, match='computes no value "nowhere"'):
        calibration(feeds(1), real=True).observe(ir.from_onnx_text(MODEL), {"nowhere": [Kept()]})


class Pairs:
    """Keeps copies of what it sees of two models."""

    def __init__(self, reference: tuple[str, ...], changed: tuple[str, ...]) -> None:
        self.reference, self.changed = reference, changed
        self.seen: list[tuple[list[np.ndarray], list[np.ndarray]]] = []

    def add(self, reference: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> None:
        self.seen.append(([a.copy() for a in reference], [a.copy() for a in changed]))


def test_two_models_run_in_step() -> None:
    pairs, inputs = Pairs(("a", "x"), ("b", "y")), Pairs(("x",), ("x",))
    changed = ir.from_onnx_text(MODEL.replace("Neg", "Identity"))
    calibration(feeds(3), real=True).observe_both(ir.from_onnx_text(MODEL), changed, [pairs, inputs])
    assert len(pairs.seen) == len(inputs.seen) == 3
    for i, ((a, x), (b, y)) in enumerate(pairs.seen):
        np.testing.assert_array_equal(x, np.full((1, 2), i))
        np.testing.assert_array_equal(a, -x)
        np.testing.assert_allclose(b, np.exp(x), rtol=1e-5)
        np.testing.assert_allclose(y, np.exp(x), rtol=1e-5)


def test_only_what_is_looked_at_is_computed() -> None:
    branches = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2] x, bool c) => (float[N, 2] y) {
  a = Neg(x)
  b = Mul(a, two)
  d = If (c) <
    then_branch = t () => (float[N, 2] r) { r = Mul(a, w) },
    else_branch = e () => (float[N, 2] r) { r = Identity(a) }
  >
  y = Relu(d)
}
"""
    proto = onnx.parser.parse_model(branches)
    for name in ("two", "w"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(2, 2, np.float32), name))
    model = ir.from_proto(proto)

    def left(*names: str) -> tuple[list[str], set[str]]:
        made = only(model, names)
        return [n.op_type for n in made.graph], set(made.graph.initializers)

    assert left("b") == (["Neg", "Mul"], {"two"})
    assert left("d") == (["Neg", "If"], {"w"})
    pairs, samples = Pairs(("d",), ("b",)), [{"x": np.ones((1, 2), np.float32), "c": np.array(True)}]
    calibration(samples, real=True).observe_both(model, model, [pairs])
    np.testing.assert_array_equal(pairs.seen[0][0][0], -2 * np.ones((1, 2)))


def test_unknown_values_of_either_model_are_named() -> None:
    model, found = ir.from_onnx_text(MODEL), calibration(feeds(1), real=True)
    for pair in (Pairs(("nowhere",), ("x",)), Pairs(("x",), ("nowhere",))):
        with pytest.raises(ValueError, match='computes no value "nowhere"'):
            found.observe_both(model, model, [pair])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Notes which values were computed, run by run."""
    noted: list[list[str]] = []
    values = Watched.values

    def noting(self: Watched, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        noted.append(self.names)
        return values(self, feed)

    monkeypatch.setattr(Watched, "values", noting)
    return noted


def changed(op_type: str) -> ir.Model:
    return ir.from_onnx_text(MODEL.replace("Neg", op_type))


def test_many_models_are_shown_beside_one_reference_which_runs_once(runs: list[list[str]]) -> None:
    show = calibration(feeds(4), real=True).observe_beside(ir.from_onnx_text(MODEL), ["a"])
    for op_type, factor in (("Identity", 1), ("Abs", 1), ("Neg", -1)):
        pairs = Pairs(("a",), ("b",))
        show(changed(op_type), [pairs], range(1, 3))
        for i, ((a,), (b,)) in zip((1, 2), pairs.seen, strict=True):
            np.testing.assert_array_equal(a, np.full((1, 2), -i))
            np.testing.assert_allclose(b, np.full((1, 2), np.exp(factor * i)), rtol=1e-5)
    assert runs.count(["a"]) == 2
    assert runs.count(["b"]) == 6


def test_samples_that_were_not_asked_for_are_not_run(runs: list[list[str]]) -> None:
    show = calibration(feeds(8), real=True).observe_beside(ir.from_onnx_text(MODEL), ["a"])
    first, second = Pairs(("a",), ("a",)), Pairs(("a",), ("a",))
    show(changed("Neg"), [first], (5, 2))
    show(changed("Neg"), [second], (2, 3, 5))
    assert [-int(before[0].max()) for before, _ in first.seen] == [2, 5]
    assert [-int(before[0].max()) for before, _ in second.seen] == [2, 3, 5]
    assert len(runs) == 3 + 5  # of the reference 2, 5 and then 3; of the others all


def test_of_the_reference_only_so_much_is_kept(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "KEPT_BYTES", 20)  # two samples of 8 bytes
    show = calibration(feeds(4), real=True).observe_beside(ir.from_onnx_text(MODEL), ["a"])
    for _ in range(3):
        pairs = Pairs(("a",), ("b",))
        show(changed("Identity"), [pairs], range(4))
        assert [-int(before[0].max()) for before, _ in pairs.seen] == [0, 1, 2, 3]
    assert runs.count(["a"]) == 2 + 3 * 2
