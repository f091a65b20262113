from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

import onnxopt
from onnxopt import model as models
from onnxopt import runtime
from onnxopt.contract import Silent
from onnxopt.errors import DataError, NothingDoneError, OutputError, UsageError, VerificationError
from onnxopt.training import forward
from onnxopt.training.examples import folds, load_examples
from onnxopt.training.finetune import finetune
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.parameters import find_parameters, with_parameters
from onnxopt.training.reinitialize import reinitialize

Blobs = tuple[dict[str, np.ndarray], np.ndarray]
MODELS = Path(__file__).parent.parent.parent / "models"


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: p.tensor.numpy() for name, p in find_parameters(model).items()}


def changed(before: ir.Model, after: ir.Model) -> list[str]:
    old, new = weights(before), weights(after)
    return [name for name in old if not np.array_equal(old[name], new[name])]


@pytest.mark.parametrize(
    "layer",
    [
        "h = MatMul (x, w)  y = Add (h, v)",
        "t = Tanh (x)  h = Mul (t, v)  g = Gelu (h)  y = MatMul (g, w)",
        "m = MatMul (x, w)  y = LayerNormalization (m, v, v)",
        "m = MatMul (x, w)  a = Softmax (m)  t = Transpose (a)  y = MatMul (t, m)",
        "m = MatMul (x, w)  s = Sigmoid (m)  l = Log (s)  e = Erf (l)  y = Mul (e, v)",
    ],
)
def test_gradients_are_those_of_finite_differences(layer: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 20]> g (double[3, 4] x) => (double[n, 4] y)
        <double[4] v = {{0.5, -1.5, 2, 1}}> {{ {layer} }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((4, 4)), "w"))
    model = models.load(proto)
    interpreter = Interpreter(model)
    feed = {"x": rng.standard_normal((3, 4))}
    leaves = {name: p.initial.requires_grad_() for name, p in find_parameters(model).items()}
    assert sorted(leaves) == (["v", "w"] if " v)" in layer else ["w"])

    def total(*values: torch.Tensor) -> torch.Tensor:
        return (interpreter.run(feed, dict(zip(leaves, values, strict=True)))["y"] ** 2).sum()

    assert torch.autograd.gradcheck(total, tuple(leaves.values()))


def test_training_raises_accuracy_and_leaves_all_but_the_weights_alone(
    network: onnx.ModelProto, blobs: Blobs, tmp_path: Path
) -> None:
    network.graph.doc_string = "kept"
    for node in network.graph.node:
        node.ClearField("domain")  # the parser writes it although it is empty
    onnx.save(network, tmp_path / "before.onnx")
    found = onnxopt.finetune(tmp_path / "before.onnx", *blobs, epochs=15, learning_rate=0.02)
    assert found.before is not None and found.after is not None
    assert found.after.value > found.before.value + 0.2
    assert found.after.low < found.after.value < found.after.high
    assert found.targets == ("the classes of y",) and not found.is_worse and found.deviation < 1e-5
    onnxopt.save(found.model, tmp_path / "after.onnx")
    after = onnx.load(tmp_path / "after.onnx")
    for one, two in zip(network.graph.initializer, after.graph.initializer, strict=True):
        assert one.raw_data != two.raw_data
        two.raw_data = one.raw_data
    assert after.SerializeToString() == network.SerializeToString()


def test_the_same_seed_gives_the_same_model_and_another_seed_another(network: onnx.ModelProto, blobs: Blobs) -> None:
    runs = [finetune(network, *blobs, epochs=2, learning_rate=0.02, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (weights(run.model)["w1"] for run in runs)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"freeze": ["*1"]}, ["w2", "b2"]),
        ({"train": ["w*"]}, ["w1", "w2"]),
        ({"train": ["w*"], "freeze": ["*2"]}, ["w1"]),
        ({}, ["w1", "b1", "w2", "b2"]),
    ],
)
def test_only_what_was_chosen_is_trained(
    network: onnx.ModelProto, blobs: Blobs, options: dict[str, Any], names: list[str]
) -> None:
    model = models.load(network)
    found = finetune(model, *blobs, epochs=1, learning_rate=0.02, **options)
    assert changed(model, found.model) == names == list(found.trained)


