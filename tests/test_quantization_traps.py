"""What must never happen when a model is quantized, over every quantizing pass that is registered.

Each trap is a model and inputs. A pass may refuse it, with a reason; it may not crash, nor make a model that is invalid,
does not run, has NaN or infinities where the original has none, or computes something else. No judge stands behind the
passes here: what they make is what is looked at.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.feeds import load_data
from onnxopt.runtime import RunOptions, open_session
from onnxopt.search import hunt, lab

Feed = dict[str, np.ndarray]
N = 128
"""Large enough for every pass to think a layer worth it."""

PASSES: dict[str, tuple[str, str]] = {
    "quantize-static": ("quantize-static", "cpu"),
    "approximate-gelu, quantize-static": ("approximate-gelu,quantize-static", "cpu"),
    "quantize-dynamic": ("quantize-dynamic", "cpu"),
    "quantize-dynamic, portable": ("quantize-dynamic", "portable"),
    "quantize-dynamic, corrected": ("quantize-dynamic{correct_bias=true}", "cpu"),
    "smooth-activations": ("smooth-activations", "cpu"),
    "smooth-activations, quantize-dynamic": ("smooth-activations,quantize-dynamic", "cpu"),
    "quantize-matmul": ("quantize-matmul{bits=8}", "cpu"),
    "quantize-matmul, 4 bits": ("quantize-matmul{bits=4}", "cpu"),
    "quantize-weights": ("quantize-weights", "portable"),
    "quantize-weights, dequantized": ("quantize-weights{form=dequantize}", "portable"),
    "quantize-weights, with zero points": ("quantize-weights{mode=minmax}", "portable"),
    "quantize-weights, float8": ("quantize-weights{mode=float8}", "portable"),
    "quantize-weights, learnt": ("quantize-weights{method=gptq,block=32}", "portable"),
    "quantize-matmul, learnt": ("quantize-matmul{bits=8,method=gptq}", "cpu"),
    "store-float16": ("store-float16", "portable"),
    "convert-float16": ("convert-float16", "cuda"),
}
"""How each pass is run: pipeline and target."""


@dataclasses.dataclass(frozen=True)
class Trap:
    """A model, inputs to learn from and to compare on, and by how much of an output's range it may deviate."""

    model: onnx.ModelProto
    feeds: list[Feed]
    allowed: float = 0.15


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(np.float32)


def proto(text: str, *, opset: int = 18, more: str = "", **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{more}]> {text}')
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def inputs(*shape: int, count: int = 4, name: str = "x", **more: Any) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [{name: rng.standard_normal(shape).astype(np.float32), **more} for _ in range(count)]


def contrib_operators() -> Trap:
    text = """g (float[n,128] x) => (y) {
        a = MatMul(x, w)  b = com.microsoft.Gelu(a)  c = MatMul(b, v)
        d = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (c, x, scale, shift)
        e = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (d, w)  y = MatMul(e, v)
    }"""
    model = proto(
        text.replace("=> (y)", "=> (float[n,128] y)"),
        more=', "com.microsoft" : 1',
        w=weight(N, N),
        v=weight(N, N, seed=1),
        scale=np.ones(N, np.float32),
        shift=np.zeros(N, np.float32),
    )
    return Trap(model, inputs(3, N))


def old_opset(opset: int) -> Trap:
    text = """g (float[n,3,8,8] x) => (float[n,128] y) {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k)  b = Relu(a)
        c = Conv <kernel_shape = [3, 3]> (b, l, m)  r = GlobalAveragePool(c)  d = Flatten(r)
        e = Gemm <transB = 1> (d, w, bias)  f = MatMul(e, v)  y = Add(f, e)
    }"""
    model = proto(
        text,
        opset=opset,
        k=weight(32, 3, 3, 3),
        l=weight(64, 32, 3, 3),
        m=weight(64),
        w=weight(N, 64),
        bias=weight(N),
        v=weight(N, N),
    )
    return Trap(model, inputs(2, 3, 8, 8))


def gelu_between_convolutions() -> Trap:
    """One that is an output as well, and one whose input has another use."""
    text = """g (float[n,3,8,8] x) => (float[n,64,6,6] y, float[n,32,8,8] b) {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k)  b = Gelu(a)
        c = Conv <kernel_shape = [3, 3]> (b, l)  d = Gelu(c)  y = Add(d, c)
    }"""
    model = proto(text, opset=20, k=weight(32, 3, 3, 3), l=weight(64, 32, 3, 3))
    # The range of the one is not seen on the few samples to learn from, and what lies beyond is clipped.
    return Trap(model, inputs(2, 3, 8, 8), allowed=0.3)


