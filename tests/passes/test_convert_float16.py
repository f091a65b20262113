"""float16 for cuda; there is no GPU here, so the CPU provider runs the results, partly through Casts of its own."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import onnxopt
from onnxopt.analysis.shapes import Shapes
from onnxopt.errors import UsageError
from onnxopt.feeds import load_data
from onnxopt.graph import all_nodes
from onnxopt.passes.quantize.convert_float16 import ConvertFloat16, to_half

MODELS = Path(__file__).parents[2] / "models"
HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def proto(text: str, *, opset: int = 18, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def weight(*shape: int, scale: float = 0.1, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@dataclasses.dataclass
class Converted:
    model: ir.Model
    report: Any

    @property
    def casts(self) -> dict[ir.DataType, int]:
        return dict(collections.Counter(ir.DataType(n.attributes["to"].value) for n in self.nodes("Cast")))

    def nodes(self, op_type: str) -> list[ir.Node]:
        return [n for n in all_nodes(self.model) if n.op_type == op_type]

    def types(self, op_type: str) -> list[ir.DataType | None]:
        """Return the types that the operators of a kind give."""
        shapes = Shapes(self.model)
        return [shapes.dtype(n.outputs[0]) for n in self.nodes(op_type)]

    @property
    def refusals(self) -> str:
        return "; ".join(reason for reason, _ in self.report.passes[-1].refusals)


def convert(
    model: Any, data: dict[str, np.ndarray] | None = None, tmp: Path | None = None, before: str = "", **options: Any
) -> Converted:
    """Convert a model that must verify; return it with its report."""
    given: dict[str, Any] = {"force_calibration": True}
    if data is not None:
        assert tmp is not None
        np.savez(tmp / "data.npz", **{f"{i}/{n}": a for n, rows in data.items() for i, a in enumerate(rows)})
        given = {"data": load_data(str(tmp / "data.npz"), onnxopt.load(model))}
    passes = f"{before}convert-float16"
    result = onnxopt.optimize(model, passes=passes, target="cuda", measure=False, **given, **options)
    done = result.report.passes[-1]
    assert not done.dropped, done.dropped
    assert done.status != "dropped", done.reason
    assert result.report.verification is not None and result.report.verification.ok, result.report.not_verified
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    return Converted(result.model, result.report)


def test_a_whole_graph_turns_with_casts_at_its_ends() -> None:
    found = convert(
        proto(
            "g (float[n,64] x) => (float[n,64] y) { a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  y = Add(c, b) }",
            w=weight(64, 64),
            v=weight(64, 64, seed=1),
        )
    )
    assert found.casts == {HALF: 1, SINGLE: 1}
    assert {v.name: v.dtype for v in (*found.model.graph.inputs, *found.model.graph.outputs)} == {
        "x": SINGLE,
        "y": SINGLE,
    }
    assert {v.dtype for v in found.model.graph.initializers.values()} == {HALF}
    assert 0 < found.report.verification.worst < 5e-3


def test_a_model_of_this_repository() -> None:
    found = convert(MODELS / "mnist_cnn_bn.onnx", before="fuse-conv-bn,fold-constants,settle-shapes,")
    assert found.casts[HALF] == found.casts[SINGLE] == 1
    assert found.report.verification.worst < 2e-3


def test_what_overflows_stays() -> None:
    """The middle reaches 1e6, and what touches it is not float16; both ends are."""
    found = convert(
        proto(
            """g (float[n,64] x) => (float[n,64] y) <float big = {1e6}, float small = {1e-3}> {
                a = MatMul(x, w)  b = Mul(a, big)  c = Abs(b)  d = Sqrt(c)  e = Mul(d, small)  y = MatMul(e, v)
            }""",
            w=weight(64, 64),
            v=weight(64, 64, seed=1),
        )
    )
    assert found.types("MatMul") == [HALF, HALF]
    assert found.types("Mul")[0] == found.types("Abs")[0] == SINGLE
    assert found.casts == {HALF: 2, SINGLE: 2}
    assert "it computes with a constant of 1e+06; float16 ends at 65,504" in found.refusals
    assert "it computes with values up to" in found.refusals


def test_values_that_come_near_the_limit_stay(tmp_path: Path) -> None:
    text = "g (float[1,64] x) => (float[1,64] y) { a = MatMul(x, w)  b = Mul(a, a)  y = MatMul(b, w) }"
    model = proto(text, w=np.eye(64, dtype=np.float32))
    for size, dtype in ((100.0, HALF), (200.0, SINGLE)):
        found = convert(model, {"x": np.full((4, 1, 64), size, np.float32)}, tmp_path)
        assert found.types("Mul") == [dtype]
    found = convert(model, {"x": np.full((4, 1, 64), 200.0, np.float32)}, tmp_path)
    assert "values up to 4e+04" in found.refusals


def test_constants_too_small_stay() -> None:
    found = convert(
        proto(
            """g (float[n,64] x) => (float[n,64] y) <float eps = {1e-12}> {
                a = MatMul(x, w)  b = Mul(a, a)  c = Add(b, eps)  d = Sqrt(c)  y = Div(a, d)
            }""",
            w=weight(64, 64),
        )
    )
    assert found.types("Add") == [SINGLE]
    assert "it computes with a constant below 6.1e-5" in found.refusals


def test_tied_weights_stay_tied() -> None:
    found = convert(
        proto(
            """g (int64[n] i, float[n,64] x) => (float[n,64] e, float[n,128] y) {
                e = Gather(w, i)  t = Transpose(w)  z = Add(x, e)  y = MatMul(z, t)
            }""",
            w=weight(128, 64),
        )
    )
    assert [v.name for v in found.model.graph.initializers.values()] == ["w_float16"]


def test_a_weight_that_float32_needs_too_is_kept_in_both_types() -> None:
    found = convert(
        proto(
            """g (float[n,64] x, bool c) => (float[n,64] y) {
                a = MatMul(x, w)
                b = If (c) <then_branch = t () => (float[p,64] u) { u = MatMul(a, w) },
                            else_branch = f () => (float[q,64] v) { v = Neg(a) }>
                y = MatMul(b, w)
            }""",
            w=weight(64, 64),
        )
    )
    assert set(found.model.graph.initializers) == {"w", "w_float16"}
    assert found.types("MatMul") == [HALF, SINGLE, HALF] or found.types("MatMul").count(SINGLE) == 1
    assert "If hands values to graphs inside it" in found.refusals


def test_overridable_weights_are_cast_as_they_come() -> None:
    model = proto("g (float[n,64] x, float[64,64] w) => (float[n,64] y) { y = MatMul(x, w) }", w=weight(64, 64))
    found = convert(model)
    assert found.casts == {HALF: 2, SINGLE: 1}
    assert found.model.graph.initializers["w"].dtype == SINGLE


MASKED = """g (float[n,4,64] x, float[n,1,4] keep) => (float[n,4,64] y) <float one = {1}, float low = {-3.4e38}> {
    q = MatMul(x, w)  k = Transpose <perm = [0, 2, 1]> (q)  s = MatMul(q, k)
    gone = Sub(one, keep)  mask = Mul(gone, low)
    m = Add(s, mask)  p = Softmax(m)  y = MatMul(p, q)
}"""


@pytest.mark.parametrize("padded", [True, False])
def test_masks_are_held_within_the_range(tmp_path: Path, padded: bool) -> None:
    """Rows that are masked as a whole come out even, as in float32, whether the data have some or not."""
    model = proto(MASKED, w=weight(64, 64))
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((6, 1, 4, 64)).astype(np.float32)
    keep = np.ones((6, 1, 1, 4), np.float32)
    if padded:
        keep[::2, ..., 2:] = 0
        keep[1] = 0
    found = convert(model, {"x": x, "keep": keep}, tmp_path)
    assert found.types("Softmax") == [HALF]
    assert found.types("Mul") == [SINGLE]
    whole = {"x": x[0], "keep": np.zeros((1, 1, 4), np.float32)}
    some = {"x": x[1], "keep": np.eye(4, dtype=np.float32)[:1, None]}
    for feed in (whole, some):  # by onnx's own evaluator, which rounds to float16 where the CPU provider does not
        wanted, got = (ReferenceEvaluator(m).run(None, feed)[0] for m in (model, ir.to_proto(found.model)))
        np.testing.assert_allclose(got, wanted, atol=0.01)


def test_a_mask_chosen_by_where() -> None:
    found = convert(
        proto(
            """g (float[n,4,64] x, bool[n,1,4] keep) => (float[n,4,64] y) <float low = {-3.4e38}> {
                q = MatMul(x, w)  k = Transpose <perm = [0, 2, 1]> (q)  s = MatMul(q, k)
                m = Where(keep, s, low)  p = Softmax(m)  y = MatMul(p, q)
            }""",
            w=weight(64, 64),
        )
    )
    assert found.types("Where") == found.types("Softmax") == [HALF]
    assert found.casts == {HALF: 1, SINGLE: 1}


def test_positions_and_sizes_stay() -> None:
    found = convert(
        proto(
            """g (float[n,3,h,w] x) => (float[n,4,p,q] y) <float two = {2}> {
                c = Conv(x, k)  s = Shape(c)  f = Cast <to = 1> (s)  d = Mul(f, two)  t = Cast <to = 7> (d)
                a, rest = Split <axis = 0> (t, parts)  o = Concat <axis = 0> (a0, rest)  y = Resize(c, roi, scales, o)
                a0 = Identity(a)
            }""".replace("o = Concat <axis = 0> (a0, rest)", "")
            .replace("a0 = Identity(a)", "")
            .replace("a, rest = Split <axis = 0> (t, parts)", "o = Concat <axis = 0> (nc, t1)")
            .replace("t = Cast <to = 7> (d)", "t = Cast <to = 7> (d)  t1 = Slice(t, at, end)  nc = Slice(s, zero, at)"),
            k=weight(4, 3, 3, 3),
            at=np.array([2], np.int64),
            end=np.array([4], np.int64),
            zero=np.array([0], np.int64),
            roi=np.zeros(0, np.float32),
            scales=np.zeros(0, np.float32),
        )
    )
    assert found.types("Conv") == found.types("Resize") == [HALF]
    assert found.types("Mul") == [SINGLE]
    assert "it computes sizes or positions" in found.refusals


def test_wide_angles_stay() -> None:
    found = convert(
        proto(
            """g (int64[1,s] position, float[1,s,8] x) => (float[1,s,8] y) {
                f = Cast <to = 1> (position)  u = Unsqueeze(f, last)  a = MatMul(u, rates)  c = Cos(a)
                h = MatMul(x, w)  y = Mul(h, c)
            }""",
            last=np.array([2], np.int64),
            rates=np.linspace(1, 100, 8, dtype=np.float32).reshape(1, 1, 8),
            w=weight(8, 8),
        )
    )
    assert found.types("Cos") == [SINGLE]
    assert sorted(str(t) for t in found.types("MatMul")) == ["FLOAT", "FLOAT16"]
    assert "it computes with angles up to" in found.refusals


def test_operators_without_a_kernel_stay() -> None:
    found = convert(
        proto(
            "g (float[n,64] x) => (float[n,64] y) { a = MatMul(x, w)  b = Tan(a)  y = MatMul(b, w) }", w=weight(64, 64)
        )
    )
    assert found.types("Tan") == [SINGLE]
    assert "Tan has no float16 kernel on cuda" in found.refusals


def test_where_nothing_gains_nothing_turns() -> None:
    model = proto("g (float[n,64] x) => (float[n,64] y) { a = Relu(x)  y = Sigmoid(a) }")
    result = onnxopt.optimize(model, passes="convert-float16", target="cuda", measure=False, force_calibration=True)
    assert result.report.passes[-1].status == "unchanged"
    assert "not connected with any layer" in dict(result.report.passes[-1].refusals).popitem()[0]


def test_comparisons_and_shapes_take_what_comes() -> None:
    found = convert(
        proto(
            """g (float[n,64] x) => (bool[n,64] big, int64[2] s, int64[n,64] whole, float[n,64] a) <float one = {1}> {
                a = MatMul(x, w)  big = Greater(a, one)  s = Shape(a)  whole = Cast <to = 7> (a)
            }""",
            w=weight(64, 64),
        ),
        max_error=float("inf"),
    )
    assert found.casts == {HALF: 1, SINGLE: 1, ir.DataType.INT64: 1}
    assert {n.inputs[0].dtype for n in (*found.nodes("Greater"), *found.nodes("Shape"))} == {HALF}


def test_a_denied_node_stays_between_casts() -> None:
    model = proto(
        "g (float[n,64] x) => (float[n,64] y) { a = MatMul(x, w)  [me] b = Sigmoid(a)  y = MatMul(b, w) }",
        w=weight(64, 64),
    )
    result = onnxopt.quantize(
        model, mode="float16", target="cuda", exclude=["me"], simplify=False, measure=False, force_calibration=True
    )
    found = Converted(result.model, result.report)
    assert found.types("Sigmoid") == [SINGLE]
    assert found.casts == {HALF: 2, SINGLE: 2}


def test_functions_and_models_in_float16_are_left_alone() -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18, "my" : 1]>
        g (float16[n,4] x) => (float16[n,4] y) { a = my.F(x)  y = MatMul(a, a) }
        <domain: "my", opset_import: ["" : 18]> F (x) => (y) { y = Neg(x) }""")
    result = onnxopt.optimize(
        model,
        passes="convert-float16",
        target="cuda",
        verify=False,
        measure=False,
        force_calibration=True,
        shape={"n": 4},
    )
    assert not result.report.passes[-1].applied


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 17, 21, 23])
def test_old_and_new_opsets(opset: int) -> None:
    found = convert(
        proto(
            """g (float[n,3,8,8] x) => (float[n,4] y) {
                a = Conv(x, k)  b = Clip(a%s)  c = MaxPool <kernel_shape = [2, 2]> (b)  d = GlobalAveragePool(c)
                e = Flatten(d)  y = Gemm(e, w, bias)
            }"""
            % (", zero, six" if opset >= 11 else ""),
            opset=opset,
            k=weight(4, 3, 3, 3),
            w=weight(4, 4),
            bias=weight(4),
            **({"zero": np.array(0, np.float32), "six": np.array(6, np.float32)} if opset >= 11 else {}),
        )
    )
    assert found.types("Conv") == found.types("Gemm") == [HALF]
    assert found.types("Clip") == [HALF if opset >= 12 else SINGLE]