def test_a_layer_decay_of_little_moves_the_first_layer_little(network: onnx.ModelProto, blobs: Blobs) -> None:
    model = models.load(network)
    assert {name: p.depth for name, p in find_parameters(model).items()} == {"w1": 1, "b1": 1, "w2": 0, "b2": 0}
    found = finetune(model, *blobs, epochs=2, learning_rate=0.02, layer_decay=0.01)
    moved = {name: np.abs(w - weights(model)[name]).max() for name, w in weights(found.model).items()}
    assert moved["w1"] < 0.1 * moved["w2"]


def test_half_of_the_way_is_halfway_between_before_and_after(
    network: onnx.ModelProto, blobs: Blobs, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"epochs": 3, "learning_rate": 0.02, "validation": 0}
    start, whole = weights(models.load(network)), weights(finetune(network, *blobs, **options).model)
    half = weights(finetune(network, *blobs, **options, blend=0.5).model)
    for name, array in half.items():
        assert np.abs(whole[name] - start[name]).max() > 1e-3
        assert np.allclose(array, (start[name] + whole[name]) / 2, atol=1e-6)
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(network, *blobs, **options, blend=0.5, checkpoint=checkpoint, progress=Interrupts("epoch 3"))
    rest = weights(finetune(network, *blobs, **options, blend=0.5, checkpoint=checkpoint).model)
    assert all(np.array_equal(array, half[name]) for name, array in rest.items())


class Interrupts(Silent):
    """Interrupts at the beginning of an epoch."""

    def __init__(self, at: str) -> None:
        self.at = at

    def stage(self, text: str, total: int | None = None) -> None:
        if text.startswith(self.at):
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_result(network: onnx.ModelProto, blobs: Blobs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 6, "learning_rate": 0.02, "shift": 1, "noise": 0.1, "mix": 0.3}
    whole = finetune(network, *blobs, **options)
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(network, *blobs, **options, checkpoint=checkpoint, progress=Interrupts("epoch 4"))
    rest = finetune(network, *blobs, **options, checkpoint=checkpoint)
    assert rest.resumed == 3
    # of the numbers of the first epoch, the loss is NaN
    assert [(e.number, e.key) for e in whole.epochs] == [(e.number, e.key) for e in rest.epochs]
    assert all(np.array_equal(w, weights(whole.model)[name]) for name, w in weights(rest.model).items())
    with pytest.raises(UsageError, match="belongs to a run with another model, data or options"):
        finetune(network, *blobs, **{**options, "epochs": 7}, checkpoint=checkpoint)


def test_the_best_state_is_kept_and_training_ends_when_nothing_improves(network: onnx.ModelProto, blobs: Blobs) -> None:
    trained = finetune(network, *blobs, epochs=15, learning_rate=0.02).model
    found = finetune(trained, *blobs, epochs=30, learning_rate=2.0, patience=3)
    keys = [epoch.key for epoch in found.epochs]
    assert keys[found.best] == max(keys)
    assert len(keys) == found.best + 3 + 1
    assert not found.is_worse


