"""Normalization by the statistics of batches, in training only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt
from onnxopt import model as models
from onnxopt import runtime
from onnxopt.contract import Silent
from onnxopt.errors import UsageError
from onnxopt.training import options as common
from onnxopt.training.batchnorm import layers_without
from onnxopt.training.examples import load_examples
from onnxopt.training.finetune import finetune
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.normalizing import Normalizing, normalizing
from onnxopt.training.parameters import find_parameters, with_parameters
from onnxopt.training.settings import settings as settings_of
from onnxopt.training.trainable import Trainable, trainable, values_of

HEADER = '<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 2, 5, 5] x) => (float[batch, 3] y)'

NET = """{ c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (c)  t = ConvTranspose (r, w2, b2)  f = Flatten (t)
  h = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, w3, b3)  s = Relu (h)  y = Gemm (s, w4, b4) }"""

SHAPES = {
    "w1": (4, 2, 3, 3),
    "b1": (4,),
    "w2": (4, 3, 2, 2),
    "b2": (3,),
    "w3": (8, 108),
    "b3": (1, 8),
    "w4": (8, 3),
    "b4": (3,),
}

WITH_BATCHNORM = """{ c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  n = BatchNormalization <epsilon = 0.01> (c, scale, shift, mean, var)  r = Relu (n)  f = Flatten (r)  y = MatMul (f, w) }"""


def net(text: str = HEADER + NET, shapes: dict[str, tuple[int, ...]] = SHAPES, *, seed: int = 0) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        array = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return models.load(proto)


def normalized_net() -> ir.Model:
    shapes = {"w1": (4, 2, 3, 3), "w": (100, 3), "scale": (4,), "shift": (4,), "b1": (4,)}
    text = HEADER + "<float[4] mean = {0.5, -0.5, 0, 1}, float[4] var = {1, 2, 0.5, 3}>" + WITH_BATCHNORM
    return net(text, shapes)


def samples(count: int = 60) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 3
    centres = rng.standard_normal((3, 2, 5, 5))
    return {"x": (centres[labels] + rng.standard_normal((count, 2, 5, 5))).astype(np.float32)}, labels


def prepared(model: ir.Model, **options: Any) -> tuple[Normalizing, dict[str, Trainable]]:
    trained = {name: trainable(p) for name, p in find_parameters(model).items()}
    examples = load_examples(model, *samples())
    return normalizing(model, trained, examples, settings_of({"batchnorm": "restored", **options}, {})), trained


def stored(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items() if v.const_value is not None}


def test_what_is_put_behind_layers_changes_nothing_at_first() -> None:
    model = net()
    found, trained = prepared(model)
    assert [one.layer.weight for one in found.restored] == ["w1", "w2", "w3"]
    values = {name: value.detach() for name, value in values_of(trained).items()}
    for name, value in found.values(values).items():
        assert torch.allclose(value, values[name], atol=1e-6), name
    # the samples that were measured are one batch here: normalizing it by its own statistics gives it back
    interpreter = Interpreter(model)
    with torch.no_grad():
        plain = interpreter.run(samples()[0], values)["y"]
        normalized = interpreter.run(samples()[0], values, None, found.operators())["y"]
    assert torch.allclose(plain, normalized, atol=1e-4)


def test_a_channel_that_is_always_the_same_trains_on() -> None:
    model = net()
    weight = model.graph.initializers["w1"]
    dead = weight.const_value.numpy().copy()
    dead[2] = 0
    weight.const_value = ir.tensor(dead, name="w1")
    found, trained = prepared(model)
    values = {name: value.detach() for name, value in values_of(trained).items()}
    for name, value in found.values(values).items():
        assert torch.allclose(value, values[name], atol=1e-6), name
    done = finetune(model, *samples(), epochs=2, batchnorm="restored", validation=0)
    assert all(np.isfinite(array).all() for array in stored(done.model).values())


EXPANDED = """{ c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  c2 = BatchNormalization (c, c_scale, c_shift, c_mean, c_variance)
  r = Relu (c2)  t = ConvTranspose (r, w2, b2)  t2 = BatchNormalization (t, t_scale, t_shift, t_mean, t_variance)
  f = Flatten (t2)  h = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, w3, b3)
  h2 = BatchNormalization (h, h_scale, h_shift, h_mean, h_variance)  s = Relu (h2)  y = Gemm (s, w4, b4) }"""


def scores(model: ir.Model, count: int = 12) -> np.ndarray:
    with runtime.open_session(model, optimized=False) as session:
        return np.asarray(session.run({"x": samples(count)[0]["x"]})["y"])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_folded_layers_compute_what_the_runtime_computes_of_layers_and_batchnorms(seed: int) -> None:
    model = net(seed=seed % 7)
    found, trained = prepared(model)
    rng = np.random.default_rng(seed)
    inner = {name: leaf.leaf for name, leaf in found.leaves.items()} | found.buffers
    numbers = {}
    for name, tensor in inner.items():
        low = 0.1 if name.endswith("variance") else -2
        numbers[name.replace(" ", "_")] = rng.uniform(low, 2, tensor.shape).astype(np.float32)
        tensor.data.copy_(torch.from_numpy(numbers[name.replace(" ", "_")]))
    expanded = net(HEADER + EXPANDED, {**SHAPES, **{name: array.shape for name, array in numbers.items()}})
    for name, array in (stored(model) | numbers).items():
        expanded.graph.initializers[name].const_value = ir.tensor(array, name=name)
    folded = with_parameters(model, found.values({n: v.detach() for n, v in values_of(trained).items()}))
    assert np.allclose(scores(expanded), scores(folded), rtol=1e-3, atol=1e-3)


def test_running_statistics_follow_the_batches() -> None:
    model = net()
    found, trained = prepared(model)
    one = found.restored[0]
    before = one.statistics.mean.clone(), one.statistics.variance.clone()
    moved = {"x": 2 * samples()[0]["x"] + 1}
    values = values_of(trained)
    Interpreter(model).run(moved, values, None, found.operators())
    with torch.no_grad():
        output = Interpreter(model).run(moved, values, ["c"])["c"]
    mean, variance = output.mean(dim=(0, 2, 3)), output.var(dim=(0, 2, 3))
    assert torch.allclose(one.statistics.mean, 0.9 * before[0] + 0.1 * mean, atol=1e-5)
    assert torch.allclose(one.statistics.variance, 0.9 * before[1] + 0.1 * variance, rtol=1e-4)


def test_a_vector_alone_goes_by_the_running_statistics() -> None:
    model = net()
    found, trained = prepared(model)
    values = values_of(trained)
    with torch.no_grad():
        alone = {"x": samples()[0]["x"][:1]}
        one = {name: each for name, each in found.operators().items() if name == "h"}
        expected, got = (Interpreter(model).run(alone, values, None, instead)["y"] for instead in ({}, one))
    assert torch.allclose(expected, got, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "batchnorm"),
    [
        ("h = Gemm (x, w, b)  y = Sigmoid (h)", "restored"),
        ("h = MatMul (x, w)  n = BatchNormalization (h, b, b, mean, var)  y = Sigmoid (n)", "batch"),
    ],
)
def test_gradients_are_those_of_finite_differences(layer: str, batchnorm: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (double[n, 3] x) => (double[n, 2] y)
        <double[3, 2] w = {{1, 2, -1, 0.5, 3, -2}}, double[2] b = {{1, 2}}, double[2] mean = {{0, 1}},
         double[2] var = {{1, 3}}> {{ {layer} }}"""
    model = models.load(onnx.parser.parse_model(text))
    trained = {name: trainable(p) for name, p in find_parameters(model).items()}
    feed = {"x": np.random.default_rng(0).standard_normal((5, 3))}
    examples = load_examples(model, feed, None)
    behind = ["w"] if batchnorm == "restored" else []
    options = settings_of({"batchnorm": batchnorm, "batchnorm_behind": behind}, {})
    found = normalizing(model, trained, examples, options)
    leaves = {name: each.leaf for name, each in trained.items() if name not in found.idle}
    leaves |= {name: each.leaf for name, each in found.leaves.items()}
    assert all(leaf.dtype == torch.float64 for leaf in leaves.values())

    def total(*values: torch.Tensor) -> torch.Tensor:
        return (Interpreter(model).run(feed, values_of(trained), None, found.operators())["y"] ** 2).sum()

    assert torch.autograd.gradcheck(total, tuple(leaves.values()))


