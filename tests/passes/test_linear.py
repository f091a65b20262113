import ml_dtypes
import numpy as np
import onnx
import pytest

SPEC = "fuse-linear"


def model(body, *, inputs="float[n,3,6,6] x", outputs="float y", opset=17, shapes=None, **arrays):
    """A model whose initializers have this content."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def random(*shape, dtype=np.float32, low=0.5, seed=0):
    """Numbers away from 0."""
    rng = np.random.default_rng(seed + sum(shape))
    return (rng.uniform(low, 1.5, shape) * rng.choice([-1, 1], shape)).astype(dtype)


def constant(found, node, index):
    value = node.inputs[index]
    return value.const_value.numpy()


# Behind a convolution -----------------------------------------------------------------------------------------

CONVS = {
    "Conv": {"body": "c = Conv <pads = [1, 1, 1, 1]> (x, w, b)", "w": random(4, 3, 3, 3), "b": random(4)},
    "Conv without bias": {"body": "c = Conv (x, w)", "w": random(4, 3, 3, 3)},
    "grouped Conv": {"body": "c = Conv <group = 3> (x, w, b)", "w": random(6, 1, 3, 3), "b": random(6)},
    "ConvTranspose": {"body": "c = ConvTranspose (x, w, b)", "w": random(3, 4, 2, 2), "b": random(4)},
    "grouped ConvTranspose": {"body": "c = ConvTranspose <group = 3> (x, w)", "w": random(3, 2, 2, 2)},
}
STEPS = {
    "Mul": ("y = Mul(c, k)", lambda c: {"k": random(1, c, 1, 1)}),
    "Mul by a number": ("y = Mul(k, c)", lambda c: {"k": np.float32(1.5)}),
    "Div": ("y = Div(c, k)", lambda c: {"k": random(c, 1, 1)}),
    "Add": ("y = Add(k, c)", lambda c: {"k": random(1, c, 1, 1)}),
    "Sub": ("y = Sub(c, k)", lambda c: {"k": random(c, 1, 1)}),
    "Sub from": ("y = Sub(k, c)", lambda c: {"k": random(c, 1, 1)}),
    "Neg": ("y = Neg(c)", lambda c: {}),
    "BatchNormalization": (
        "y = BatchNormalization(c, s, t, m, v)",
        lambda c: {"s": random(c), "t": random(c), "m": random(c), "v": abs(random(c))},
    ),
    "all": (
        "d = Mul(c, k) e = Add(d, l) f = Sub(m, e) y = Div(f, n)",
        lambda c: {"k": random(c, 1, 1), "l": random(1, c, 1, 1), "m": np.float32(2), "n": np.float32([[3]])},
    ),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("conv", CONVS)
def test_what_follows_a_convolution_moves_into_it(rewritten, conv, step):
    given = dict(CONVS[conv])
    body, arrays = STEPS[step]
    w = given["w"]
    channels = w.shape[1] * (3 if "group" in given["body"] else 1) if "Transpose" in conv else w.shape[0]
    proto = model(f"{given.pop('body')} {body}", **given, **arrays(channels))
    found = rewritten(proto, SPEC)
    assert found.ops == {"ConvTranspose" if "Transpose" in conv else "Conv": 1}
    assert len(found.model.graph.initializers) <= 2
    assert found.edits == 1


def test_it_is_rounded_once(rewritten):
    w, k, m = random(2, 1, 1, 1), random(2, 1, 1, seed=1), random(2, 1, 1, seed=2)
    found = rewritten(
        model("c = Conv(x, w) d = Mul(c, k) y = Mul(d, m)", inputs="float[1,1,4,4] x", w=w, k=k, m=m), SPEC
    )
    exact = w.astype(np.float64) * k[..., None].astype(np.float64) * m[..., None].astype(np.float64)
    np.testing.assert_array_equal(constant(found, found.nodes[0], 1), exact.astype(np.float32))


def test_only_the_prefix_that_fits_moves(rewritten):
    proto = model("c = Conv(x, w) d = Add(c, k) e = Mul(d, l) f = Relu(e) y = Mul(f, k)", w=random(4, 3, 1, 1),
                  k=random(4, 1, 1), l=random(4, 1, 6))  # fmt: skip
    found = rewritten(proto, SPEC)
    assert found.ops == {"Conv": 1, "Mul": 2, "Relu": 1}


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_types(rewritten, dtype):
    numpy_type = {"float16": np.float16, "double": np.float64}[dtype]
    w, k, b = random(3, 4, dtype=numpy_type), random(4, dtype=numpy_type), random(1, dtype=numpy_type)
    body = "c = Gemm(x, w, b) d = Mul(c, k) y = Add(d, k)"
    proto = model(body, inputs=f"{dtype}[2,3] x", outputs=f"{dtype} y", w=w, k=k, b=b)
    found = rewritten(proto, SPEC)
    assert found.ops == {"Gemm": 1}
    assert constant(found, found.nodes[0], 1).dtype == numpy_type


def test_bfloat16(rewritten):
    kinds = {name: random(*shape).astype(ml_dtypes.bfloat16) for name, shape in (("w", (3, 4)), ("k", (4,)))}
    proto = model("c = MatMul(x, w) y = Mul(c, k)", inputs="bfloat16[2,3] x", outputs="bfloat16 y", opset=17)
    for name, array in kinds.items():
        data = array.tobytes()
        proto.graph.initializer.append(onnx.helper.make_tensor(name, 16, array.shape, data, raw=True))
    found = rewritten(proto, SPEC, verify=False)
    assert found.ops == {"MatMul": 1}
    expected = kinds["w"].astype(np.float64) * kinds["k"].astype(np.float64)
    np.testing.assert_array_equal(constant(found, found.nodes[0], 1), expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("body", "arrays", "reason"),
    [
        ("y = Mul(c, k)", {"k": random(6)}, "not one number per channel"),
        ("y = Mul(c, k)", {"k": random(4, 6, 1)}, "not one number per channel"),
        ("y = Mul(c, k)", {"k": random(2, 1, 1, 1)}, "not one number per channel"),
        ("y = Mul(c, k)", {"k": random(1, 1, 1, 1, 1)}, "gives the result more axes"),
        ("y = Mul(c, k)", {"k": np.float32(1e38)}, "does not fit into its type"),
        ("y = Mul(c, k)", {"k": np.float32(1e-44)}, "would lose precision"),
        ("d = Mul(c, k) e = Conv(x, w) y = Add(d, e)", {"k": random(4, 1, 1)}, "the weight is used elsewhere, too"),
    ],
)
def test_what_does_not_fit_is_refused(rewritten, body, arrays, reason):
    w = random(4, 3, 1, 1) * 100
    found = rewritten(model(f"c = Conv(x, w) {body}", w=w, **arrays), SPEC, verify="e+38" not in str(arrays))
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals


def test_a_vector_as_long_as_the_image_is_wide_is_none_per_channel(rewritten):
    """With as many channels as columns, only the position of the axis tells."""
    found = rewritten(model("c = Conv(x, w) y = Mul(c, k)", w=random(6, 3, 1, 1), k=random(6)), SPEC)
    assert found.ops == {"Conv": 1, "Mul": 1}


def test_a_shared_weight_may_get_a_bias(rewritten):
    proto = model("c = Conv(x, w) d = Add(c, k) e = Conv(x, w) y = Add(d, e)", w=random(4, 3, 1, 1), k=random(4, 1, 1))
    found = rewritten(proto, SPEC)
    assert found.ops == {"Conv": 2, "Add": 1}


def test_other_uses_and_outputs_are_respected(rewritten):
    proto = model("c = Conv(x, w) y = Mul(c, k) z = Relu(c)", outputs="float y, float z", w=random(4, 3, 1, 1),
                  k=random(4, 1, 1))  # fmt: skip
    assert rewritten(proto, SPEC).edits == 0
    proto = model("c = Conv(x, w) y = Mul(c, k)", outputs="float y, float c", w=random(4, 3, 1, 1), k=random(4, 1, 1))
    assert rewritten(proto, SPEC).edits == 0


def test_an_overridable_constant_stays(rewritten):
    proto = model("c = Conv(x, w) y = Mul(c, k)", inputs="float[1,3,4,4] x, float[4,1,1] k", w=random(4, 3, 1, 1),
                  k=random(4, 1, 1))  # fmt: skip
    assert rewritten(proto, SPEC).edits == 0


def test_before_broadcasting_nothing_is_read(rewritten):
    proto = model("c = Conv(x, w) y = Mul <broadcast = 1, axis = 1> (c, k)", opset=6, w=random(4, 3, 1, 1), k=random(4))
    assert rewritten(proto, SPEC, verify=False).edits == 0


def test_training_mode_stays(rewritten):
    proto = model(
        "c = Conv(x, w) y, a, b = BatchNormalization <training_mode = 1> (c, k, k, k, v)",
        w=random(4, 3, 1, 1),
        k=random(4),
        v=abs(random(4)),
    )
    assert rewritten(proto, SPEC, verify=False).edits == 0


# Behind a matrix product --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("y = Mul(c, k)", {"MatMul": 1}),
        ("d = Add(c, b) y = Mul(d, k)", {"MatMul": 1, "Add": 1}),
        ("d = Mul(c, k) y = Add(d, b)", {"MatMul": 1, "Add": 1}),
        ("d = Sub(b, c) y = Div(d, k)", {"MatMul": 1, "Add": 1}),
        ("d = Add(c, b) y = Add(d, k)", {"MatMul": 1, "Add": 1}),
        ("y = Add(c, b)", {"MatMul": 1, "Add": 1}),
        ("d = Add(c, b) e = Mul(d, k) f = Relu(e) y = Mul(f, k)", {"MatMul": 1, "Add": 1, "Relu": 1, "Mul": 1}),
    ],
)
def test_matmul(rewritten, body, ops):
    proto = model(f"c = MatMul(x, w) {body}", inputs="float[n,5,3] x", w=random(3, 4), k=random(4), b=random(4))
    assert rewritten(proto, SPEC).ops == ops


def test_through_layout(rewritten):
    """Heads are split off and put in front, then all are scaled."""
    body = """c = MatMul(x, w) a = Add(c, b) r = Reshape(a, s) t = Transpose <perm = [0, 2, 1, 3]> (r)
        y = Mul(t, k)"""
    proto = model(body, inputs="float[2,n,6] x", w=random(6, 8), b=random(8), k=np.float32(0.5),
                  s=np.array([0, 0, 4, 2]))  # fmt: skip
    assert rewritten(proto, SPEC).ops == {"MatMul": 1, "Add": 1, "Reshape": 1, "Transpose": 1}


@pytest.mark.parametrize(
    ("body", "shape", "ops"),
    [
        ("t = Transpose <perm = [0, 2, 1]> (c) y = Mul(t, k)", (8, 1), {"MatMul": 1, "Transpose": 1}),
        ("t = Squeeze(c, one) y = Mul(t, k)", (8,), {"MatMul": 1, "Squeeze": 1}),
        ("t = Reshape(c, s) y = Mul(t, k)", (8,), {"MatMul": 1, "Reshape": 1}),
    ],
)
def test_channels_are_followed_through_layout(rewritten, body, shape, ops):
    rows = "1" if "one" in body else "2"
    proto = model(f"c = MatMul(x, w) {body}", inputs=f"float[3,{rows},6] x", w=random(6, 8), k=random(*shape),
                  s=np.array([-1, 8]), one=np.array([1]))  # fmt: skip
    found = rewritten(proto, SPEC)
    assert found.ops == ops


def test_channels_that_a_reshape_spreads_take_numbers_only(rewritten):
    proto = model("c = MatMul(x, w) t = Reshape(c, s) y = Mul(t, k)", inputs="float[3,2,6] x", w=random(6, 8),
                  k=random(2), s=np.array([3, 2, 4, 2]))  # fmt: skip
    found = rewritten(proto, SPEC)
    assert found.ops == {"MatMul": 1, "Reshape": 1, "Mul": 1}
    assert found.refusals == {"the constant is not one number per channel"}


def test_gemm_with_beta_and_transposed_weight(rewritten):
    proto = model("c = Gemm <alpha = 2.0, beta = 3.0, transB = 1> (x, w, b) d = Mul(c, k) y = Add(d, k)",
                  inputs="float[n,3] x", w=random(4, 3), b=random(1, 4), k=random(4))  # fmt: skip
    found = rewritten(proto, SPEC)
    assert found.ops == {"Gemm": 1}
    assert "beta" not in found.nodes[0].attributes


def test_a_bias_per_row_is_refused(rewritten):
    proto = model("c = Gemm(x, w, b) y = Mul(c, k)", inputs="float[2,3] x", w=random(3, 4), b=random(2, 1), k=random(4))
    found = rewritten(proto, SPEC)
    assert found.edits == 0
    assert found.refusals == {"the bias is not one number per channel"}


def test_integers_stay(rewritten):
    proto = model("c = MatMul(x, w) y = Mul(c, k)", inputs="int32[2,3] x", outputs="int32 y",
                  w=np.arange(12, dtype=np.int32).reshape(3, 4), k=np.arange(4, dtype=np.int32))  # fmt: skip
    assert rewritten(proto, SPEC).edits == 0


# In front -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "arrays", "ops"),
    [
        ("d = Div(x, k) y = Conv <pads = [1, 1, 1, 1]> (d, w)", {"k": random(3, 1, 1)}, {"Conv": 1}),
        ("d = Sub(x, k) e = Div(d, l) y = Conv(e, w)", {"k": random(3, 1, 1), "l": random(1, 3, 1, 1)}, {"Conv": 1}),
        ("d = Sub(x, k) e = Div(d, k) y = Conv <auto_pad = \"SAME_UPPER\"> (e, w)", {"k": random(3, 1, 1)},
         {"Sub": 1, "Conv": 1}),
        ("d = Mul(x, k) y = ConvTranspose(d, v)", {"k": random(3, 1, 1)}, {"ConvTranspose": 1}),
    ],
)  # fmt: skip
def test_what_is_in_front_of_a_convolution(rewritten, body, arrays, ops):
    proto = model(body, w=random(4, 3, 3, 3), v=random(3, 2, 2, 2), **arrays)
    assert rewritten(proto, SPEC).ops == ops


def test_in_front_of_a_grouped_convolution(rewritten):
    proto = model("d = Sub(x, k) e = Mul(d, l) y = Conv <group = 2> (e, w, b)", inputs="float[1,4,5,5] x",
                  w=random(6, 2, 3, 3), b=random(6), k=random(4, 1, 1), l=random(4, 1, 1))  # fmt: skip
    assert rewritten(proto, SPEC).ops == {"Conv": 1}


@pytest.mark.parametrize("trans", [0, 1])
def test_in_front_of_gemm(rewritten, trans):
    w = random(4, 3) if trans else random(3, 4)
    proto = model(f"d = Sub(x, k) e = Div(d, l) y = Gemm <transB = {trans}, alpha = 2.0> (e, w, b)",
                  inputs="float[n,3] x", w=w, b=random(4), k=random(3), l=random(1, 3))  # fmt: skip
    assert rewritten(proto, SPEC).ops == {"Gemm": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("d = Add(x, k) y = Conv <pads = [1, 1, 1, 1]> (d, w)", "pads with would not be shifted"),
        ("d = Add(x, k) y = ConvTranspose(d, v)", "at the borders"),
        ("r = Reshape(x, s) d = Add(r, l) y = MatMul(d, m)", "has no bias"),
        ("d = Mul(x, x) e = Mul(d, k) y = Conv(e, w)", "activation or normalization"),
        ("g = Sigmoid(x) d = Mul(x, g) e = Mul(d, k) f = Add(e, k) y = Conv(f, w)", "activation or normalization"),
        ("d = Mul(x, wide) y = Conv(d, w)", "not one number per channel"),
    ],
)
def test_what_is_in_front_and_stays(rewritten, body, reason):
    proto = model(body, w=random(4, 3, 3, 3), v=random(3, 2, 2, 2), k=random(3, 1, 1), l=random(3), m=random(3, 2),
                  s=np.array([-1, 3]), wide=random(6))  # fmt: skip
    found = rewritten(proto, SPEC)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals


def test_one_channel_that_a_constant_stretches_stays(rewritten):
    proto = model("d = Mul(x, k) y = Conv(d, w)", inputs="float[1,1,4,4] x", w=random(4, 3, 1, 1), k=random(3, 1, 1))
    found = rewritten(proto, SPEC)
    assert found.edits == 0
    assert found.refusals == {"the constant is not one number per channel"}


# Two products -------------------------------------------------------------------------------------------------


def test_factors_of_both_operands(rewritten):
    body = "a = Mul(x, s) t = Transpose <perm = [0, 2, 1]> (x) b = Div(t, d) y = MatMul(a, b)"
    proto = model(body, inputs="float[2,n,4] x", s=np.float32(0.5), d=np.float32(4))
    found = rewritten(proto, SPEC)
    assert found.ops == {"Mul": 1, "Transpose": 1, "MatMul": 1}
    factor = next(n for n in found.nodes if n.op_type == "Mul").inputs[1].const_value.numpy()
    assert factor == np.float32(0.125)


@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_extreme_factors_stay(rewritten, factor):
    body = "a = Mul(x, s) t = Transpose <perm = [0, 2, 1]> (x) b = Mul(t, s) y = MatMul(a, b)"
    assert rewritten(model(body, inputs="float[2,n,4] x", s=np.float32(factor)), SPEC).edits == 0


@pytest.mark.parametrize("bias", [(4,), (1, 4)])
def test_gemm(rewritten, bias):
    proto = model("c = MatMul(x, w) y = Add(b, c)", inputs="float[n,3] x", w=random(3, 4), b=random(*bias))
    assert rewritten(proto, SPEC).ops == {"Gemm": 1}


@pytest.mark.parametrize(
    ("inputs", "bias", "outputs"),
    [
        ("float[2,n,3] x", (4,), "float y"),
        ("float[3] x", (4,), "float y"),
        ("float[2,3] x", (2, 1), "float y"),
        ("float[2,3] x", (1, 1, 4), "float y"),
        ("float[n,3] x", (3, 4), "float y"),
    ],
)
def test_what_is_no_gemm(rewritten, inputs, bias, outputs):
    proto = model("c = MatMul(x, w) y = Add(c, b)", inputs=inputs, outputs=outputs, w=random(3, 4), b=random(*bias))
    assert rewritten(proto, SPEC, verify=bias != (3, 4)).edits == 0


# Elsewhere ----------------------------------------------------------------------------------------------------


def test_nested_graphs(rewritten):
    body = """y = If (p) <
        then_branch = t () => (float[1,4,6,6] a) { c = Conv(x, w) a = Mul(c, k) },
        else_branch = e () => (float[1,4,6,6] b) { d = Conv(x, v) m = Mul(d, k) b = Add(m, k) }>"""
    proto = model(body, inputs="float[1,3,6,6] x, bool p", w=random(4, 3, 1, 1), v=random(4, 3, 1, 1),
                  k=random(4, 1, 1))  # fmt: skip
    found = rewritten(proto, SPEC)
    assert found.ops == {"If": 1, "Conv": 2}


def test_functions(rewritten):
    text = """<ir_version: 9, opset_import: ["" : 17, "my" : 1]> g (float[n,2] x) => (float[n,2] y) { y = my.F (x) }
        <domain: "my", opset_import: ["" : 17]> F (x) => (y) {
            w = Constant <value = float[2,2] {1, 2, 3, 4}> ()  b = Constant <value = float[2] {1, 2}> ()
            k = Constant <value = float[2] {3, 4}> ()
            c = Gemm(x, w, b)  y = Mul(c, k)
        }"""
    assert rewritten(text, SPEC).ops == {"F": 1, "Gemm": 1, "Constant": 2}


def test_a_large_weight_is_computed_when_it_is_read(rewritten):
    w, k = random(512, 300), random(300)
    found = rewritten(model("c = MatMul(x, w) y = Mul(c, k)", inputs="float[n,512] x", w=w, k=k), SPEC)
    tensor = found.nodes[0].inputs[1].const_value
    assert type(tensor).__name__ == "LazyTensor"
    np.testing.assert_array_equal(tensor.numpy(), (w.astype(np.float64) * k).astype(np.float32))
