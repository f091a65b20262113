import numpy as np
import onnx
import pytest

SPEC = "merge-consecutive-linear"


def model(body, *, inputs="float[n,4] x", outputs="float y", opset=17, **shapes):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32) if isinstance(shape, tuple) else np.asarray(shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


# Matrices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = MatMul(x, w) y = MatMul(a, v)", {"MatMul": 1}),
        ("a = MatMul(x, w) b = Add(a, c) y = MatMul(b, v)", {"MatMul": 1, "Add": 1}),
        ("a = Gemm(x, w, c) y = Gemm(a, v, d)", {"Gemm": 1}),
        ("a = Gemm <alpha = 2.0, beta = 0.5> (x, w, c) y = Gemm <alpha = 3.0, transB = 1> (a, t, d)", {"Gemm": 1}),
        ("a = MatMul(x, w) y = Gemm <beta = 2.0> (a, v, d)", {"Gemm": 1}),
        ("a = Gemm(x, w) y = MatMul(a, v)", {"Gemm": 1}),
    ],
)
def test_matrices(rewritten, body, ops):
    given = {"w": (4, 6), "v": (6, 5), "t": (5, 6), "c": (6,), "d": (5,)}
    proto = model(body, **{name: shape for name, shape in given.items() if f"{name})" in body or f" {name}," in body})
    found = rewritten(proto, SPEC)
    assert found.ops == ops
    assert found.nodes[0].inputs[1].shape == (4, 5)


def test_three_in_a_row(rewritten):
    body = "a = MatMul(x, w) b = MatMul(a, v) y = MatMul(b, u)"
    found = rewritten(model(body, inputs="float[2,n,4] x", w=(4, 8), v=(8, 8), u=(8, 3)), SPEC)
    assert found.ops == {"MatMul": 1}


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        ("a = MatMul(x, w) y = MatMul(a, v)", {"w": (4, 1), "v": (1, 4)}, "smaller than their product"),
        ("a = MatMul(x, w) b = MatMul(a, w) y = Add(b, a)", {"w": (4, 4)}, None),
        ("a = MatMul(x, w) y = MatMul(a, w)", {"w": (4, 4)}, "used elsewhere, too"),
        ("a = Gemm(x, w, c) y = MatMul(a, v)", {"w": (4, 6), "v": (6, 5), "c": (2, 1)}, "one number per channel"),
        ("a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", {"w": (4, 6), "v": (6, 5)}, None),
    ],
)
def test_matrices_that_stay(rewritten, body, shapes, reason):
    found = rewritten(model(body, inputs="float[2,4] x", **shapes), SPEC)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals) if reason else not found.refusals


def test_what_is_computed_stays(rewritten):
    proto = model("a = MatMul(x, w) y = MatMul(a, z)", inputs="float[2,4] x, float[6,5] z", w=(4, 6))
    assert rewritten(proto, SPEC).edits == 0


def test_a_matrix_and_a_stack_of_matrices(rewritten):
    """A Gemm takes matrices only."""
    body = "a = MatMul(x, w) r = Reshape(a, s) y = Gemm(r, v)"
    proto = model(body, inputs="float[2,3,4] x", w=(4, 6), v=(6, 5), s=np.array([6, 6]))
    assert rewritten(proto, SPEC).edits == 0


# Convolutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        ("a = Conv(x, w) y = Conv(a, v, b)", {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "b": (4,)}),
        ("a = Conv(x, w, b) y = Conv(a, v)", {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "b": (6,)}),
        ("a = Conv <pads = [1, 1, 1, 1]> (x, w, b) y = Conv(a, v)", {"w": (9, 3, 3, 3), "v": (4, 9, 1, 1), "b": (9,)}),
        (
            "a = Conv <pads = [1, 0, 1, 1], strides = [2, 1], dilations = [1, 2]> (x, w) y = Conv <strides = [1, 2]> (a, v)",
            {"w": (9, 3, 3, 3), "v": (4, 9, 1, 1)},
        ),
        ('a = Conv <auto_pad = "SAME_UPPER"> (x, w) y = Conv(a, v)', {"w": (9, 3, 3, 3), "v": (4, 9, 1, 1)}),
        ("a = Conv(x, w, b) y = Conv <strides = [2, 2]> (a, v)", {"w": (9, 3, 1, 1), "v": (4, 9, 3, 3), "b": (9,)}),
        ("a = Conv(x, w) y = Conv <pads = [1, 1, 1, 1]> (a, v)", {"w": (9, 3, 1, 1), "v": (4, 9, 3, 3)}),
        ("a = Conv(x, w) b = Add(a, c) y = Conv(b, v)", {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "c": (6, 1, 1)}),
    ],
)
def test_convolutions(rewritten, body, shapes):
    found = rewritten(model(body, inputs="float[1,3,8,9] x", **shapes), SPEC)
    assert found.ops == {"Conv": 1}


def test_one_dimension(rewritten):
    proto = model("a = Conv(x, w) y = Conv(a, v)", inputs="float[1,3,8] x", w=(9, 3, 3), v=(4, 9, 1))
    assert rewritten(proto, SPEC).ops == {"Conv": 1}


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        ("a = Conv(x, w) y = Conv(a, v)", {"w": (2, 3, 1, 1), "v": (9, 2, 3, 3)}, "smaller than their product"),
        ("a = Conv(x, w, b) y = Conv <pads = [1, 1, 1, 1]> (a, v)",
         {"w": (9, 3, 1, 1), "v": (4, 9, 3, 3), "b": (9,)}, "pads with zeros"),
        ("a = Conv <strides = [2, 2]> (x, w) y = Conv(a, v)", {"w": (9, 3, 1, 1), "v": (4, 9, 3, 3)}, "single pixels"),
        ("a = Conv(x, w) y = Conv(a, v)", {"w": (9, 3, 3, 3), "v": (4, 9, 3, 3)}, "single pixels"),
        ('a = Conv <auto_pad = "SAME_UPPER"> (x, w) y = Conv <strides = [2, 2]> (a, v)',
         {"w": (9, 3, 3, 3), "v": (4, 9, 1, 1)}, "how far it steps"),
        ("a = Conv <group = 3> (x, w) y = Conv(a, v)", {"w": (3, 1, 3, 3), "v": (1, 3, 1, 1)}, None),
    ],
)  # fmt: skip
def test_convolutions_that_stay(rewritten, body, shapes, reason):
    found = rewritten(model(body, inputs="float[1,3,8,9] x", **shapes), SPEC)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals) if reason else not found.refusals


def test_nested_graphs(rewritten):
    body = """k = MatMul(x, w) y = If (p) <
        then_branch = t () => (float[n,5] a) { a = MatMul(k, v) },
        else_branch = e () => (float[n,5] b) { c = MatMul(x, u) b = MatMul(c, s) }>"""
    proto = model(body, inputs="float[n,4] x, bool p", w=(4, 6), v=(6, 5), u=(4, 6), s=(6, 5))
    assert rewritten(proto, SPEC).ops == {"MatMul": 3, "If": 1}
