"""What the last operators say about the main output."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxopt.analysis.task import class_scores, main_output


def model(body: str, outputs: str = "float[1, 3] y", weights: str = "float[3, 3] w = {1,2,3,4,5,6,7,8,9}") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[1, 3] x) => ({outputs}) <{weights}> {{ {body} }}'
    )


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Softmax(x)", "Softmax"),
        ("y = Softmax<axis = 1>(x)", "Softmax"),
        ("y = Softmax<axis = 0>(x)", None),
        ("a = LogSoftmax(x) y = Identity(a)", "LogSoftmax"),
        ("y = Gemm(x, w)", "Gemm"),
        ("y = MatMul(x, w)", "MatMul"),
        ("a = MatMul(x, w) y = Add(a, x)", "MatMul"),
        ("a = MatMul(x, w) y = Add(x, a)", "MatMul"),
        ("a = MatMul(x, w) b = Flatten(a) y = Identity(b)", "MatMul"),
        ("a = MatMul(x, w) y = Sigmoid(a)", None),
        ("y = Add(x, x)", None),
        ("e = Exp(x) s = ReduceSum(e) y = Div(e, s)", "Softmax"),
        ("e = Exp(x) s = ReduceSum(e) b = Identity(s) y = Div(e, b)", "Softmax"),
        ("e = Exp(x) s = ReduceSum(x) y = Div(e, s)", None),
        ("y = Div(x, x)", None),
    ],
)
def test_scores_of_classes(body: str, found: str | None) -> None:
    assert class_scores(model(body)) == found


def test_one_number_is_no_class_and_an_unknown_size_may_be_some() -> None:
    assert class_scores(model("y = MatMul(x, w)", "float[1, 1] y", "float[3, 1] w = {1, 2, 3}")) is None
    assert class_scores(model("y = MatMul(x, w)", "float[1, N] y")) == "MatMul"
    assert class_scores(model("a = MatMul(x, w) y = ReduceSum<keepdims = 0>(a)", "float y")) is None


def test_the_main_output_is_the_first_of_floats() -> None:
    two = model("i = ArgMax(x) y = Softmax(x)", "int64[1, 3] i, float[1, 3] y")
    assert main_output(two) is two.graph.outputs[1]
    assert class_scores(two) == "Softmax"
    none = model("y = ArgMax(x)", "int64[1, 3] y")
    assert main_output(none) is None
    assert class_scores(none) is None
