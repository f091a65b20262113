import numpy as np
import onnx
import pytest

SPEC = "unflatten-linear"


def model(body, *, inputs="float[2,n,4] x", outputs="float y", opset=17, dtype=np.float32, **shapes):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    given = {"flat": np.array([-1, 4]), "full": np.array([2, -1, 6])} | shapes
    for name, shape in given.items():
        array = rng.standard_normal(shape).astype(dtype) if isinstance(shape, tuple) else np.asarray(shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


BODY = "a = Reshape(x, flat) b = Gemm {} (a, w{}) y = Reshape(b, full)"


@pytest.mark.parametrize(
    ("attributes", "bias", "ops"),
    [
        ("", ", c", {"MatMul": 1, "Add": 1}),
        ("<alpha = 1.0, beta = 1.0>", ", d", {"MatMul": 1, "Add": 1}),
        ("<beta = 2.0>", "", {"MatMul": 1}),
    ],
)
def test_flattened_and_back(rewritten, attributes, bias, ops):
    found = rewritten(model(BODY.format(attributes, bias), w=(4, 6), c=(6,), d=(1, 6)), SPEC)
    assert found.ops == ops


def test_a_transposed_weight(rewritten):
    found = rewritten(model(BODY.format("<transB = 1>", ", c"), w=(6, 4), c=(6,)), SPEC)
    assert found.ops == {"MatMul": 1, "Add": 1}
    assert found.nodes[0].inputs[1].shape == (4, 6)


def test_flatten(rewritten):
    body = "a = Flatten <axis = 2> (x) b = Gemm(a, w) y = Reshape(b, full)"
    assert rewritten(model(body, w=(4, 6)), SPEC).ops == {"MatMul": 1}


def test_heads_that_are_put_together(rewritten):
    """What is flattened has more axes than what comes out."""
    body = "t = Transpose <perm = [0, 2, 1, 3]> (x) a = Reshape(t, flat) b = Gemm(a, w, c) y = Reshape(b, full)"
    proto = model(body, inputs="float[2,2,n,2] x", w=(4, 6), c=(6,))
    assert rewritten(proto, SPEC).ops == {"Transpose": 1, "Reshape": 1, "MatMul": 1, "Add": 1}


def test_several_on_one_input(rewritten):
    body = """a = Reshape(x, flat) b = Gemm(a, w, c) y = Reshape(b, full)
        e = Gemm(a, v, c) z = Reshape(e, full)"""
    found = rewritten(model(body, outputs="float y, float z", w=(4, 6), v=(4, 6), c=(6,)), SPEC)
    assert found.ops == {"MatMul": 2, "Add": 2}


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        (BODY.format("<alpha = 2.0>", ", c"), {"c": (6,)}, "multiplies by a number"),
        (BODY.format("<beta = 2.0>", ", c"), {"c": (6,)}, "multiplies by a number"),
        (BODY.format("", ", c"), {"c": (6, 1)}, "from row to row"),
        (BODY.format("", "") + " z = Neg(b)", {}, "flat form"),
        ("a = Reshape(x, flat) b = Gemm(a, w) y = Reshape(b, half)", {"half": np.array([2, -1, 3])}, "as they are"),
        ("a = Reshape(x, flat) b = Gemm(a, w) y = Reshape(b, flat6)", {"flat6": np.array([-1, 6])}, "as they are"),
        ("a = Reshape(x, flat) v = Neg(w) b = Gemm <transB = 1> (a, u) y = Reshape(b, full) z = Neg(u)", {"u": (6, 4)},
         "transposes a weight"),
    ],
)  # fmt: skip
def test_what_stays(rewritten, body, shapes, reason):
    outputs = "float y" + (", float z" if " z =" in body else "")
    found = rewritten(model(body, inputs="float[2,3,4] x", outputs=outputs, w=(4, 6), **shapes), SPEC)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals


def test_a_gemm_of_matrices_stays(rewritten):
    body = "b = Gemm(x, w) y = Reshape(b, full)"
    assert rewritten(model(body, inputs="float[n,4] x", w=(4, 6)), SPEC).edits == 0


def test_nested_graphs(rewritten):
    body = """y = If (p) <
        then_branch = t () => (float[2,n,6] u) { a = Reshape(x, flat) b = Gemm(a, w) u = Reshape(b, full) },
        else_branch = e () => (float[2,n,6] v) { c = MatMul(x, w) v = Neg(c) }>"""
    found = rewritten(model(body, inputs="float[2,n,4] x, bool p", w=(4, 6)), SPEC)
    assert found.ops == {"If": 1, "MatMul": 2, "Neg": 1}