def tied_weights() -> Trap:
    text = """g (int64[n] i) => (float[n,200] y) {
        e = Gather(table, i)  h = MatMul(e, w)  t = Transpose(table)  y = MatMul(h, t)
    }"""
    feeds = [{"i": np.arange(5, dtype=np.int64) * 7 + i} for i in range(4)]
    return Trap(proto(text, table=weight(200, N), w=weight(N, N)), feeds)


def two_layers_share_a_weight() -> Trap:
    text = "g (float[n,128] x) => (float[n,128] y) { a = MatMul(x, w)  b = Tanh(a)  c = Gemm <transB = 1> (b, w)  y = Add(c, a) }"
    return Trap(proto(text, w=weight(N, N)), inputs(3, N))


def a_weight_that_is_also_added() -> Trap:
    text = "g (float[128,128] x) => (float[128,128] y) { a = MatMul(x, w)  b = Add(a, w)  c = Neg(w)  y = Sub(b, c) }"
    return Trap(proto(text, w=weight(N, N)), inputs(N, N))


def a_weight_that_is_an_output() -> Trap:
    text = "g (float[n,128] x) => (float[n,128] y, float[128,128] w) { a = MatMul(x, w)  y = Relu(a) }"
    return Trap(proto(text, w=weight(N, N)), inputs(3, N))


def branches() -> Trap:
    text = """g (float[n,128] x, bool c) => (float[n,128] y) {
        h = MatMul(x, w)
        b = If (c) <
            then_branch = t () => (float[p,128] u) { u = MatMul(h, w) },
            else_branch = e () => (float[q,128] v) <float[128,128] z = {%s}> { k = MatMul(h, z)  v = Add(k, x) }>
        y = MatMul(b, w)
    }"""
    numbers = ", ".join(f"{v:.4f}" for v in weight(N, N, seed=3).reshape(-1))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((3, N)).astype(np.float32), "c": np.array(i % 2 == 0)} for i in range(4)]
    return Trap(proto(text % numbers, w=weight(N, N)), feeds)


def loops() -> Trap:
    text = """g (float[2,128] x, int64 times) => (float[2,128] y, float[r,2,128] all) <bool go = {1}> {
        h = MatMul(x, w)
        s, all = Loop (times, go, h) <body = b (int64 i, bool ci, float[2,128] a) => (bool co, float[2,128] z, float[2,128] o) {
            co = Identity(ci)  m = MatMul(a, w)  z = Tanh(m)  o = Identity(z) }>
        y = MatMul(s, w)
    }"""
    return Trap(proto(text, w=weight(N, N)), inputs(2, N, times=np.array(3, np.int64)), 0.3)


def zero_range() -> Trap:
    """Every activation of the middle is zero: dead channels, as Relu leaves them."""
    text = """g (float[n,3,8,8] x) => (float[n,64,8,8] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, k, low)  b = Relu(a)  y = Conv <pads = [1, 1, 1, 1]> (b, l, bias)
    }"""
    model = proto(
        text,
        k=weight(64, 3, 3, 3),
        low=np.full(64, -1e3, np.float32),
        l=weight(64, 64, 3, 3),
        bias=weight(64),
    )
    return Trap(model, inputs(2, 3, 8, 8))


def constant_inputs() -> Trap:
    text = "g (float[n,128] x) => (float[n,128] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }"
    return Trap(proto(text, w=weight(N, N)), [{"x": np.zeros((2, N), np.float32)} for _ in range(4)])


def zero_weights() -> Trap:
    w = weight(N, N)
    w[:, ::2] = 0
    text = "g (float[n,128] x) => (float[n,128] y) { a = MatMul(x, w)  b = MatMul(a, z)  y = Add(b, a) }"
    return Trap(proto(text, w=w, z=np.zeros((N, N), np.float32)), inputs(3, N))


def nan_activations() -> Trap:
    """One row of each batch is NaN in one place; the others must not suffer where the original's do not."""
    feeds = inputs(3, N)
    for feed in feeds[::2]:
        feed["x"][1, 5] = np.nan
    text = "g (float[n,128] x) => (float[n,128] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }"
    return Trap(proto(text, w=weight(N, N)), feeds)


