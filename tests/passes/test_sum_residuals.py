import numpy as np
import onnx
from onnx import numpy_helper

import onnxopt
from onnxopt.passes.fuse import residuals

PASSES = "sum-residuals,remove-dead-code"


def model(nodes, outputs="float[B,S,16] y"):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[B,S,16] x, float[B,S,16] r) => ({outputs}) {{ {nodes} }}'
    )
    rng = np.random.default_rng(0)
    for name in ("w", "g", "b"):
        shape = (16, 16) if name == "w" else (16,)
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return proto


NORM = "y = LayerNormalization<axis=-1>(s, g, b)"


def test_residual_and_bias_become_one_sum(rewritten):
    found = rewritten(model(f"h = MatMul(x, w) hb = Add(b, h) s = Add(hb, r) {NORM}"), PASSES, target="cpu")
    assert found.ops == {"MatMul": 1, "Sum": 1, "LayerNormalization": 1}
    assert [v.name for v in next(n for n in found.nodes if n.op_type == "Sum").inputs] == ["b", "h", "r"]


def test_residual_alone(rewritten):
    assert rewritten(model(f"s = Add(x, r) {NORM}"), PASSES, target="cpu").ops == {"Sum": 1, "LayerNormalization": 1}


def test_sums_the_runtime_does_not_fuse_stay(rewritten):
    found = rewritten(
        model(f"s = Add(x, r) {NORM} z = Neg(s)", "float[B,S,16] y, float[B,S,16] z"), PASSES, target="cpu"
    )
    assert found.ops["Add"] == 1
    assert "the sum is used elsewhere too, so that the runtime does not fuse it" in found.refusals
    found = rewritten(model(f"s = Add(x, b) {NORM}"), PASSES, target="cpu")
    assert found.ops["Add"] == 1


def skipped(target):
    result = onnxopt.optimize(
        model(f"s = Add(x, r) {NORM}"), passes="sum-residuals", target=target, verify=False, measure=False
    )
    return [p.reason for p in result.report.passes if p.status == "skipped"]


def test_only_where_the_runtime_was_measured_to_be_slower(monkeypatch):
    assert skipped("portable") == ["it is for the target cpu, not for portable"]
    assert skipped("cuda") == ["it is for the target cpu, not for cuda"]
    assert skipped("cpu") == []
    monkeypatch.setattr(residuals.kernels, "RATIOS", {})
    assert skipped("cpu") == ["the runtime's fusion is not slower"]