def test_zeros_stay_zero_and_shared_values_stay_shared(network: onnx.ModelProto, blobs: Blobs) -> None:
    model = models.load(network)
    pruned = weights(model)["w1"].copy()
    pruned[:, ::2] = 0
    shared = np.random.default_rng(0).choice(np.array([-0.3, 0, 0.2, 0.7], np.float32), (64, 64))
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 3] y)
        { h = Gemm (x, w1, b1)  r = Relu (h)  e = MatMul (r, up)  f = MatMul (e, code)  u = MatMul (f, down)
          s = Gemm (u, w2, b2)  y = LogSoftmax (s) }"""
    )
    proto.graph.initializer.extend(network.graph.initializer)
    rng = np.random.default_rng(2)
    for name, array in {
        "up": 0.1 * rng.standard_normal((16, 64)),
        "code": 0.1 * shared,
        "down": 0.1 * rng.standard_normal((64, 16)),
    }.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    model = with_parameters(models.load(proto), {"w1": pruned})
    after = weights(finetune(model, *blobs, epochs=3, learning_rate=0.02, validation=0).model)
    assert np.array_equal(after["w1"] == 0, pruned == 0)
    old = weights(model)["code"]
    assert not np.array_equal(after["code"], old)
    for value in np.unique(old):
        assert len(np.unique(after["code"][old == value])) == 1
    assert np.array_equal(after["code"] == 0, old == 0)


def test_regression(blobs: Blobs) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 2] y) { y = MatMul (x, w) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((4, 2), np.float32), "w"))
    truth = np.array([[1, 2], [3, 4], [0, 1], [-1, 0]], np.float32)
    x = blobs[0]["x"]
    found = finetune(proto, {"x": x}, x @ truth, epochs=60, learning_rate=0.2, weight_decay=0)
    assert found.targets == ("the targets of y",) and found.after is not None and found.after.value < 0.05
    assert np.allclose(weights(found.model)["w"], truth, atol=0.2)


def test_half_precision_stays_half_precision(network: onnx.ModelProto, blobs: Blobs) -> None:
    for tensor in network.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    network.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    network.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    found = finetune(network, {"x": blobs[0]["x"].astype(np.float16)}, blobs[1], epochs=3, learning_rate=0.02)
    assert {w.dtype for w in weights(found.model).values()} == {np.dtype(np.float16)}
    assert found.before is not None and found.after is not None and found.after.value > found.before.value


def test_samples_one_at_a_time_learn_as_batches_do(network: onnx.ModelProto, blobs: Blobs) -> None:
    batched = finetune(network, *blobs, epochs=2, learning_rate=0.02)
    for value in (network.graph.input[0], network.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    single = finetune(network, *blobs, epochs=2, learning_rate=0.02)
    for name, array in weights(single.model).items():
        assert np.allclose(array, weights(batched.model)[name], atol=1e-4)


def test_parameters_are_not_what_only_says_how_to_compute() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 2] x, float[2] given) => (float[n, 2] y)
        <float[2] mean = {1, 2}, float[2] scale = {1, 2}, float low = {0}, float eps = {0.001}, float two = {2},
         float[1, 2] hidden = {0, -1000000}, float[2, 2] w = {1, 2, 3, 4}, float[2] given = {1, 1}, float[2] bias = {1, 1}>
        { a = Sub (x, mean)  b = MatMul (a, w)  c = Pow (b, two)  d = Add (c, eps)  e = Mul (d, scale)
          f = Clip (e, low)  h = Add (f, hidden)  i = Mul (h, given)  k = Constant <value = float[2] {3, 4}> ()
          j = Add (i, bias)  y = Mul (j, k) }"""
    assert list(find_parameters(models.load(onnx.parser.parse_model(text)))) == ["w", "scale", "bias", "k"]


def test_weights_in_constant_nodes_are_trained_too(blobs: Blobs) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 2] y)
        { w = Constant <value = float[4, 2] {1, 2, 3, 4, 5, 6, 7, 8}> ()  y = MatMul (x, w) }"""
    model = models.load(onnx.parser.parse_model(text))
    found = finetune(model, blobs[0], blobs[1] % 2, epochs=1, validation=0)
    assert changed(model, found.model) == ["w"]
    assert found.after is None and not found.is_worse


def test_weights_that_the_graph_makes_are_stored_when_they_are_trained(blobs: Blobs, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 2] y)
        <int64[2] shape = {2, 4}, int64[2] other = {4, 2}, int64[1] two = {2}>
        { flat = ConstantOfShape <value = float[1] {0.5}> (shape)  w = Reshape (flat, other)
          b = ConstantOfShape (two)  state = ConstantOfShape <value = float[1] {0.1}> (two)
          h = Gemm (x, w, b)  y = Mul (h, state) }"""
    model = models.load(onnx.parser.parse_model(text))
    assert {name: p.is_made for name, p in find_parameters(model).items()} == {"flat": True, "b": True}
    found = finetune(model, blobs[0], blobs[1] % 2, epochs=3, validation=0, learning_rate=0.05)
    assert found.stored == ("flat", "b") and any("became initializers" in sentence for sentence in found.sentences())
    onnxopt.save(found.model, tmp_path / "after.onnx")
    after = onnx.load(tmp_path / "after.onnx")
    assert [n.op_type for n in after.graph.node] == ["Reshape", "ConstantOfShape", "Gemm", "Mul"]
    assert {t.name for t in after.graph.initializer} == {"other", "two", "flat", "b"}
    assert weights(found.model)["flat"].std() > 0
    kept = finetune(model, blobs[0], blobs[1] % 2, epochs=1, validation=0, train=["b"])
    assert kept.stored == ("b",) and "flat" not in kept.model.graph.initializers


