from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import onnxopt
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.cli import cli
from onnxopt.contract import Context, Refusal
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.likeness import by_weights
from onnxopt.errors import UsageError
from onnxopt.passes.prune.merge_channels import MergeChannels
from onnxopt.removed import Change, Width

MODELS = Path(__file__).parents[2] / "models"


def build(text, opset=17, constants=None, **arrays):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> agraph {text}')
    for name, array in {**arrays, **(constants or {})}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def twins(scale=2.0):
    """Build a perceptron whose neurons come in pairs, the second one a multiple of the first."""
    half = random(16, 8)
    return build(
        "(float[batch,16] x) => (float[batch,4] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }",
        w=np.concatenate([half, half * np.float32(scale)], axis=1), v=random(16, 4, seed=1),
    )  # fmt: skip


def context(model, feeds=None):
    data = None if feeds is None else calibration(feeds, real=True)
    return Context(target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model), calibration=data)


def run(model, x):
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})[0]


def behind_a_transpose():
    """Build the same with the second weight stored the other way round."""
    model = twins()
    return build(
        "(float[batch,16] x) => (float[batch,4] y) { a = MatMul(x, w) r = Relu(a) t = Transpose(v) y = MatMul(r, t) }",
        w=model.graph.initializers["w"].const_value.numpy(),
        v=np.ascontiguousarray(model.graph.initializers["v"].const_value.numpy().T),
    )


@pytest.mark.parametrize("made", [twins, behind_a_transpose])
@pytest.mark.parametrize("data", [True, False])
def test_neurons_that_are_multiples_merge_without_loss(made, data):
    model, x = made(), random(32, 16, seed=2)
    before = run(model, x)
    ctx = context(model, [{"x": x}] if data else None)
    (edit,) = MergeChannels(ratio=0.5).run(model, ctx)
    assert edit.summary == "16 to 8 channels, the others merged into them"
    assert edit.removed.units == Change(16, 8)
    assert edit.removed.widths == (Width("w", "outputs", 16, 8), Width("v", "inputs", 16, 8))
    assert edit.removed.predicted.of == ("activations" if data else "weights")
    assert edit.removed.predicted.share == pytest.approx(0, abs=1e-6)
    edit.apply()
    assert list(model.graph.initializers["w"].const_value.shape) == [16, 8]
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(edit.reference(), x), before, rtol=1e-4, atol=1e-4)


def test_a_residual_stream_is_summed_up_behind_every_layer():
    model = build(
        """(float[1,3,6,6] x) => (float[1,2,6,6] y) {
        a = Conv(x, w) b = Relu(a) c = Conv(b, u) d = Add(b, c) e = Relu(d) y = Conv(e, v) }""",
        w=np.concatenate([random(4, 3, 1, 1)] * 2), u=np.concatenate([random(4, 8, 1, 1, seed=1)] * 2),
        v=random(2, 8, 1, 1, seed=2),
    )  # fmt: skip
    x = random(1, 3, 6, 6, seed=3)
    before = run(model, x)
    (edit,) = MergeChannels(ratio=0.5).run(model, context(model, [{"x": x}]))
    edit.apply()
    assert list(model.graph.initializers["u"].const_value.shape) == [4, 4, 1, 1]
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-4)


def test_channels_that_are_flattened_merge_place_by_place():
    model = build(
        "(float[1,3,4,4] x) => (float[1,5] y) { a = Conv(x, w) b = Relu(a) c = Flatten(b) y = MatMul(c, v) }",
        w=np.concatenate([random(4, 3, 1, 1), 3 * random(4, 3, 1, 1)]), v=random(128, 5),
    )  # fmt: skip
    x = random(1, 3, 4, 4, seed=3)
    before = run(model, x)
    (edit,) = MergeChannels(ratio=0.5).run(model, context(model, [{"x": x}]))
    edit.apply()
    assert list(model.graph.initializers["v"].const_value.shape) == [64, 5]
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-4)


def test_what_is_multiplied_by_other_results_is_left_alone():
    model = build(
        """(float[2,3,16] x) => (float[2,3,3] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose <perm = [0, 2, 1]> (k) y = MatMul(q, t) }""",
        wq=random(16, 32), wk=random(16, 32),
    )  # fmt: skip
    found = [item for item in MergeChannels().run(model, context(model)) if isinstance(item, Refusal)]
    assert [item.reason for item in found] == [
        "it is also multiplied by other results, which cannot be summed up ahead"
    ]


