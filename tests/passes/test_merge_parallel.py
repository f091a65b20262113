import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

SPEC = "merge-parallel-linear"


def model(body, *, inputs="float[2,n,4] x", outputs="float y", opset=17, dtype=np.float32, **shapes):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(dtype) if isinstance(shape, tuple) else np.asarray(shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


OUTPUTS = "float q, float k, float v"


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)", {"MatMul": 1, "Split": 1}),
        (
            "l = MatMul(x, a) q = Add(l, d) m = MatMul(x, b) k = Add(e, m) n = MatMul(x, c) v = Add(n, f)",
            {"MatMul": 1, "Add": 1, "Split": 1},
        ),
        # One without a bias, as the key has in some models.
        (
            "l = MatMul(x, a) q = Add(l, d) k = MatMul(x, b) n = MatMul(x, c) v = Sub(n, f)",
            {"MatMul": 1, "Add": 1, "Split": 1},
        ),
    ],
)
@pytest.mark.parametrize("opset", [11, 13, 18])
def test_query_key_and_value(rewritten, body, ops, opset):
    shapes = {"a": (4, 8), "b": (4, 2), "c": (4, 2), "d": (8,), "e": (2,), "f": (1, 1, 2)}
    found = rewritten(model(body, outputs=OUTPUTS, opset=opset, **shapes), SPEC)
    assert found.ops == ops
    split = found.nodes[-1]
    sizes = split.inputs[1].const_value.numpy().tolist() if opset >= 13 else list(split.attributes["split"].value)
    assert sizes == [8, 2, 2]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(rewritten, transposed):
    body = " ".join(
        f"{out} = Gemm <transB = {transposed}, alpha = 2.0, beta = {beta}> (x, {w})"
        for out, w, beta in (("q", "a, d", "3.0"), ("k", "b", "1.0"), ("v", "c, f", "1.0"))
    )
    shapes = {"a": (4, 8), "b": (4, 2), "c": (4, 3)}
    if transposed:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    proto = model(body, inputs="float[n,4] x", outputs=OUTPUTS, d=(8,), f=(3,), **shapes)
    assert rewritten(proto, SPEC).ops == {"Gemm": 1, "Split": 1}


def test_two_with_a_bias(rewritten):
    body = "l = MatMul(x, a) k = Add(l, d) m = MatMul(x, b) v = Add(m, e)"
    proto = model(body, outputs="float k, float v", a=(4, 8), b=(4, 2), d=(8,), e=(2,))
    assert rewritten(proto, SPEC).ops == {"MatMul": 1, "Add": 1, "Split": 1}


def test_two_whose_results_are_rearranged_alike(rewritten):
    body = """l = MatMul(x, a) r = Reshape(l, s) k = Transpose <perm = [0, 2, 1, 3]> (r)
        m = MatMul(x, b) u = Reshape(m, t) v = Transpose <perm = [0, 2, 3, 1]> (u)"""
    proto = model(
        body, outputs="float k, float v", a=(4, 8), b=(4, 4), s=np.array([0, 0, 4, 2]), t=np.array([0, 0, 2, 2])
    )
    found = rewritten(proto, SPEC)
    assert found.ops == {"MatMul": 1, "Reshape": 1, "Transpose": 2, "Split": 1}


@pytest.mark.parametrize("tail", ["k = Relu(l) v = Neg(m)", "k = Identity(l) v = Reshape(m, s)"])
def test_two_that_would_save_nothing_stay(rewritten, tail):
    proto = model(f"l = MatMul(x, a) m = MatMul(x, b) {tail}", outputs="float k, float v", a=(4, 8), b=(4, 4),
                  s=np.array([0, 0, 2, 2]))  # fmt: skip
    found = rewritten(proto, SPEC)
    assert found.edits == 0
    assert found.refusals == {"merging them would save no node"}


@pytest.mark.parametrize(
    "body",
    [
        "q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, a)",
        "q = MatMul(x, a) k = MatMul(x, b) z = Neg(x) v = MatMul(z, c)",
        "q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, o)",
        "q = MatMul(x, a) k = MatMul(x, b) m = Transpose <perm = [0, 2, 1]> (x) v = MatMul(m, n)",
    ],
)
def test_what_cannot_be_merged(rewritten, body):
    """A weight that is used twice, another input, a weight that the caller may override."""
    proto = model(body, inputs="float[2,3,4] x, float[4,2] o", outputs=OUTPUTS, a=(4, 8), b=(4, 2), c=(4, 2), n=(3, 2))
    assert "Split" not in rewritten(proto, SPEC).ops


def test_gemms_with_other_attributes_stay(rewritten):
    body = "q = Gemm(x, a) k = Gemm <alpha = 2.0> (x, b) v = Gemm <transB = 1> (x, c)"
    proto = model(body, inputs="float[n,4] x", outputs=OUTPUTS, a=(4, 8), b=(4, 2), c=(2, 4))
    assert rewritten(proto, SPEC).edits == 0


def test_half_precision_and_no_growth(rewritten):
    body = "q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)"
    given = {"a": (4, 8), "b": (4, 2), "c": (4, 2)}
    proto = model(
        body, inputs="float16[2,n,4] x", outputs=OUTPUTS.replace("float", "float16"), dtype=np.float16, **given
    )
    found = rewritten(proto, SPEC)
    (weight,) = [v for v in found.model.graph.initializers.values() if v.dtype.numpy() == np.float16]
    assert weight.const_value.nbytes == 2 * 4 * 12


