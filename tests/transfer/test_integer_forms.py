"""Forms that compute with integers: the same network, whatever quantized it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import onnxopt
from onnxopt.graph import constant_array
from onnxopt.numeric import adjacent
from onnxopt.transfer.to_real import in_real_numbers

from .conftest import build, outputs

NET = """
g (float[2, 3, 8, 8] x) => (float[2, 10] y) {
    a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, first, first_bias)  b = Relu(a)
    c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)
    d = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(c, second, second_bias)  e = Add(c, d)  f = Relu(e)
    p = GlobalAveragePool(f)  h = Flatten(p)  y = Gemm<transB = 1>(h, last, last_bias)
}
"""
NET_WEIGHTS = {
    "first": (16, 3, 3, 3),
    "first_bias": (16,),
    "second": (16, 16, 3, 3),
    "second_bias": (16,),
    "last": (10, 16),
    "last_bias": (10,),
}
TEXT = """
g (int64[2, 5] ids) => (float[2, 5, 12] y) {
    a = Gather(table, ids)  b = LayerNormalization(a, norm, norm_bias)
    c = MatMul(b, up)  d = Add(c, up_bias)  e = Sigmoid(d)  f = Mul(d, e)  h = MatMul(f, down)  y = Add(h, b)
}
"""
TEXT_WEIGHTS = {"table": (4, 12), "norm": (12,), "norm_bias": (12,), "up": (12, 48), "up_bias": (48,), "down": (48, 12)}
MODELS = {"net": (NET, NET_WEIGHTS), "text": (TEXT, TEXT_WEIGHTS)}


class Feeds(CalibrationDataReader):
    """Four samples like those that outputs are compared on."""

    def __init__(self, model: onnx.ModelProto) -> None:
        name = model.graph.input[0].name
        random = np.random.default_rng(0)
        if name == "ids":
            self._feeds: Iterator[dict[str, np.ndarray]] = iter([{name: random.integers(0, 4, (2, 5))}] * 4)
        else:
            drawn = [random.normal(0, 1, (2, 3, 8, 8)).astype(np.float32) for _ in range(4)]
            self._feeds = iter([{name: array} for array in drawn])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy for the quantizer, which empties what it is given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _static(form: QuantFormat, activations: QuantType, per_channel: bool) -> Callable[[onnx.ModelProto, str], None]:
    def quantize(model: onnx.ModelProto, path: str) -> None:
        quantize_static(
            _copy(model), path, Feeds(model), form, per_channel=per_channel, activation_type=activations,
            weight_type=QuantType.QInt8,
        )  # fmt: skip

    return quantize


FORMS: dict[str, Callable[[onnx.ModelProto, str], None]] = {
    "dynamic": lambda model, path: quantize_dynamic(_copy(model), path, weight_type=QuantType.QUInt8),
    "pairs": _static(QuantFormat.QDQ, QuantType.QUInt8, False),
    "pairs per channel": _static(QuantFormat.QDQ, QuantType.QInt8, True),
    "operators": _static(QuantFormat.QOperator, QuantType.QUInt8, False),
    "operators per channel": _static(QuantFormat.QOperator, QuantType.QUInt8, True),
}


def _deviation(first: onnx.ModelProto, second: object) -> float:
    expected, found = outputs(first)[0], outputs(second)[0]
    return float(np.abs(expected - found).max() / np.ptp(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_forms_of_the_runtime(name: str, form: str, tmp_path: Path) -> None:
    """All parameters move into what ONNX Runtime makes of a model, and back, and land where they belong."""
    text, weights = MODELS[name]
    source, other = build(text, weights, 1), build(text, weights, 2)
    path = str(tmp_path / "integers.onnx")
    FORMS[form](other, path)
    real = in_real_numbers(onnxopt.load(path)).model
    assert not [n for n in real.graph if n.op_type.startswith(("Q", "Dynamic")) or "Integer" in n.op_type]
    assert _deviation(other, real) < 0.03
    there = onnxopt.transfer(source, path)
    assert there.coverage == 1
    assert there.certificate is not None
    assert there.certificate.verdict == "close"
    assert _deviation(source, there.model) < 0.1
    assert _deviation(source, other) > 0.3
    back = onnxopt.transfer(there.model, build(text, weights, 3))
    assert back.coverage == 1
    assert back.certificate is not None
    assert back.certificate.verdict == "close"
    assert _deviation(source, back.model) < 0.05


def test_a_recurrent_layer_behind_a_table(tmp_path: Path) -> None:
    """The table's rows are turned as integers; the weights of an LSTM are stored transposed, a scale per direction."""
    text = """
    g (int64[2, 5] ids) => (float[5, 1, 2, 8] y) {
        a = Gather(table, ids)  b = Transpose<perm = [1, 0, 2]>(a)  y = LSTM<hidden_size = 8>(b, w, r, bias)
    }
    """
    weights = {"table": (4, 12), "w": (1, 32, 12), "r": (1, 32, 8), "bias": (1, 64)}
    source, other = build(text, weights, 1), build(text, weights, 2)
    path = str(tmp_path / "integers.onnx")
    FORMS["dynamic"](other, path)
    assert "DynamicQuantizeLSTM" in {n.op_type for n in onnx.load(path).graph.node}
    for one, two in ((source, path), (path, source)):
        result = onnxopt.transfer(one, two)
        assert result.coverage == 1
        assert result.certificate is not None
        assert result.certificate.verdict == "close"


