"""What quantize-static writes between layers, read as what it takes the place of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.graph import constant_array
from onnxopt.transfer.tensors import Repeated, Store
from onnxopt.transfer.to_real import in_real_numbers
from onnxopt.transfer.view import Viewer

from .conftest import build, outputs

MULTIPLE = "b = Relu(a)  c = Mul(b, three)"
POOLED = 'b = Relu(a)  c = MaxPool<kernel_shape = [2, 2], strides = [1, 1], auto_pad = "SAME_UPPER">(b)'
REPEATED = (
    "b = Relu(a) "
    'c = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(b, roi, scales)'
)
HARD = "c = HardSigmoid<alpha = 0.3, beta = 0.4>(a)"
WINDOWS = "b = Relu(a)  t = ConvTranspose<kernel_shape = [2, 2], strides = [2, 2]>(b, up, up_bias)  c = Relu(t)"
FORMS = {"a multiple": MULTIPLE, "maxima": POOLED, "repeated": REPEATED, "hard sigmoid": HARD, "windows": WINDOWS}
WRITTEN = {
    "a multiple": "Mul",
    "maxima": "MaxPool",
    "repeated": "Resize",
    "hard sigmoid": "HardSigmoid",
    "windows": "ConvTranspose",
}
"""What the pass takes out."""


def _net(form: str, seed: int, height: object = 8) -> onnx.ModelProto:
    text = f"""<ir_version: 6, opset_import: ["" : 11]>
    g (float[2, 3, {height}, 8] x) => (float[2, 6] y) {{
        a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, first, first_bias)
        {FORMS[form]}
        d = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(c, second, second_bias)  e = Relu(d)
        p = GlobalAveragePool(e)  h = Flatten(p)  y = Gemm<transB = 1>(h, last, last_bias)
    }}"""
    weights: dict[str, tuple[int, ...] | np.ndarray] = {
        "first": (8, 3, 3, 3), "first_bias": (8,), "second": (8, 8, 3, 3), "second_bias": (8,), "last": (6, 8),
        "last_bias": (6,),
    }  # fmt: skip
    more: dict[str, dict[str, tuple[int, ...] | np.ndarray]] = {
        "a multiple": {"three": np.array(3, np.float32)},
        "maxima": {},
        "hard sigmoid": {},
        "repeated": {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
        "windows": {"up": (8, 8, 2, 2), "up_bias": (8,)},
    }
    return build(text, {**weights, **more[form]}, seed)


def _quantized(model: onnx.ModelProto, folder: Path, passes: str = "quantize-static") -> str:
    drawn = np.random.default_rng(3).normal(0, 1, (4, 2, 3, 8, 8)).astype(np.float32)
    data, path = str(folder / "x.npz"), str(folder / "integers.onnx")
    np.savez(data, **{f"{i:04d}/x": x for i, x in enumerate(drawn)})
    made = onnxopt.optimize(
        model, passes=passes, target="cpu", data=data, max_error=np.inf, verify=False, measure=False
    )
    onnxopt.save(made.model, path)
    return path


def _off(first: object, second: object) -> float:
    expected, found = outputs(first)[0], outputs(second)[0]  # type: ignore[arg-type]
    return float(np.abs(expected - found).max() / np.ptp(expected))


@pytest.mark.parametrize("height", [8, "h"])
@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(form: str, height: object, tmp_path: Path) -> None:
    """All parameters move, as sure matches, and outputs agree in real numbers and as the models run."""
    source, other = _net(form, 1, height), _net(form, 2, height)
    path = _quantized(other, tmp_path)
    written = {n.op_type for n in onnx.load(path).graph.node}
    assert WRITTEN[form] not in written
    real = in_real_numbers(onnxopt.load(path)).model
    assert not [n for n in real.graph if n.op_type in ("QuantizeLinear", "NhwcMaxPool")]
    sizes = {"shape": {"h": 8}} if height == "h" else {}
    there = onnxopt.transfer(source, path, **sizes)
    back = onnxopt.transfer(there.model, _net(form, 3, height), **sizes)
    for result in (there, back):
        assert {p.status for p in result.parameters} == {"exact"}
        assert result.certificate is not None
        assert result.certificate.verdict == "close"
    if height == 8:
        assert _off(source, there.model) < 0.1 < _off(source, other)
        assert _off(source, back.model) < 0.05


def test_a_multiple_follows_the_range(tmp_path: Path) -> None:
    """Where a range of activations is scaled, the second scale of the same integers is, too."""
    source, path = _net("a multiple", 1), _quantized(_net("a multiple", 2), tmp_path)
    for tensor in source.graph.initializer:
        if tensor.name in ("first", "first_bias"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(7 * onnx.numpy_helper.to_array(tensor), tensor.name))
    result = onnxopt.transfer(source, path)
    before, after = (
        [
            onnx.numpy_helper.to_array(t)
            for name in ("b_scale", "c_scale")
            for t in m.graph.initializer
            if t.name == name
        ]
        for m in (onnx.load(path), ir.to_proto(result.model))
    )
    assert after[0] > 3 * before[0]
    np.testing.assert_allclose([before[1] / before[0], after[1] / after[0]], 3, rtol=1e-6)
    assert _off(source, result.model) < 0.1


def test_one_bias_for_all_places_of_a_window(tmp_path: Path) -> None:
    """What makes up for rounding differs between the places of a window; a ConvTranspose takes the mean."""
    other = _net("windows", 2)
    stored = onnxopt.load(_quantized(other, tmp_path))
    group = next(g for g in Viewer(stored).view().layers if g.key[1:3] == ((8, 8, 2, 2), True))
    expected = {t.name: onnx.numpy_helper.to_array(t) for t in other.graph.initializer}
    assert group.weight is not None
    np.testing.assert_allclose(group.weight.read(Store()), expected["up"], atol=0.02)
    store, part = Store(), group.members[0].parts[0]
    part.write(expected["up_bias"], store)
    assert isinstance(part, Repeated)
    for place in part.source.read(store).reshape(4, 8):
        np.testing.assert_allclose(place, expected["up_bias"], atol=0.01)
    np.testing.assert_allclose(part.read(store), expected["up_bias"], atol=0.01)


def test_biases_of_old_opsets_follow_their_scales(tmp_path: Path) -> None:
    """The runtime takes their step for that of the input times that of the weight, whatever is stored."""
    path = _quantized(_net("maxima", 2), tmp_path)
    model = onnxopt.transfer(_net("maxima", 1), path).model
    found = {n: t for n, v in model.graph.initializers.items() if (t := constant_array(v)) is not None}
    for weight, data in (("first", "x"), ("second", "b")):
        np.testing.assert_allclose(
            found[f"{weight}_bias_scale"], found[f"{data}_scale"] * found[f"{weight}_scale"], rtol=1e-6
        )


def test_a_bias_next_to_weights_that_are_almost_0(tmp_path: Path) -> None:
    """Its integers would not fit into 32 bits with the steps that such weights ask for: they get larger ones."""
    path, source = _quantized(_net("maxima", 2), tmp_path), _net("maxima", 1)
    for tensor in source.graph.initializer:
        if tensor.name == "second":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[3] *= 1e-9
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "second"))
    result = onnxopt.transfer(source, path)
    assert result.coverage == 1
    assert _off(source, result.model) < 0.1
    found = {n: t for n, v in result.model.graph.initializers.items() if (t := constant_array(v)) is not None}
    assert np.abs(found["second_bias_int32"].astype(np.int64)).max() <= 2**30
    assert not found["second_int8"][3].any()
    assert found["second_int8"][2].any()


@pytest.mark.parametrize("form", FORMS)
def test_optimized_once_more(form: str, tmp_path: Path) -> None:
    """The exact passes change no output of such a model, make it no bigger, and leave it one that parameters move into."""
    path, source = _quantized(_net(form, 2), tmp_path), _net(form, 1)
    again = onnxopt.optimize(path, target="cpu", measure=False)
    assert again.report.verification is not None
    assert again.report.verification.ok
    assert not [o for p in again.report.passes for o in p.dropped]
    assert len(list(again.model.graph)) <= len(list(onnxopt.load(path).graph))
    there = onnxopt.transfer(source, again.model)
    assert there.coverage == 1
    assert there.certificate is not None
    assert there.certificate.verdict == "close"