def test_bfloat16(rewritten):
    proto = model("q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)", inputs="bfloat16[2,n,4] x",
                  outputs=OUTPUTS.replace("float", "bfloat16"))  # fmt: skip
    arrays = {n: np.arange(8).reshape(4, 2).astype(ml_dtypes.bfloat16) + i for i, n in enumerate("abc")}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.helper.make_tensor(name, 16, (4, 2), array.tobytes(), raw=True))
    found = rewritten(proto, SPEC, verify=False)
    np.testing.assert_array_equal(
        found.nodes[0].inputs[1].const_value.numpy(), np.concatenate(list(arrays.values()), axis=1)
    )


def test_a_large_weight_is_put_together_when_it_is_read(rewritten):
    shapes = {"a": (256, 256), "b": (256, 64), "c": (256, 64)}
    proto = model(
        "q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)", inputs="float[n,256] x", outputs=OUTPUTS, **shapes
    )
    found = rewritten(proto, SPEC)
    assert type(found.nodes[0].inputs[1].const_value).__name__ == "LazyTensor"


# Concat -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "op_type"),
    [
        ("q = Conv(x, a, d) k = Conv(x, b) y = Concat <axis = 1> (q, k)", "Conv"),
        (
            "q = Conv <pads = [1, 0, 0, 1]> (x, a) k = Conv <pads = [1, 0, 0, 1]> (x, b) y = Concat <axis = -3> (q, k)",
            "Conv",
        ),
    ],
)
def test_convolutions_that_a_concat_puts_together(rewritten, body, op_type):
    proto = model(body, inputs="float[1,3,5,5] x", a=(4, 3, 2, 2), b=(2, 3, 2, 2), d=(4,))
    assert rewritten(proto, SPEC).ops == {op_type: 1}


def test_products_that_a_concat_puts_together(rewritten):
    proto = model("q = MatMul(x, a) k = MatMul(x, b) y = Concat <axis = -1> (q, k)", a=(4, 3), b=(4, 2))
    assert rewritten(proto, SPEC).ops == {"MatMul": 1}
    proto = model("q = Gemm(x, a, d) k = Gemm(x, b) y = Concat <axis = 1> (q, k)", inputs="float[n,4] x", a=(4, 3),
                  b=(4, 2), d=(3,))  # fmt: skip
    assert rewritten(proto, SPEC).ops == {"Gemm": 1}


@pytest.mark.parametrize(
    "body",
    [
        "q = Conv(x, a) k = Conv(x, b) y = Concat <axis = 2> (q, k)",
        "q = Conv(x, a) k = Conv <strides = [1, 1], dilations = [1, 1], pads = [0, 0, 0, 0], group = 2> (x, c) y = Concat <axis = 1> (q, k)",
        "q = Conv(x, a) k = Conv(x, b) r = Relu(k) y = Concat <axis = 1> (q, r)",
        "q = Conv(x, a) z = Neg(x) k = Conv(z, b) y = Concat <axis = 1> (q, k)",
        "q = Conv(x, a) y = Concat <axis = 1> (q, q)",
    ],
)
def test_other_concats_stay(rewritten, body):
    proto = model(body, inputs="float[1,4,5,5] x", a=(2, 4, 1, 1), b=(2, 4, 1, 1), c=(2, 2, 1, 1))
    assert rewritten(proto, SPEC).edits == 0


def test_convolutions_are_not_split(rewritten):
    body = "q = Conv(x, a) k = Conv(x, b) v = Conv(x, c)"
    proto = model(body, inputs="float[1,3,5,5] x", outputs=OUTPUTS, a=(2, 3, 1, 1), b=(2, 3, 1, 1), c=(2, 3, 1, 1))
    assert rewritten(proto, SPEC).edits == 0


# Elsewhere ----------------------------------------------------------------------------------------------------


def test_nested_graphs(rewritten):
    body = """q = MatMul(x, a) y = If (p) <
        then_branch = t () => (float[2,n,2] u) { k = MatMul(x, b) u = Neg(k) },
        else_branch = e () => (float[2,n,2] w) { l = MatMul(x, c) m = MatMul(x, d) o = MatMul(x, f) r = Add(l, m) w = Add(r, o) }>"""
    shapes = dict.fromkeys("abcdf", (4, 2))
    found = rewritten(model(body, inputs="float[2,n,4] x, bool p", outputs="float q, float y", **shapes), SPEC)
    assert found.ops == {"MatMul": 3, "If": 1, "Neg": 1, "Split": 1, "Add": 2}


def test_the_runtime_gets_no_more_to_do(rewritten, tmp_path):
    """What is left after the runtime's own optimization counts: three heads, split and transposed."""
    heads = "".join(
        f"m{i} = MatMul(x, {w}) a{i} = Add(m{i}, {b}) r{i} = Reshape(a{i}, s) t{i} = Transpose <perm = [0, 2, 1, 3]> (r{i}) "
        for i, (w, b) in enumerate(("ad", "be", "cf"))
    )
    body = f"{heads} k = Transpose <perm = [0, 1, 3, 2]> (t1) p = MatMul(t0, k) o = Softmax(p) y = MatMul(o, t2)"
    proto = model(body, inputs="float[b,n,8] x", s=np.array([0, 0, 2, 4]), **dict.fromkeys("abc", (8, 8)),
                  **dict.fromkeys("def", (8,)))  # fmt: skip
    counts = []
    for index, each in enumerate((proto, rewritten(proto, f"merge-layout,{SPEC},share-layout").model)):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / f"{index}.onnx")
        content = each if isinstance(each, onnx.ModelProto) else onnx_proto(each)
        ort.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
        counts.append(len(onnx.load(tmp_path / f"{index}.onnx").graph.node))
    assert counts[1] <= counts[0] - 5


def onnx_proto(model):
    import onnx_ir as ir

    return ir.to_proto(model)