def test_training_leaves_the_graph_and_all_but_the_weights_alone(tmp_path: Path) -> None:
    model = net()
    onnxopt.save(model, tmp_path / "before.onnx")
    found = finetune(model, *samples(), epochs=10, learning_rate=0.02, batchnorm="restored", validation=0)
    assert found.restored == ("w1", "w2", "w3") and any("behind 3 layers" in s for s in found.sentences())
    onnxopt.save(found.model, tmp_path / "after.onnx")
    before, after = onnx.load(tmp_path / "before.onnx"), onnx.load(tmp_path / "after.onnx")
    for one, two in zip(before.graph.initializer, after.graph.initializer, strict=True):
        assert one.raw_data != two.raw_data
        two.raw_data = one.raw_data
    assert after.SerializeToString() == before.SerializeToString()
    right = scores(found.model, 60).argmax(axis=1) == samples()[1]
    assert right.mean() > 0.9 > (scores(model, 60).argmax(axis=1) == samples()[1]).mean()


@pytest.mark.parametrize(("batchnorm", "changes"), [("frozen", False), ("batch", True)])
def test_statistics_of_the_graph_stay_or_follow(batchnorm: common.BatchNorm, changes: bool) -> None:
    model = normalized_net()
    found = finetune(model, *samples(), epochs=2, learning_rate=0.01, batchnorm=batchnorm, validation=0)
    old, new = stored(model), stored(found.model)
    assert all((not np.array_equal(old[name], new[name])) == changes for name in ("mean", "var"))
    assert found.running == (("n",) if changes else ()) and not np.array_equal(old["scale"], new["scale"])