def refusals() -> list[Any]:
    x = np.zeros((6, 4), np.float32)
    y = np.arange(6) % 3
    return [
        ({"x": x}, y + 1, {}, DataError, "Labels reach from 1 to 3, but the output .y. scores 3 classes, 0 to 2"),
        ({"x": x}, np.where(y == 0, -100, y - 2), {}, DataError, "Labels reach from -1 to 0"),
        ({"x": x}, np.full(6, -100), {}, DataError, "All labels are -100"),
        ({"x": x}, y[:4], {}, DataError, "There are 6 samples and 4 labels"),
        ({"x": x}, np.zeros((6, 7)), {}, DataError, "do not fit the output"),
        ({"x": x}, y.astype(float), {}, DataError, "give a class per sample as an integer"),
        ({"x": x}, np.array(list("abcabc")), {}, DataError, "Labels of type <U1"),
        ({"x": x}, np.full((6, 3), np.nan), {}, DataError, "The targets hold NaN or infinity"),
        ({"x": x}, None, {}, DataError, "There are no labels"),
        ({"z": x}, y, {}, DataError, 'The model has no input "z"'),
        ({"x": x[:, :3]}, y, {}, DataError, 'The input "x" has the shape'),
        ({"x": np.full_like(x, np.nan)}, y, {"learning_rate": 0.1}, DataError, "The loss is not finite"),
        ({"x": x}, y, {"freeze": ["*"]}, UsageError, "No parameter is left"),
        ({"x": x}, y, {"freeze": ["w3"]}, UsageError, 'freeze "w3" fits no parameter of the model. Did you mean'),
        ({"x": x}, y, {"learning_rate": 0.0}, UsageError, "learning_rate cannot be 0.0"),
        ({"x": x}, y, {"validation": 1.0}, UsageError, "validation must be at least 0 and below 1"),
        ({"x": x}, y, {"validation": 0.01}, DataError, "Of 6 samples, 0 would judge"),
        ({"x": x}, y, {"blend": 0.0}, UsageError, "blend cannot be 0.0"),
        ({"x": x}, y, {"mix": -1.0}, UsageError, "mix cannot be -1.0"),
        ({"x": x}, y, {"judging_folds": 1}, UsageError, "judging_folds must be at least 2, or 0 for none"),
        ({"x": x}, y, {"judging_folds": 7}, DataError, "6 samples cannot be divided into 7 folds"),
        (
            {"x": x},
            y,
            {"judging_folds": 2, "validation": 0.2},
            UsageError,
            "judging_folds and validation exclude each other",
        ),
        ({"x": x}, y, {"threads": 0}, UsageError, "threads must be at least 1"),
    ]


@pytest.mark.parametrize(("data", "labels", "options", "error", "message"), refusals())
def test_refusals(
    network: onnx.ModelProto, data: Any, labels: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune(network, data, labels, **options)


def test_an_option_that_does_not_exist_is_named(network: onnx.ModelProto, blobs: Blobs) -> None:
    with pytest.raises(TypeError, match='There is no option "epoch". Did you mean "epochs"'):
        finetune(network, *blobs, epoch=3)


def test_a_model_without_parameters_is_refused() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[b, 2] x) => (float[b, 2] y) { y = Relu (x) }'
    with pytest.raises(NothingDoneError, match="no floating-point parameters"):
        finetune(onnx.parser.parse_model(text), {"x": np.ones((4, 2), np.float32)}, np.zeros(4, np.int64))