@pytest.mark.parametrize("target", ["portable", "cpu"])
def test_only_cuda(target: Any) -> None:
    result = onnxopt.optimize(MODELS / "mnist_cnn_bn.onnx", passes="convert-float16", target=target, measure=False)
    assert "it is for the target cuda" in result.report.passes[-1].reason


def test_data_is_needed() -> None:
    result = onnxopt.optimize(MODELS / "mnist_cnn_bn.onnx", passes="convert-float16", target="cuda", measure=False)
    assert "real inputs" in result.report.passes[-1].reason


def test_old_opsets_are_refused() -> None:
    model = proto("g (float[4,4] x) => (float[4,4] y) { y = MatMul(x, x) }", opset=7)
    result = onnxopt.optimize(model, passes="convert-float16", target="cuda", measure=False, force_calibration=True)
    assert result.report.passes[-1].reason == "it needs opset 8, and the model has 7"


def test_the_margin_is_checked() -> None:
    with pytest.raises(UsageError, match="margin is 0.5; use 1 or more"):
        ConvertFloat16(margin=0.5)


def test_to_half() -> None:
    given = np.array([1, 7e4, -3.4e38, np.inf, -np.inf, np.nan, 1e-9], np.float32)
    np.testing.assert_array_equal(to_half(given), np.array([1, 49152, -49152, np.inf, -np.inf, np.nan, 0], np.float16))
