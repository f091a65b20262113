"""Constants stored in 16 bits."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxopt
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, Guarantee
from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes
from onnxopt.model import load, save
from onnxopt.passes.quantize.store_float16 import StoreFloat16

HEAD = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>'


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def declare(text, arrays, head=HEAD):
    proto = onnx.parser.parse_model(f"{head} {text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    return ir.from_proto(proto)


def plain(array=None, head=HEAD):
    array = random(64, 48) if array is None else array
    text = f"g (float[n,{array.shape[0]}] x) => (float[n,{array.shape[1]}] y) {{ y = MatMul(x, w) }}"
    return declare(text, {"w": array}, head)


def apply(model, **options):
    """Apply every edit; return the summaries and the reasons of refusals, by site."""
    edits, refusals = {}, {}
    ctx = Context(target="portable", seed=0, evaluate=lambda node, inputs, opset: None, shapes=Shapes(model))
    for found in StoreFloat16(**options).run(model, ctx):
        if isinstance(found, Edit):
            found.apply()
            edits[str(found.site)] = found.summary
        else:
            refusals[found.site.output] = found.reason
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return edits, refusals


def ops(model):
    return dict(collections.Counter(node.op_type for node in all_nodes(model)))


def session(model, path=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def run(model, **feed):
    return session(model).run(None, feed)[0]


def content(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_promises_what_it_keeps():
    assert StoreFloat16.guarantee is Guarantee.APPROXIMATE
    assert not StoreFloat16().wants_data()


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_the_result_is_near_and_the_runtime_folds_the_cast_away(dtype, error, tmp_path):
    model, original = plain(), plain()
    edits, refusals = apply(model, dtype=dtype)
    assert edits == {"store-float16 at w": f"float32[64,48] stored as {dtype}, 12,288 to 6,144 bytes"}
    assert not refusals
    assert ops(model) == {"Cast": 1, "MatMul": 1}
    assert [v.const_value.nbytes for v in model.graph.initializers.values()] == [6144]
    x = random(5, 64, seed=1)
    got, expected = run(model, x=x), run(original, x=x)
    assert 0 < np.linalg.norm(got - expected) < error * np.linalg.norm(expected)
    session(model, tmp_path / "m.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node] == ["MatMul"]


def test_the_file_is_half(tmp_path):
    model = plain(random(512, 512))
    save(model, tmp_path / "before.onnx")
    apply(model)
    save(model, tmp_path / "after.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("after", "before")]
    assert sizes[0] < 0.502 * sizes[1]
    assert run(load(tmp_path / "after.onnx"), x=random(2, 512)).shape == (2, 512)


def test_tied_weights_stay_tied():
    text = "g (int64[n] i) => (float[n,60] y) { h = Gather(w, i) t = Transpose(w) y = MatMul(h, t) }"
    model, original = declare(text, {"w": random(60, 32)}), declare(text, {"w": random(60, 32)})
    assert len(apply(model)[0]) == 1
    assert ops(model)["Cast"] == 1
    assert list(model.graph.initializers) == ["w/float16"]
    np.testing.assert_allclose(run(model, i=np.arange(4)), run(original, i=np.arange(4)), rtol=0.02, atol=0.02)


def test_scales_of_quantized_weights_too():
    text = "g (float[n,256] x) => (float[n,256] y) { y = MatMul(x, w) }"
    passes = "quantize-matmul{block=32,min_elements=1},store-float16"
    proto = ir.to_proto(declare(text, {"w": random(256, 256)}))
    made = onnxopt.optimize(proto, passes=passes, target="cpu", max_error=0.5, measure=False)
    assert [p.status for p in made.report.passes] == ["kept", "kept"]
    assert ops(made.model) == {"Cast": 1, "MatMulNBits": 1}


def test_nested_graphs_and_functions():
    values = ",".join(f"{v:.5f}" for v in random(32, 40).reshape(-1))
    head = HEAD.replace("]>", ', "local" : 1]>')
    text = f"""g (float[5,32] x, bool c) => (float[5,40] y) {{
            h = local.layer(x)
            z = If (c) <
                then_branch = thens () => (float[5,40] a) {{ a = MatMul(x, w) }},
                else_branch = elses () => (float[5,40] b) {{
                    m = Constant<value = float[32,40] {{{values}}}>() b = MatMul(x, m) }}
            >
            y = Add(h, z)
        }}
        <domain: "local", opset_import: ["" : 18]>
        layer (x) => (y) {{ k = Constant<value = float[32,40] {{{values}}}>() y = MatMul(x, k) }}"""

    def build():
        return declare(text, {"w": random(32, 40)}, head)

    model, original = build(), build()
    edits, refusals = apply(model)
    assert len(edits) == 3
    assert not refusals
    assert ops(model)["Cast"] == 3
    for c in (True, False):
        feed = {"x": random(5, 32, seed=1), "c": np.array(c)}
        np.testing.assert_allclose(run(model, **feed), run(original, **feed), atol=0.05)


def test_a_second_run_changes_nothing_and_a_clone_is_not_touched():
    model = plain()
    clone = model.clone()
    before = content(clone)
    apply(model)
    assert content(clone) == before
    after = content(model)
    assert apply(model) == ({}, {})
    assert content(model) == after


SMALL = "its values are so small that float16 would lose their precision"


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (random(64, 48) * 1e5, "a value is too large for float16"),
        (random(64, 48) * 1e-6, SMALL),
        (np.where(random(64, 48) > 1, 1e-9, random(64, 48)).astype(np.float32), SMALL),
        (np.full((64, 48), np.inf, np.float32), "it holds NaN or infinity"),
    ],
)
def test_what_float16_cannot_hold_is_refused(array, reason):
    model = plain(array)
    before = content(model)
    assert apply(model) == ({}, {"w": reason})
    assert content(model) == before


@pytest.mark.parametrize("factor", [1e5, 1e-6])
def test_bfloat16_holds_every_range(factor):
    assert len(apply(plain(random(64, 48) * np.float32(factor)), dtype="bfloat16")[0]) == 1


def test_zeros_are_no_loss():
    assert len(apply(plain(np.zeros((64, 48), np.float32)))[0]) == 1


@pytest.mark.parametrize(
    ("opset", "options", "reason"),
    [
        (5, {}, "Cast from float16 needs opset 6, and this graph has 5"),
        (12, {"dtype": "bfloat16"}, "Cast from bfloat16 needs opset 13, and this graph has 12"),
    ],
)
def test_old_opsets_are_refused(opset, options, reason):
    assert apply(plain(head=HEAD.replace("18", str(opset))), **options) == ({}, {"w": reason})


def test_what_others_see_is_refused():
    text = "g (float[n,64] x, float[64,48] v) => (float[n,48] y, float[n,48] z, float[64,48] w) { y = MatMul(x, w) z = MatMul(x, v) }"
    model = declare(text, {"w": random(64, 48), "v": random(64, 48)})
    edits, refusals = apply(model)
    assert not edits
    assert refusals == {
        "v": "it is also an input of the graph, so the caller can override it",
        "w": "it is an output of the graph",
    }


def test_small_and_other_tensors_stay():
    assert apply(plain(), min_elements=64 * 48 + 1) == ({}, {})
    text = "g (double[n,64] x) => (double[n,48] y) { y = MatMul(x, w) }"
    assert apply(declare(text, {"w": random(64, 48).astype(np.float64)})) == ({}, {})


def test_large_tensors_are_converted_when_they_are_read():
    model = plain(random(512, 512))
    apply(model)
    (value,) = model.graph.initializers.values()
    assert isinstance(value.const_value, ir.LazyTensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, 'store-float16: dtype is "float8"; use float16 or bfloat16.'),
        ({"min_elements": 0}, "store-float16: min_elements is 0; use 1 or more."),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(UsageError) as error:
        StoreFloat16(**options)
    assert str(error.value) == message


def test_options_are_documented():
    for field in dataclasses.fields(StoreFloat16):
        assert f"        {field.name}: " in f"    {StoreFloat16.__doc__}"