def test_parameters_that_no_gradient_reaches_are_told(blobs: Blobs) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[b, 4] x) => (float[b, 4] y)
        <float[4] v = {1, 2, 3, 4}, float[4] w = {1, 2, 3, 4}, int64[1] k = {4}>
        { n = Relu (x)  a = Mul (n, v)  i = ArgMax <keepdims = 0> (a)  o = OneHot <axis = -1> (i, k, ends)  y = Mul (o, w) }"""
    proto = onnx.parser.parse_model(text.replace("int64[1] k", "float[2] ends = {0, 1}, int64[1] k"))
    proto.graph.node[2].attribute.append(onnx.helper.make_attribute("axis", 1))
    found = finetune(proto, *blobs, epochs=1, validation=0)
    assert found.unreached == ("v",) and found.trained == ("w",)
    assert any("No gradient reaches 1 parameter" in sentence for sentence in found.sentences())
    with pytest.raises(NothingDoneError, match='No gradient of "y" reaches'):
        finetune(proto, *blobs, train=["v"])


def test_folds_judge_and_the_result_learns_from_all_samples(network: onnx.ModelProto, blobs: Blobs) -> None:
    options: dict[str, Any] = {"epochs": 5, "learning_rate": 0.02}
    found = finetune(network, *blobs, **options, judging_folds=3)
    whole = finetune(network, *blobs, **options, validation=0)
    assert all(np.array_equal(w, weights(whole.model)[name]) for name, w in weights(found.model).items())
    assert found.before is not None and found.after is not None and found.before.samples == found.after.samples == 180
    assert found.after.value > found.before.value + 0.2 and found.best == 5
    right = 0
    for outside, inside in folds(load_examples(models.load(network), *blobs), 3, 0):
        rows = {"x": np.concatenate([feed["x"] for feed in outside.feeds])}
        model = finetune(network, rows, outside.labels, **options, validation=0).model
        with runtime.open_session(model, optimized=True) as session:
            right += int((session.run({"x": blobs[0]["x"][inside]})["y"].argmax(axis=1) == blobs[1][inside]).sum())
    assert right == round(found.after.value * 180)
    assert any("figures of 3 folds" in sentence for sentence in found.sentences())


def test_folds_that_were_interrupted_go_on(network: onnx.ModelProto, blobs: Blobs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "learning_rate": 0.02, "judging_folds": 2}
    whole = finetune(network, *blobs, **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(network, *blobs, **options, checkpoint=tmp_path / "run.safetensors", progress=Interrupts("fold 2"))
    assert [p.name for p in tmp_path.iterdir()] == ["run.fold1.safetensors"]
    rest = finetune(network, *blobs, **options, checkpoint=tmp_path / "run.safetensors")
    assert rest.after == whole.after
    assert all(np.array_equal(w, weights(whole.model)[name]) for name, w in weights(rest.model).items())


@pytest.mark.parametrize("labels", [np.arange(6), np.zeros((6, 2)), np.full((6, 3), np.inf)])
def test_labels_are_looked_at_before_the_comparison_with_the_runtime(
    network: onnx.ModelProto, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes long on a large model."""
    monkeypatch.setattr("onnxopt.training.run.Interpreter", None)
    with pytest.raises(DataError, match="Labels|targets"):
        finetune(network, {"x": np.zeros((6, 4), np.float32)}, labels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/run.safetensors", "there is no folder"),
        ("", "is a folder"),
        ("other.safetensors", "belongs to a run with another model, data or options"),
        ("model.onnx", "is no safetensors file"),
        ("run.safetensors", r"fold2\.safetensors belongs to a run"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_before_the_first_step(
    network: onnx.ModelProto, blobs: Blobs, tmp_path: Path, name: str, message: str
) -> None:
    """With folds, the checkpoint of the last training is read and written after all others."""
    for other in ("other.safetensors", "run.fold2.safetensors"):
        finetune(network, *blobs, epochs=1, learning_rate=0.02, validation=0, checkpoint=tmp_path / other)
    onnx.save(network, tmp_path / "model.onnx")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    options: dict[str, Any] = {"judging_folds": 2, "progress": Interrupts("")}
    with pytest.raises((DataError, OutputError, UsageError), match=message):
        finetune(network, *blobs, **options, checkpoint=tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folds_keep_the_shares_of_classes_and_hold_each_sample_once(network: onnx.ModelProto, blobs: Blobs) -> None:
    parts = folds(load_examples(models.load(network), *blobs), 4, 0)
    assert sorted(np.concatenate([inside for _, inside in parts])) == list(range(180))
    assert all((np.bincount(blobs[1][inside]) == 15).all() and len(outside) == 135 for outside, inside in parts)
    unlabelled = folds(load_examples(models.load(network), blobs[0], None), 7, 0)
    assert sorted(len(inside) for _, inside in unlabelled) == [25, 25, 26, 26, 26, 26, 26]


def test_a_gradient_of_zero_is_told(blobs: Blobs) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 2] y)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] b = {-999, -999}, float[2, 2] v = {1, 2, 3, 4}>
        { h = Gemm (x, w, b)  r = Relu (h)  y = MatMul (r, v) }"""
    with pytest.raises(NothingDoneError, match="The gradient of the loss is zero for all parameters"):
        finetune(onnx.parser.parse_model(text), blobs[0], blobs[1] % 2)


def test_what_torch_computes_wrongly_is_not_trained(
    network: onnx.ModelProto, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted = Interpreter.run

    def run(self: Interpreter, *args: Any) -> dict[str, Any]:
        return {name: value * 1.001 for name, value in interpreted(self, *args).items()}

    monkeypatch.setattr(Interpreter, "run", run)
    with pytest.raises(VerificationError, match="deviates by 0.0.* of its range from what ONNX Runtime"):
        finetune(network, *blobs)


def test_distances() -> None:
    one = np.array([0.0, 1, 2])
    assert forward.distance(torch.tensor([0.0, 1, 2.2]), one) == pytest.approx(0.1)
    assert forward.distance(torch.zeros(2), one) == np.inf
    assert forward.distance(torch.tensor([np.nan, 1, 2]), one) == np.inf
    assert forward.distance(torch.tensor([np.inf, 1.0]), np.array([np.inf, 1.0])) == 0
    assert forward.distance([torch.zeros(2)], [np.zeros(2), np.zeros(2)]) == np.inf


def test_new_parameters_have_the_size_that_keeps_activations_alive() -> None:
    model = models.load(MODELS / "mnist_cnn_bn.onnx")
    fresh = reinitialize(model, 0)
    assert (
        changed(model, fresh) and not changed(fresh, reinitialize(model, 0)) and changed(fresh, reinitialize(model, 1))
    )
    images = np.load(MODELS / "mnist_calibration.npz")["image"][:32]
    with runtime.open_session(fresh, optimized=True) as session:
        (scores,) = session.run({"image": images}).values()
    assert 0.1 < scores.std() < 10
    new = weights(fresh)
    assert {float(a.std()) for name, a in new.items() if name.endswith("bias")} == {0.0}
    kept = reinitialize(model, 0, train=["dense2.*"])
    assert changed(model, kept) == ["dense2.weight", "dense2.bias"]


def test_without_torch_the_rest_works_and_finetune_says_what_to_install(
    network: onnx.ModelProto, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == "torch" or n.startswith(("torch.", "onnxopt.training"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert onnxopt.optimize(network, measure=False).report is not None
    from onnxopt.training.finetune import finetune as without

    with pytest.raises(UsageError, match=r"pip install 'onnxopt\[torch\]'"):
        without(network, *blobs)
