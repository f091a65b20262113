"""GELU that integers can compute."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxopt
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, Guarantee, Refusal
from onnxopt.feeds import load_data
from onnxopt.graph import all_nodes
from onnxopt.passes.quantize.approximate_gelu import ApproximateGelu

WORST = 0.021


def declare(body, opset=20, inputs="float[1,8,6,6] x", weights=("w", "v")):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]> g ({inputs}) => (float[1,8,6,6] y) {{ {body} }}'
    )
    for i, name in enumerate(weights):
        array = np.random.default_rng(i).standard_normal((8, 8, 1, 1)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def apply(model):
    edits, refusals = [], []
    ctx = Context("cpu", 0, lambda node, inputs, opset: None, Shapes(model))
    for found in ApproximateGelu().run(model, ctx):
        if isinstance(found, Edit):
            found.apply()
            edits.append(found.site.output)
        else:
            assert isinstance(found, Refusal)
            refusals.append(found.reason)
    return edits, refusals


def run(model, **feed):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def ops(model):
    return dict(collections.Counter(node.op_type for node in all_nodes(model)))


def test_promises_what_it_keeps():
    assert ApproximateGelu.guarantee is Guarantee.APPROXIMATE


@pytest.mark.parametrize(
    ("gelu", "opset"), [("Gelu", 20), ("Gelu<approximate = 'tanh'>", 20), ("com.microsoft.Gelu", 11)]
)
def test_it_differs_by_two_hundredths_at_most(gelu, opset):
    body = f"c = Conv(x, w) y = {gelu}(c)".replace("'", '"')
    model, original = declare(body, opset, weights="w"), declare(body, opset, weights="w")
    assert apply(model) == (["y"], [])
    assert ops(model) == {"Conv": 1, "Mul": 2, "Sigmoid": 1}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = np.random.default_rng(5).standard_normal((1, 8, 6, 6)).astype(np.float32)
    assert 0 < np.abs(run(model, x=x) - run(original, x=x)).max() <= WORST
    assert apply(model) == ([], []), "a second run finds nothing"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Gelu(x)", "it does not follow a convolution"),
        ("m = MatMul(x, u) y = Gelu(m)", "it does not follow a convolution"),
        ("c = Conv(x, v) y = Gelu(c)", "has no constant weight"),
    ],
)
def test_what_has_no_integers_around_it_stays(body, reason):
    model = declare(body, inputs="float[1,8,6,6] x, float[6,6] u, float[8,8,1,1] v", weights=())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    edits, refusals = apply(model)
    assert not edits
    assert reason in refusals[0]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_nothing_between_the_convolutions_stays_in_floating_point(tmp_path):
    """What it is for: the whole way is computed with integers."""
    model = declare("c = Conv(x, w) g = Gelu(c) y = Conv(g, v)")
    rng = np.random.default_rng(3)
    feeds = [rng.standard_normal((1, 8, 6, 6)).astype(np.float32) for _ in range(8)]
    np.savez(tmp_path / "data.npz", x=np.concatenate(feeds))
    left = {}
    for pipeline in ("quantize-static", "approximate-gelu,quantize-static"):
        data = load_data(str(tmp_path / "data.npz"), model)
        made = onnxopt.optimize(model, passes=pipeline, target="cpu", data=data, verify=False, measure=False).model
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "m.onnx")
        proto = ir.to_proto(onnxopt.load(made)).SerializeToString()
        ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        left[pipeline] = {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
        got, wanted = run(onnxopt.load(made), x=feeds[0]), run(model, x=feeds[0])
        assert np.linalg.norm(got - wanted) < 0.1 * np.linalg.norm(wanted)
    before, after = left.values()
    assert "Gelu" in before
    assert after - {"Transpose"} == {
        "QuantizeLinear",
        "QLinearConv",
        "QLinearMul",
        "QLinearSigmoid",
        "DequantizeLinear",
    }