def test_a_bias_in_sums_follows_the_scale_of_its_weight(tmp_path: Path) -> None:
    """The step of a bias of 32 bits is that of the input times that of the weight, which a transfer changes."""
    source, path = build(NET, {**NET_WEIGHTS, "first": (16, 3, 3, 3)}, 1), str(tmp_path / "pairs.onnx")
    wide = build(NET, NET_WEIGHTS, 2)
    for tensor in wide.graph.initializer:
        if tensor.name == "first":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 7, "first"))
    FORMS["pairs per channel"](wide, path)
    result = onnxopt.transfer(source, path)
    found = {n: v.const_value.numpy() for n, v in result.model.graph.initializers.items()}
    np.testing.assert_allclose(
        found["first_bias_quantized_scale"].reshape(-1), found["x_scale"] * found["first_scale"].reshape(-1), rtol=1e-6
    )
    bias = found["first_bias_quantized"].astype(np.float64) * found["first_bias_quantized_scale"].reshape(-1)
    expected = next(onnx.numpy_helper.to_array(t) for t in source.graph.initializer if t.name == "first_bias")
    np.testing.assert_allclose(bias, expected, atol=float(found["first_bias_quantized_scale"].max()))


@pytest.mark.parametrize("form", ["pairs", "operators"])
def test_ranges_of_activations_follow(form: str, tmp_path: Path) -> None:
    """Calibrated with other parameters, grids would cut off what those of the source make of the same inputs."""
    wide = {
        n: np.random.default_rng(5).normal(0, 3, NET_WEIGHTS[n]).astype(np.float32) for n in ("first", "first_bias")
    }
    source, path = build(NET, {**NET_WEIGHTS, **wide}, 1), str(tmp_path / "integers.onnx")
    FORMS[form](build(NET, NET_WEIGHTS, 2), path)
    before = {n: v.const_value.numpy() for n, v in onnxopt.load(path).graph.initializers.items()}
    result = onnxopt.transfer(source, path)
    after = {n: v.const_value.numpy() for n, v in result.model.graph.initializers.items()}
    assert any("ranges of activations" in note for note in result.notes)
    assert result.certificate is not None
    assert result.certificate.rounding is not None
    assert result.certificate.rounding_before is not None
    assert result.certificate.rounding < 2 * result.certificate.rounding_before
    assert _deviation(source, result.model) < 0.1
    if form == "pairs":
        assert 3 < after["b_scale"] / before["b_scale"] < 12
        assert after["x_scale"] == before["x_scale"]
        scale = after["second_bias_quantized_scale"]
        np.testing.assert_allclose(scale, after["b_scale"] * after["second_scale"], rtol=1e-6)


@pytest.mark.parametrize("form", ["pairs", "operators"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_grid_in_the_place_of_a_clip(form: str, backwards: bool, tmp_path: Path) -> None:
    """The quantizer leaves Clip(x, 0, 6) out, because grids end where the calibration did; the other model tells."""
    text = NET.replace("Relu(a)", "Clip(a, zero, six)").replace("Relu(e)", "Clip(e, zero, six)")
    weights = {**NET_WEIGHTS, "zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    first, second = build(text, weights, 1), build(text, weights, 2)
    path = str(tmp_path / "integers.onnx")
    FORMS[form](second, path)
    assert "Clip" not in {n.op_type for n in onnx.load(path).graph.node}
    result = onnxopt.transfer(path, first) if backwards else onnxopt.transfer(first, path)
    assert result.coverage == 1
    assert result.certificate is not None
    assert result.certificate.verdict == "close"


def test_a_wrong_parameter_does_not_pass_for_rounding(tmp_path: Path) -> None:
    """Another activation costs less than rounding would be allowed by any limit, and is found all the same."""
    path = str(tmp_path / "integers.onnx")
    FORMS["dynamic"](build(NET.replace("f = Relu(e)", "f = LeakyRelu<alpha = 0.01>(e)"), NET_WEIGHTS, 2), path)
    source = build(NET, NET_WEIGHTS, 1)
    result = onnxopt.transfer(source, path)
    assert _deviation(source, result.model) < 0.1
    assert result.certificate is not None
    assert result.certificate.verdict not in ("equal", "close")
    assert result.certificate.verification is not None
    assert not result.certificate.verification.ok


def test_sums_that_fit_into_16_bits_still_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    feeds = [{"x": rng.normal(0, 1, (2, 3, 8, 8)).astype(np.float32)} for _ in range(4)]
    np.savez(tmp_path / "x.npz", **{f"{i:04d}/x": feed["x"] for i, feed in enumerate(feeds)})
    target = tmp_path / "int8.onnx"
    data, source = str(tmp_path / "x.npz"), build(NET, NET_WEIGHTS, 1)
    made = onnxopt.optimize(source, passes="quantize-static", target="cpu", data=data, max_error=np.inf, measure=False)
    onnxopt.save(made.model, target)
    result = onnxopt.transfer(build(NET, NET_WEIGHTS, 2), str(target), data=data)
    weights = [t for v in result.model.graph.initializers.values() if (t := constant_array(v)) is not None]
    before = [t for v in made.model.graph.initializers.values() if (t := constant_array(v)) is not None]
    convolved = [w for w in weights if w.dtype == np.int8 and w.ndim == 4]
    assert len(convolved) == 2
    for weight in convolved:
        assert not adjacent.too_large(weight, adjacent.orders_of_convolution(weight.shape, 1)).any()
        assert not any(np.array_equal(weight, old) for old in before)
