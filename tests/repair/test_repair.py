"""Layers fitted to what another model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import Context, Edit, Refusal
from onnxopt.model import load
from onnxopt.repair import fit
from onnxopt.repair.fit import Target, repair
from onnxopt.runtime import RunOptions, open_session

MODELS = Path(__file__).parent.parent.parent / "models"
Feeds = list[dict[str, np.ndarray]]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def declare(text: str, **arrays: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> agraph {text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def context(model: ir.Model, feeds: Feeds) -> Context:
    return Context(
        target="portable",
        seed=0,
        evaluate=lambda node, inputs, opset: None,
        shapes=Shapes(model),
        calibration=calibration(feeds, real=True),
    )


def repaired(
    original: ir.Model, model: ir.Model, targets: list[Target], feeds: Feeds, deny: tuple[str, ...] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    edits, refusals = {}, {}
    for found in repair("prune", original, model, targets, context(model, feeds)):
        if not isinstance(found, Edit):
            refusals[found.site.output] = found.reason
        elif found.site.output not in deny:
            found.apply()
            edits[found.site.output] = found.summary
    onnx.checker.check_model(ir.to_proto(model))
    return edits, refusals


def outputs(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with open_session(model, RunOptions(), optimized=True) as session:
        return list(session.run(feed).values())


def samples(*shape: int, count: int = 24) -> Feeds:
    return [{"x": random(*shape, seed=i)} for i in range(count)]


CONVOLUTIONS = {
    "plain": ("", (6, 4, 3, 3)),
    "pads and strides": ("<strides = [2, 1], pads = [1, 0, 2, 1]>", (6, 4, 3, 2)),
    "dilations": ("<dilations = [2, 3], pads = [2, 3, 2, 3]>", (6, 4, 3, 3)),
    "grouped": ("<group = 2>", (6, 2, 3, 3)),
    "depthwise": ("<group = 4, pads = [1, 1, 1, 1]>", (8, 1, 3, 3)),
    "pointwise": ("", (6, 4, 1, 1)),
    "same upper": ('<auto_pad = "SAME_UPPER", strides = [2, 2]>', (6, 4, 3, 4)),
    "same lower": ('<auto_pad = "SAME_LOWER", strides = [2, 2]>', (6, 4, 4, 3)),
    "valid": ('<auto_pad = "VALID">', (6, 4, 2, 2)),
}


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize(("attributes", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_becomes_the_one_it_is_fitted_to(attributes: str, shape: tuple[int, ...], bias: str) -> None:
    def text(bias: str) -> str:
        return f"(float[1,4,9,11] x) => (float[n,c,h,w] y) {{ y = Conv{attributes}(x, w{bias}) }}"

    original = declare(text(", b"), w=random(*shape), b=random(shape[0], seed=1))
    arrays = {"w": random(*shape, seed=2)} | ({"b": random(shape[0], seed=3)} if bias else {})
    model, feeds = declare(text(bias), **arrays), samples(1, 4, 9, 11)
    edits, _ = repaired(original, model, [Target("y", "y")], feeds)
    assert list(edits) == ["y"]
    x = {"x": random(1, 4, 9, 11, seed=99)}
    np.testing.assert_allclose(outputs(model, x)[0], outputs(original, x)[0], atol=0.05)


TRANSPOSED = {
    "plain": ("", (4, 6, 3, 3)),
    "strides and pads": ("<strides = [2, 3], pads = [1, 0, 1, 2]>", (4, 6, 4, 3)),
    "dilations": ("<dilations = [2, 1], strides = [3, 1], output_padding = [1, 0]>", (4, 6, 2, 3)),
    "grouped": ("<group = 2, strides = [2, 2]>", (4, 3, 2, 2)),
}


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize(("attributes", "shape"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_convolution_becomes_the_one_it_is_fitted_to(
    attributes: str, shape: tuple[int, ...], bias: str
) -> None:
    def text(bias: str) -> str:
        return f"(float[1,4,5,6] x) => (float[n,c,h,w] y) {{ y = ConvTranspose{attributes}(x, w{bias}) }}"

    original = declare(text(", b"), w=random(*shape), b=random(6, seed=1))
    arrays = {"w": random(*shape, seed=2)} | ({"b": random(6, seed=3)} if bias else {})
    model, feeds = declare(text(bias), **arrays), samples(1, 4, 5, 6, count=40)
    edits, _ = repaired(original, model, [Target("y", "y")], feeds)
    assert list(edits) == ["y"]
    x = {"x": random(1, 4, 5, 6, seed=99)}
    np.testing.assert_allclose(outputs(model, x)[0], outputs(original, x)[0], atol=0.05)


MATRICES = {
    "MatMul": ("(float[2,7,5] x) => (float[2,7,3] y)", "y = MatMul(x, w)", (5, 3), False),
    "MatMul and Add": ("(float[2,7,5] x) => (float[2,7,3] z)", "y = MatMul(x, w) z = Add(b, y)", (5, 3), True),
    "Gemm": ("(float[7,5] x) => (float[7,3] y)", "y = Gemm(x, w)", (5, 3), False),
    "transB": ("(float[7,5] x) => (float[7,3] y)", "y = Gemm<transB = 1, alpha = 2.0>(x, w)", (3, 5), False),
    "beta": ("(float[7,5] x) => (float[7,3] y)", "y = Gemm<beta = 0.5>(x, w, b)", (5, 3), True),
    "FusedMatMul": (
        "(float[7,5] x) => (float[7,3] y)",
        "y = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, w)",
        (3, 5),
        False,
    ),
    "Transpose": ("(float[7,5] x) => (float[7,3] y)", "t = Transpose(w) y = MatMul(x, t)", (3, 5), False),
}


@pytest.mark.parametrize(("head", "body", "shape", "bias"), MATRICES.values(), ids=MATRICES)
def test_a_matrix_becomes_the_one_it_is_fitted_to(head: str, body: str, shape: tuple[int, int], bias: bool) -> None:
    text = f"{head} {{ {body} }}"

    def arrays(seed: int) -> dict[str, np.ndarray]:
        return {"w": random(*shape, seed=seed)} | ({"b": random(3, seed=seed + 1)} if bias else {})

    original, model = declare(text, **arrays(0)), declare(text, **arrays(10))
    size = tuple(d if isinstance(d, int) else 1 for d in original.graph.inputs[0].shape or ())
    value = original.graph.outputs[0].name or ""
    edits, _ = repaired(original, model, [Target("y", value, through=value)], samples(*size, count=40))
    assert list(edits) == ["y"]
    x = {"x": random(*size, seed=99)}
    np.testing.assert_allclose(outputs(model, x)[0], outputs(original, x)[0], atol=0.05)


def test_a_gemm_is_given_the_bias_that_it_lacks() -> None:
    head = "(float[7,5] x) => (float[7,3] y)"
    original = declare(f"{head} {{ y = Gemm(x, w, b) }}", w=random(5, 3), b=random(3) + 4)
    model = declare(f"{head} {{ y = Gemm<beta = 0.5>(x, w) }}", w=random(5, 3, seed=2))
    repaired(original, model, [Target("y", "y")], samples(7, 5))
    x = {"x": random(7, 5, seed=99)}
    np.testing.assert_allclose(outputs(model, x)[0], outputs(original, x)[0], atol=0.05)


def test_a_weight_whose_shape_is_asked_for_and_a_bias_that_is_computed_are_no_obstacle() -> None:
    text = """(float[1,4,9,9] x) => (float[1,6,7,7] y, int64[4] s)
      { s = Shape(w) b = Neg(c) y = Conv(x, w, b) }"""
    original, model = (declare(text, w=random(6, 4, 3, 3, seed=i), c=random(6)) for i in range(2))
    edits, _ = repaired(original, model, [Target("y", "y")], samples(1, 4, 9, 9))
    assert list(edits) == ["y"]
    x = {"x": random(1, 4, 9, 9, seed=99)}
    np.testing.assert_allclose(outputs(model, x)[0], outputs(original, x)[0], atol=0.05)
    assert "w" not in model.graph.initializers


def test_later_layers_see_earlier_ones_as_they_are() -> None:
    """The second layer is fitted to make up for the first, which is left as it is."""
    text = "(float[9,6] x) => (float[9,4] y) { h = Gemm(x, v) y = Gemm(h, w) }"
    v, w = random(6, 6), random(6, 4, seed=1)
    original, model = declare(text, v=v, w=w), declare(text, v=v * 2, w=w)
    edits, _ = repaired(original, model, [Target("y", "y"), Target("h", "h")], samples(9, 6), deny=("h",))
    assert list(edits) == ["y"]
    np.testing.assert_allclose(model.graph.node(1).inputs[1].const_value.numpy(), w / 2, atol=0.02)
    whole = declare(text, v=v * 2, w=w)
    edits, _ = repaired(original, whole, [Target("y", "y"), Target("h", "h")], samples(9, 6))
    assert next(iter(edits)) == "h"
    np.testing.assert_allclose(whole.graph.node(1).inputs[1].const_value.numpy(), w, atol=0.02)


def test_a_layer_makes_up_for_what_a_residual_lost() -> None:
    original = declare("(float[9,6] x) => (float[9,6] y) { h = Gemm(x, w) y = Add(x, h) }", w=random(6, 6))
    model = declare(
        "(float[9,6] x) => (float[9,6] y) { s = Mul(x, half) h = Gemm(x, w) y = Add(s, h) }",
        w=random(6, 6),
        half=np.full(1, 0.5, np.float32),
    )
    repaired(original, model, [Target("h", "y", through="y")], samples(9, 6))
    x = {"x": random(9, 6, seed=99)}
    np.testing.assert_allclose(outputs(model, x)[0], outputs(original, x)[0], atol=0.05)


def test_only_kept_channels_count() -> None:
    original = declare("(float[9,6] x) => (float[9,5] y) { y = Gemm(x, w) }", w=random(6, 5))
    model = declare("(float[9,6] x) => (float[9,2] y) { y = Gemm(x, w) }", w=random(6, 2, seed=1))
    repaired(original, model, [Target("y", "y", kept=(4, 1))], samples(9, 6))
    x = {"x": random(9, 6, seed=99)}
    np.testing.assert_allclose(outputs(model, x)[0], outputs(original, x)[0][:, [4, 1]], atol=0.05)


def refusal(body: str, head: str = "(float[9,6] x) => (float[9,6] y)", **arrays: np.ndarray) -> str:
    text = f"{head} {{ {body} }}"
    model = declare(text, **arrays)
    shape = tuple(d if isinstance(d, int) else 1 for d in model.graph.inputs[0].shape or ())
    edits, refusals = repaired(model, model.clone(), [Target("y", "y")], samples(*shape))
    assert not edits
    return refusals["y"]


def test_refusals_name_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(6, 6)
    assert refusal("y = Gemm(x, w)", w=w) == "it computes what it did"
    assert refusal("y = Relu(x)") == "it has no constant weight"
    assert refusal("y = Gemm(w, v)", "(float[9,6] x) => (float[6,6] y)", w=w, v=w) == "it has no constant weight"
    assert refusal("v = Relu(w) h = MatMul(x, w) y = MatMul(h, w)", w=w) == "something else uses its weight too"
    image = "(float[1,6,4,4] x) => (float[n,c,h,w] y)"
    assert refusal('y = ConvTranspose<auto_pad = "SAME_UPPER">(x, w)', image, w=random(6, 2, 3, 3)) == (
        "the size of its output is given in place of its pads"
    )
    activated = 'y = com.microsoft.FusedConv<activation = "Relu">(x, w)'
    assert refusal(activated, image, w=random(6, 6, 3, 3)).startswith("an activation is fused into it")
    assert refusal("z = Gemm(x, w) y = Log(z)", w=w) == "it has no constant weight"
    monkeypatch.setattr("onnxopt.repair.layers.MOST_INPUTS", 5)
    assert refusal("y = Gemm(x, w)", w=w) == "each of its outputs sees more than 5 inputs"


def test_values_of_another_shape_are_refused() -> None:
    original = declare("(float[9,6] x) => (float[9,5] y) { y = Gemm(x, w) }", w=random(6, 5))
    model = declare("(float[9,6] x) => (float[9,2] y) { y = Gemm(x, w) }", w=random(6, 2))
    _, refusals = repaired(original, model, [Target("y", "y"), Target("gone", "y")], samples(9, 6))
    _, nowhere = repaired(original, model, [Target("y", "nowhere")], samples(9, 6))
    assert nowhere["y"] == "the original has no such value"
    assert refusals["y"] == "its output has shape [9, 2], the original's [9, 5]"
    assert refusals["gone"] == "the main graph has no such layer"


def test_activations_that_are_not_finite_are_refused() -> None:
    text = "(float[9,6] x) => (float[9,6] y) { h = Log(x) y = Gemm(h, w) }"
    original, model = declare(text, w=random(6, 6)), declare(text, w=random(6, 6, seed=1))
    _, refusals = repaired(original, model, [Target("y", "y")], samples(9, 6))
    assert refusals["y"] == "its activations were too few, or held NaN or infinity"


def test_layers_that_need_one_another_are_fitted_on_different_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "(float[9,6] x) => (float[9,6] y) { a = Gemm(x, u) b = Gemm(x, v) c = Add(a, b) y = Gemm(c, w) }"
    arrays = {"u": random(6, 6), "v": random(6, 6, seed=1), "w": random(6, 6, seed=2)}
    model = declare(text, **arrays)
    targets = [Target(name, name) for name in ("a", "b", "y")]
    found = list(fit._layers(model, targets, context(model, [])))

    def portions() -> list[list[str]]:
        return [[target.layer for _, target in portion] for portion in fit._portions(model, found)]

    assert portions() == [["a", "b"], ["y"]]
    monkeypatch.setattr(fit, "MOMENT_BYTES", 100)
    assert portions() == [["a"], ["b"], ["y"]]


# A real model ------------------------------------------------------------------------------------------------


def narrowed(model: ir.Model, ratio: float) -> list[Target]:
    """Cut the channels of smallest norm of all layers but the last, and return what the layers should compute."""
    initializers = model.graph.initializers

    def put(name: str, array: np.ndarray) -> None:
        initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
        initializers[name].shape = ir.Shape(array.shape)

    layers = [n for n in model.graph if n.op_type in ("Conv", "Gemm")]
    targets, kept = [], np.arange(1)
    for layer in layers:
        weight, bias = (v.const_value.numpy() for v in layer.inputs[1:])
        if layer.op_type == "Gemm" and weight.shape[1] != 128:
            weight = weight.reshape(len(weight), 64, -1)
        weight = weight[:, kept]
        norms = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
        most = len(norms) if layer is layers[-1] else round(len(norms) * (1 - ratio))
        kept = np.sort(np.argsort(-norms)[:most])
        shape = (most, -1) if layer.op_type == "Gemm" else (most, *weight.shape[1:])
        put(layer.inputs[1].name, weight[kept].reshape(shape))
        put(layer.inputs[2].name, bias[kept])
        name = layer.outputs[0].name
        targets.append(Target(name, name, tuple(kept)))
    for node in model.graph:
        for value in node.outputs:
            value.shape = value.shape if value.is_graph_output() else None
        if node.op_type == "Reshape":
            wide = next(layer for layer in layers if layer.op_type == "Gemm").inputs[1].const_value.shape[1]
            put(node.inputs[1].name, np.array([-1, wide]))
    return targets


def accuracy(model: ir.Model) -> float:
    labels = np.load(MODELS / "mnist_test_labels.npy")
    with open_session(model, RunOptions(), optimized=True) as session:
        (scores,) = session.run({"image": np.load(MODELS / "mnist_test.npz")["image"]}).values()
    return float((scores.argmax(axis=1) == labels).mean())


def test_a_classifier_with_a_third_of_its_channels_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "WORK", 1e9)
    original = load(MODELS / "mnist_cnn.onnx")
    model = original.clone()
    targets = narrowed(model, 0.7)
    assert accuracy(model) < 0.5
    images = np.load(MODELS / "mnist_calibration.npz")["image"][:64, None]
    edits, refusals = repaired(original, model, targets, [{"image": image} for image in images])
    assert len(edits) == 4
    assert list(refusals.values()) == ["it computes what it did"]
    assert accuracy(model) > accuracy(original) - 0.06


def test_the_error_of_few_rows_is_told_by_the_spread_over_all() -> None:
    """Of four samples of one row, one is held back; by itself it has no spread."""
    text, direction = "(float[1,4] x) => (float[1,3] y) { y = MatMul(x, w) }", random(1, 4)
    original, model = declare(text, w=random(4, 3)), declare(text, w=np.zeros((4, 3), np.float32))
    feeds = [{"x": direction * np.float32(size)} for size in (1, -2, 2, -1)]
    (edit,) = repair("prune", original, model, [Target("y", "y")], context(model, feeds))
    assert isinstance(edit, Edit)
    assert edit.fit is not None
    assert edit.fit.before == pytest.approx(1 / np.sqrt((1 + 4 + 4 + 1) / 4), rel=1e-3)
    assert edit.fit.after < 0.01


def test_the_error_of_a_constant_is_told_by_its_size() -> None:
    text = "(float[1,4] x) => (float[1,3] y) { z = Mul(x, k) s = Add(z, o) y = MatMul(s, w) }"
    arrays = {"k": np.zeros(1, np.float32), "o": np.ones(1, np.float32)}
    original, model = declare(text, w=random(4, 3), **arrays), declare(text, w=random(4, 3) * np.float32(0.5), **arrays)
    feeds = [{"x": random(1, 4, seed=i)} for i in range(8)]
    (edit,) = repair("prune", original, model, [Target("y", "y")], context(model, feeds))
    assert isinstance(edit, Edit)
    assert edit.fit is not None
    assert edit.fit.before == pytest.approx(0.5, rel=1e-3)
    assert edit.fit.after < 0.01


def test_how_far_a_layer_is_off_that_is_not_fitted_is_told() -> None:
    """Noise that the input knows nothing of: no weights help."""
    text = "(float[8,4] x, float[8,3] noise) => (float[8,3] y) { z = MatMul(x, w) s = Mul(noise, k) y = Add(z, s) }"
    weight = random(4, 3)
    original, model = (declare(text, w=weight, k=np.full(1, size, np.float32)) for size in (1, 0))
    feeds = [{"x": random(8, 4, seed=i), "noise": random(8, 3, seed=100 + i)} for i in range(64)]
    (refusal,) = repair("prune", original, model, [Target("z", "y", through="y")], context(model, feeds))
    assert isinstance(refusal, Refusal)
    assert refusal.fit is not None
    assert refusal.fit.before == refusal.fit.after
    assert 0.2 < refusal.fit.after < 1