class Interrupts(Silent):
    """Interrupts at the beginning of an epoch."""

    def stage(self, text: str, total: int | None = None) -> None:
        if text.startswith("epoch 4"):
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    given_: dict[str, Any] = {
        "epochs": 6,
        "learning_rate": 0.02,
        "batchnorm": "restored",
        "validation": 0,
        "blend": 0.7,
    }
    whole = finetune(net(), *samples(), **given_)
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), *samples(), **given_, checkpoint=checkpoint, progress=Interrupts())
    rest = finetune(net(), *samples(), **given_, checkpoint=checkpoint)
    assert rest.resumed == 3
    assert all(np.array_equal(array, stored(whole.model)[name]) for name, array in stored(rest.model).items())


def test_layers_that_cannot_take_a_factor_up_are_left_alone() -> None:
    text = (
        HEADER
        + """{ a = Conv (x, shared, b1)  b = Conv (x, shared, b1)  c = Add (a, b)
        d = Conv (c, w2)  e = Conv <group = 2> (d, w3, b3)  f = ConvTranspose <group = 2> (e, w4, b4)
        n = InstanceNormalization (g, scale, shift)  g = Conv (f, w5, b5)  h = Flatten (n)  y = Gemm (h, w6, b6) }"""
    )
    text = text.replace(
        "n = InstanceNormalization (g, scale, shift)  g = Conv (f, w5, b5)",
        "g = Conv (f, w5, b5)  n = InstanceNormalization (g, scale, shift)",
    )
    shapes = {
        "shared": (4, 2, 1, 1),
        "b1": (4,),
        "w2": (4, 4, 1, 1),
        "w3": (4, 2, 1, 1),
        "b3": (4,),
        "w4": (4, 2, 1, 1),
    }
    shapes |= {"b4": (4,), "w5": (4, 4, 1, 1), "b5": (4,), "scale": (4,), "shift": (4,), "w6": (100, 3), "b6": (3,)}
    model = net(text, shapes)
    trained = {name: trainable(p) for name, p in find_parameters(model).items()}
    assert [layer.weight for layer in layers_without(model, trained)] == ["w3", "w6"]
    del trained["b3"]
    assert [layer.weight for layer in layers_without(model, trained)] == ["w6"]


def test_zeros_of_pruned_weights_stay() -> None:
    model = net()
    pruned = stored(model)["w1"].copy()
    pruned[:, :, 0] = 0
    model = with_parameters(model, {"w1": pruned})
    found = finetune(model, *samples(), epochs=2, learning_rate=0.02, batchnorm="restored", validation=0)
    assert np.array_equal(stored(found.model)["w1"] == 0, pruned == 0) and "w1" in found.restored


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"batchnorm": "always"}, 'batchnorm must be frozen, batch, restored, not "always"'),
        ({"batchnorm": "batch"}, "The model has no BatchNormalization with statistics of its own"),
        ({"batchnorm_behind": ["w1"]}, 'batchnorm_behind is for batchnorm "restored"'),
        ({"batchnorm": "restored", "batchnorm_behind": ["w9*"]}, 'batchnorm_behind "w9.*" fits no weights'),
        ({"batchnorm": "restored", "batch": 1}, "needs statistics of batches, and there is one sample at a time"),
        ({"batchnorm": "restored", "freeze": ["b*"]}, "There is no layer that a BatchNormalization can be put behind"),
    ],
)
def test_refusals(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(net(), *samples(), **given_)


def test_a_pattern_takes_the_last_layer_too() -> None:
    found, _ = prepared(net(), batchnorm_behind=["w[14]"])
    assert [one.layer.weight for one in found.restored] == ["w1", "w4"]