def nan_and_infinite_weights() -> Trap:
    w, v = weight(N, N), weight(N, N)
    w[3, 4], v[5, 6] = np.nan, np.inf
    text = "g (float[n,128] x) => (float[n,128] y, float[n,128] z) { y = MatMul(x, w)  z = MatMul(x, v) }"
    return Trap(proto(text, w=w, v=v), inputs(3, N))


def empty_batches() -> Trap:
    text = """g (float[n,3,8,8] x) => (float[n,128] y) {
        a = Conv(x, k)  b = GlobalAveragePool(a)  d = Flatten(b)  e = Relu(d)  y = MatMul(e, w)
    }"""
    feeds = [*inputs(2, 3, 8, 8, count=2), *inputs(0, 3, 8, 8, count=2)]
    return Trap(proto(text, k=weight(64, 3, 3, 3), w=weight(64, N)), feeds)


def dynamic_axes() -> Trap:
    text = """g (float[n,s,128] x) => (float[n,s,128] y) {
        q = MatMul(x, w)  k = Transpose <perm = [0, 2, 1]> (q)  s = MatMul(q, k)  p = Softmax <axis = -1> (s)
        c = MatMul(p, q)  y = MatMul(c, w)
    }"""
    feeds = [*inputs(1, 3, N, count=1), *inputs(2, 7, N, count=1), *inputs(3, 1, N, count=1), *inputs(1, 9, N, count=1)]
    return Trap(proto(text, w=weight(N, N)), feeds, 0.3)


def undeclared_shapes() -> Trap:
    trap = dynamic_axes()
    for value in (*trap.model.graph.input, *trap.model.graph.output):
        value.type.tensor_type.ClearField("shape")
    return trap


def overridable_weights() -> Trap:
    """The caller gives other weights than the file's."""
    text = "g (float[n,128] x, float[128,128] w) => (float[n,128] y) { a = MatMul(x, w)  y = MatMul(a, v) }"
    other = weight(N, N, seed=9)
    return Trap(proto(text, w=weight(N, N), v=weight(N, N, seed=1)), inputs(3, N, w=other))