def test_a_weight_behind_that_the_graph_computes_is_named_as_that():
    model = build(
        """(float[4,8] x) => (float[4,3] y) {
        a = MatMul(x, u) t = Relu(a) c = Cast <to = 1> (v) m = Mul(c, s) y = MatMul(t, m) }""",
        u=random(8, 32), v=np.arange(96, dtype=np.int8).reshape(32, 3), s=np.float32([0.01]),
    )  # fmt: skip
    found = [item for item in MergeChannels().run(model, context(model)) if isinstance(item, Refusal)]
    assert [item.reason for item in found] == [
        "a weight behind it is computed in the graph, by Mul, and not stored as one constant"
    ]


def test_gated_neurons_are_judged_by_both_weights_that_make_them():
    half = random(16, 8)
    model = build(
        "(float[2,16] x) => (float[2,4] y) { a = MatMul(x, w) b, c = Split<axis = 1>(a) d = Mul(b, c) y = MatMul(d, v) }",
        opset=12, w=np.concatenate([half, half, random(16, 16, seed=2)], axis=1), v=random(16, 4, seed=1),
    )  # fmt: skip
    (group,) = analyse(model).groups
    (outlet,) = by_weights(group)
    both = np.stack(np.split(model.graph.initializers["w"].const_value.numpy().T.astype(np.float64), 2), axis=1)
    np.testing.assert_allclose(outlet.gram, np.einsum("ikj,lkj->il", both, both))
    (edit,) = MergeChannels(ratio=0.5).run(model, context(model))
    assert edit.summary == "16 to 8 channels, the others merged into them"


@pytest.mark.parametrize("data", [True, False])
def test_hidden_units_that_do_the_same_merge_without_loss(data):
    w, r = random(1, 4, 4, 5), random(1, 4, 4, 8, seed=1) / 4  # gates, then units
    model = build(
        """(float[6,2,5] x) => (float[6,1,2,3] z) {
        y = LSTM<hidden_size = 8>(x, w, r) z = MatMul(y, v) }""",
        w=np.concatenate([w, w], axis=2).reshape(1, 32, 5),
        r=np.concatenate([r, r], axis=2).reshape(1, 32, 8), v=random(8, 3, seed=2),
    )  # fmt: skip
    x = random(6, 2, 5, seed=3)
    before = run(model, x)
    (edit,) = MergeChannels(ratio=0.5).run(model, context(model, [{"x": x}] if data else None))
    edit.apply()
    assert list(model.graph.initializers["r"].const_value.shape) == [1, 16, 4]
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(edit.reference(), x), before, rtol=1e-4, atol=1e-4)


def test_a_weight_that_layers_share_behind_a_transpose_merges():
    half = random(16, 8)
    model = build(
        """(float[5,16] x) => (float[5,16] y) {
        t = Transpose(v) a = MatMul(x, w) b = Relu(a) c = MatMul(b, t) d = MatMul(c, w) e = Relu(d) y = MatMul(e, t) }""",
        w=np.concatenate([half, 2 * half], axis=1), v=random(16, 16, seed=1) / 8,
    )  # fmt: skip
    x = random(5, 16, seed=2)
    before = run(model, x)
    (edit,) = MergeChannels(ratio=0.5).run(model, context(model, [{"x": x}]))
    edit.apply()
    assert list(model.graph.initializers["v"].const_value.shape) == [16, 8]
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-4)


def test_too_few_channels():
    model = build(
        "(float[2,3] x) => (float[2,4] y) { a = MatMul(x, w) y = MatMul(a, v) }", w=random(3, 4), v=random(4, 4)
    )
    (refusal,) = MergeChannels().run(model, context(model))
    assert refusal.reason == "its 4 channels are too few to merge any"


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"multiple": 0}, {"min_channels": 0}])
def test_options(options):
    with pytest.raises(UsageError, match=f"merge-channels: {next(iter(options))} is"):
        MergeChannels(**options)


def test_the_original_is_not_written_into():
    model = twins()
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    result = onnxopt.optimize(model, passes="merge-channels{ratio=0.5}", max_error=0.01, measure=False)
    assert [edit.site.output for edit in result.report.passes[0].applied] == ["w"]
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


@pytest.mark.parametrize("name", ["mnist_cnn.onnx", "mnist_cnn_bn.onnx"])
def test_real_models_from_the_command_line(tmp_path, name):
    out = tmp_path / "merged.onnx"
    arguments = [
        "optimize",
        MODELS / name,
        "-o",
        out,
        "--passes",
        "merge-channels",
        "--max-error",
        "inf",
        "--no-measure",
    ]
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "64 to 48 channels, the others merged into them" in result.output
    assert out.stat().st_size < 0.7 * (MODELS / name).stat().st_size
