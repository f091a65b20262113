"""Two models run stop by stop: the same values as from the whole models, from parts of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.calibrate import walk
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import Stop

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x, bool c) => (float[N, 4] y) {
  k = Transpose(w1)
  a = MatMul(x, w0)
  s = Shape(a)
  b = MatMul(a, k)
  d = If (c) <
    then_branch = t () => (float[N, 4] r) { r = Add(b, a) },
    else_branch = e () => (float[N, 4] r) { r = Identity(a) }
  >
  e = Reshape(d, s)
  f = MatMul(e, w2)
  g = Add(f, e)
  h, m = TopK<axis = 1>(g, four)
  y = MatMul(h, w3)
}
"""
STOPS = [
    Stop(("a",), ("x", "a"), ("a",)),
    Stop(("b",), ("a", "b"), ("b",)),
    Stop(("g",), ("e", "f", "g"), ("f",)),
    Stop(("y",), ("h", "y"), ("y",)),
]
Seen = list[tuple[list[np.ndarray], list[np.ndarray]]]


class Kept:
    """Keeps copies of what it sees of two models."""

    def __init__(self, stop: Stop) -> None:
        self.reference, self.changed = stop.reference, stop.changed
        self.seen: Seen = []

    def add(self, reference: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> None:
        self.seen.append(([a.copy() for a in reference], [a.copy() for a in changed]))


def build() -> ir.Model:
    proto = onnx.parser.parse_model(MODEL)
    rng = np.random.default_rng(0)
    for i in range(4):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), f"w{i}")
        )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([4]), "four"))
    return ir.from_proto(proto)


def double(model: ir.Model, weight: str) -> None:
    value = model.graph.initializers[weight]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 2, name=weight)


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(i + 1, 4)).astype(np.float32), "c": np.array(i % 2 == 0)} for i in range(count)]


def both_ways() -> Iterator[tuple[Seen, Seen]]:
    """Yield what is seen at each stop, by the walk and by running the whole models."""
    original, model = build(), build()
    double(model, "w0")
    found = calibration(samples(), real=True)
    show = found.walk_both(original, model, STOPS)
    for index, stop in enumerate(STOPS):
        kept, whole = Kept(stop), Kept(stop)
        show([kept])
        found.observe_both(original, model, [whole])
        yield kept.seen, whole.seen
        double(model, f"w{index}")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list to which the operators of every model are added that the walk opens."""
    opened, open_session = [], walk.open_session

    def spy(model: ir.Model, *args: Any, **options: Any) -> object:
        opened.append([node.op_type for node in model.graph])
        return open_session(model, *args, **options)

    monkeypatch.setattr(walk, "open_session", spy)
    return opened


def assert_equal(walked: Seen, whole: Seen) -> None:
    assert len(walked) == len(whole) == 3
    for one, two in zip(walked, whole, strict=True):
        for left, right in zip(one, two, strict=True):
            for a, b in zip(left, right, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_parts_compute_what_the_whole_models_do_while_one_changes(sizes: list[list[str]]) -> None:
    for walked, whole in both_ways():
        assert_equal(walked, whole)
    original, changed = sizes[::2], sizes[1::2]
    assert original == [
        ["MatMul"],
        ["Transpose", "MatMul"],
        ["Shape", "If", "Reshape", "MatMul", "Add"],
        ["TopK", "MatMul"],
    ]
    # What a stop replaces, and what is behind it, runs again in the next part.
    assert changed == [
        ["MatMul"],
        ["Transpose", "MatMul", "MatMul"],
        ["Transpose", "Shape", "MatMul", "If", "Reshape", "MatMul", "Add"],
        ["MatMul", "Add", "TopK", "MatMul"],
    ]  # fmt: skip


def test_what_does_not_fit_into_memory_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, sizes: list[list[str]]
) -> None:
    monkeypatch.setattr(walk, "CUT_BYTES", 40)
    for walked, whole in both_ways():
        assert_equal(walked, whole)
    assert sizes[-2].count("MatMul") == 4


def test_values_that_are_no_tensors_do_not_cross() -> None:
    text = """
<ir_version: 8, opset_import: ["": 17]>
g (float[2, 4] x) => (float[1, 4] y) {
  a = Neg(x)
  s = SplitToSequence<axis = 0>(a)
  b = SequenceAt(s, zero)
  y = SequenceAt(s, one)
}
"""
    proto = onnx.parser.parse_model(text)
    for name, number in (("zero", 0), ("one", 1)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number), name))
    model = ir.from_proto(proto)
    stops = [Stop(("b",), ("b",), ()), Stop(("y",), ("y",), ())]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    show = calibration([{"x": x}], real=True).walk_both(model, model, stops)
    for index, stop in enumerate(stops):
        kept = Kept(stop)
        show([kept])
        for (value,) in kept.seen[0]:
            np.testing.assert_array_equal(value, -x[index : index + 1])


def test_unknown_values_are_named() -> None:
    model = build()
    for stop in (Stop(("nowhere",), ("x",), ()), Stop(("x",), ("nowhere",), ())):
        with pytest.raises(ValueError, match='computes no value "nowhere"'):
            calibration(samples(), real=True).walk_both(model, model, [stop])([])