def functions() -> Trap:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18, "my" : 1]>
        g (float[n,128] x) => (float[n,128] y) { a = my.Layer(x, w)  b = my.Layer(a, v)  y = MatMul(b, w) }
        <domain: "my", opset_import: ["" : 18]> Layer (x, w) => (y) {
            h = MatMul(x, w)  one = Constant <value_float = 0.5> ()  s = Mul(h, one)  y = Tanh(s)
        }""")
    for name, seed in (("w", 0), ("v", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight(N, N, seed=seed), name))
    return Trap(model, inputs(3, N))


def half_precision() -> Trap:
    model = proto(
        "g (float16[n,128] x) => (float16[n,128] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }",
        w=weight(N, N).astype(np.float16),
    )
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in inputs(3, N)]
    return Trap(model, feeds)


def double_precision() -> Trap:
    model = proto(
        "g (double[n,128] x) => (double[n,128] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }",
        w=weight(N, N).astype(np.float64),
    )
    feeds = [{"x": feed["x"].astype(np.float64)} for feed in inputs(3, N)]
    return Trap(model, feeds)


def recurrent_layers() -> Trap:
    text = """g (float[s,b,64] x) => (float[s,1,b,32] y, float[1,b,32] h) {
        y, h = GRU <hidden_size = 32> (x, w, r)
    }"""
    return Trap(proto(text, w=weight(1, 96, 64), r=weight(1, 96, 32)), inputs(5, 2, 64), 0.3)


def huge_magnitudes() -> Trap:
    """Products beyond the range of float16."""
    text = "g (float[n,128] x) => (float[n,128] y) <float big = {1e6}> { a = MatMul(x, w)  b = Mul(a, big)  y = MatMul(b, w) }"
    return Trap(proto(text, w=weight(N, N)), inputs(3, N))


TRAPS: dict[str, Callable[[], Trap]] = {
    f.__name__: f
    for f in (
        contrib_operators,
        gelu_between_convolutions,
        tied_weights,
        two_layers_share_a_weight,
        a_weight_that_is_also_added,
        a_weight_that_is_an_output,
        branches,
        loops,
        zero_range,
        constant_inputs,
        zero_weights,
        nan_activations,
        nan_and_infinite_weights,
        empty_batches,
        dynamic_axes,
        undeclared_shapes,
        overridable_weights,
        functions,
        half_precision,
        double_precision,
        recurrent_layers,
        huge_magnitudes,
    )
} | {f"opset_{opset}": (lambda opset=opset: old_opset(opset)) for opset in (7, 9, 11, 12)}  # type: ignore[misc]


def run(model: Any, feeds: list[Feed]) -> list[Feed]:
    with open_session(model, RunOptions(), optimized=True) as session:
        return [session.run(feed) for feed in feeds]


@pytest.mark.parametrize("how", PASSES)
@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str, how: str, tmp_path: Path) -> None:
    pipeline, target = PASSES[how]
    trap = TRAPS[name]()
    original = onnxopt.load(trap.model)
    before = ir.to_proto(original).SerializeToString(deterministic=True)
    np.savez(tmp_path / "data.npz", **{f"{i}/{n}": a for i, feed in enumerate(trap.feeds) for n, a in feed.items()})
    result = onnxopt.optimize(
        original,
        passes=pipeline,
        target=target,  # type: ignore[arg-type]
        data=load_data(str(tmp_path / "data.npz"), original),
        verify=False,
        measure=False,
    )
    for done in result.report.passes:
        assert done.status != "dropped" and not done.dropped, (done.reason, [d.reason for d in done.dropped])
        assert done.applied or done.reason or all(reason for reason, _ in done.refusals)
    after = ir.to_proto(result.model)
    if not result.report.applied:
        assert after.SerializeToString(deterministic=True) == before
        return
    if is_valid(trap.model):
        onnx.checker.check_model(after)
    compare(run(original, trap.feeds), run(result.model, trap.feeds), trap.allowed)


def is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def compare(wanted: list[Feed], got: list[Feed], allowed: float) -> None:
    for name in wanted[0]:
        finite = [w[name][np.isfinite(w[name])] for w in wanted]
        extent = max((float(np.ptp(f)) for f in finite if f.size), default=0.0) or 1.0
        for w, g in zip(wanted, got, strict=True):
            assert w[name].shape == g[name].shape and w[name].dtype == g[name].dtype
            ordinary = np.isfinite(w[name])
            assert np.isfinite(g[name][ordinary]).all(), f"{name} is not finite where the original is"
            deviation = np.abs(w[name][ordinary].astype(np.float64) - g[name][ordinary].astype(np.float64))
            assert deviation.max(initial=0.0) <= allowed * extent, f"{name} deviates"


@pytest.mark.parametrize("how", PASSES)
def test_the_traps_are_not_all_refused(how: str, tmp_path: Path) -> None:
    """A pass that refuses everything would pass the others."""
    pipeline, target = PASSES[how]
    for trap in (two_layers_share_a_weight(), old_opset(12), dynamic_axes(), old_opset(11), old_opset(19)):
        np.savez(tmp_path / "data.npz", **{f"{i}/{n}": a for i, feed in enumerate(trap.feeds) for n, a in feed.items()})
        data = load_data(str(tmp_path / "data.npz"), onnxopt.load(trap.model))
        result = onnxopt.optimize(
            trap.model,
            passes=pipeline,
            target=target,
            data=data,
            verify=False,
            measure=False,  # type: ignore[arg-type]
        )
        if result.report.applied:
            return
    pytest.fail(f"{how} found nothing to do")


@pytest.mark.parametrize("name", ["contrib_operators", "opset_9", "tied_weights", "branches", "nan_activations"])
def test_a_whole_search_survives_the_traps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its candidates crashes, and what it ends with computes what the original does."""
    stopwatch = onnxopt.measure

    def short(*models: Any, **options: Any) -> Any:
        return stopwatch(*models, **(options | {"budget_seconds": 0.05, "memory": False}))

    monkeypatch.setattr(importlib.import_module("onnxopt.ground"), "measure_models", short)
    monkeypatch.setattr(lab, "measure", short)
    monkeypatch.setattr(hunt, "CONFIRMING_SECONDS", (0.05,))
    trap = TRAPS[name]()
    np.savez(tmp_path / "data.npz", **{f"{i}/{n}": a for i, feed in enumerate(trap.feeds) for n, a in feed.items()})
    data = load_data(str(tmp_path / "data.npz"), onnxopt.load(trap.model))
    result = onnxopt.optimize(trap.model, target="cpu", data=data, max_error=0.15)
    assert result.report.search is not None
    tried = result.report.search.candidates
    assert len(tried) > 3
    for candidate in tried:
        lost_nan = candidate.reason.startswith("output") and "where the original has NaN" in candidate.reason
        assert candidate.status != "failed" or lost_nan, f"{candidate.name}: {candidate.reason}"
    compare(run(onnxopt.load(trap.model), trap.feeds), run(result.model, trap.feeds), trap.allowed)
