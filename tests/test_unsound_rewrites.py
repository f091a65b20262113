"""Rewrites that other tools were seen to make and that are wrong: the lossless recipe makes none of them.

Every case is optimized with verification off, so that the passes themselves are judged, and compared afterwards.
"""

import collections

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.graph import all_nodes, constant_tensor


@pytest.fixture(params=["portable", "cpu"])
def optimized(request, tmp_path):
    """Optimize, save and load again; compare with the original on generated inputs or on these."""

    def run(source, feeds=None, *, compare=True):
        proto = onnx.parser.parse_model(source) if isinstance(source, str) else source
        result = onnxopt.optimize(proto, target=request.param, verify=False, measure=False)
        assert not [p.reason for p in result.report.passes if p.status == "dropped"]
        path = tmp_path / "optimized.onnx"
        onnxopt.save(result.model, path)
        if compare:
            verification = onnxopt.verify(proto, path, feeds=feeds)
            assert verification.ok, verification.reason
        return onnxopt.load(path)

    return run


def ops(model):
    return collections.Counter(node.op_type for node in all_nodes(model))


# What the caller decides ------------------------------------------------------------------------------------


def overridable(text, **values):
    proto = onnx.parser.parse_model(text)
    for name, array in values.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


def test_initializers_that_the_caller_can_override_are_not_folded(optimized):
    proto = overridable(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float[2] w, int64[1] axes, bool c) => (float[2] y, float[m] r, float[2] z)
        <float[2] two = {2, 2}>
        {
            v = Mul(w, two)
            y = Add(x, v)
            r = ReduceSum <keepdims = 0> (x, axes)
            z = If (c) <
                then_branch = t () => (float[2] p) { p = Neg(x) },
                else_branch = e () => (float[2] q) { q = Exp(x) }
            >
        }
        """,
        w=np.ones(2, np.float32),
        axes=np.array([0]),
        c=np.array(True),
    )
    x = np.array([1, -2], np.float32)
    feeds = [
        {"x": x},
        {"x": x, "w": np.array([3, 4], np.float32), "c": np.array(False)},
    ]
    model = optimized(proto, feeds)
    assert ops(model)["Mul"] == 1
    assert ops(model)["If"] == 1
    assert [v.name for v in model.graph.inputs] == ["x", "w", "axes", "c"]


def test_a_neutral_operand_that_the_caller_can_override_stays(optimized):
    proto = overridable(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float zero) => (float[2] y) { y = Add(x, zero) }
        """,
        zero=np.float32(0),
    )
    model = optimized(proto, [{"x": np.ones(2, np.float32), "zero": np.float32(3)}])
    assert ops(model)["Add"] == 1


def test_inputs_and_outputs_stay_as_they_are(optimized):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[batch,2] x, float[batch,2] unused, int64[n] sizes) => (float[batch,2] y, float[batch,2] same, int64[k] s)
    <int64[1] two = {2}>
    {
        a = Identity(x)
        y = Exp(a)
        same = Identity(y)
        s = Shape(x)
    }
    """
    model = optimized(text)
    proto = onnx.parser.parse_model(text)
    saved = ir.to_proto(model)
    assert list(saved.graph.input) == list(proto.graph.input)
    assert list(saved.graph.output) == list(proto.graph.output)


# Random numbers ---------------------------------------------------------------------------------------------


def test_random_numbers_are_drawn_as_often_as_before(optimized):
    model = optimized(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] d, float[2] e)
        {
            a = RandomUniform <shape = [2]> ()
            b = RandomUniform <shape = [2]> ()
            c = Sub(a, b)
            d = Add(c, x)
            f = RandomNormalLike(x)
            h = RandomNormalLike(x)
            e = Sub(f, h)
        }
        """
    )
    assert ops(model)["RandomUniform"] == 2
    assert ops(model)["RandomNormalLike"] == 2


@pytest.mark.parametrize("opset", [10, 17])
def test_the_mask_of_a_dropout_is_kept(optimized, opset):
    optimized(
        f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g (float[2,3] x) => (float[2,3] y, bool[2,3] mask) {{ a = Relu(x) y, mask = Dropout(a) }}
        """
    )


# Chains -----------------------------------------------------------------------------------------------------


def test_clips_with_crossing_bounds(optimized):
    x = np.array([-5, -1, 0, 1, 5], np.float32)
    optimized(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[5] x) => (float[5] y, float[5] z, float[5] r)
        <float low = {2}, float high = {-2}, float zero = {0}, float one = {1}, float three = {3}>
        {
            a = Clip(x, zero, one)
            y = Clip(a, low, three)
            b = Clip(x, low, high)
            z = Clip(b, zero, one)
            c = Relu(x)
            r = Clip(c, , high)
        }
        """,
        [{"x": x}],
    )


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_zero_padding_does_not_become_the_padding_of_a_pool(optimized, pool):
    optimized(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,4,4] x) => (float[1,1,n,m] y)
        <int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}>
        {{ p = Pad(x, pads) y = {pool} <kernel_shape = [3, 3]> (p) }}
        """,
        [{"x": -1 - np.random.default_rng(0).random((1, 1, 4, 4), np.float32)}],
    )


@pytest.mark.parametrize("mode", ["reflect", "edge", "constant"])
def test_only_zero_padding_becomes_the_padding_of_a_convolution(optimized, mode):
    optimized(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,4,4] x) => (float[1,1,n,m] y)
        <int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}, float value = {{1}}, float[1,1,3,3] w = {{1,2,3,4,5,6,7,8,9}}>
        {{ p = Pad <mode = "{mode}"> (x, pads, value) y = Conv <kernel_shape = [3, 3]> (p, w) }}
        """
    )


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32"])
def test_an_integer_matmul_with_bias_does_not_become_a_gemm(optimized, dtype):
    optimized(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g ({dtype}[2,3] x) => ({dtype}[2,2] y)
        <{dtype}[3,2] w = {{1, 2, 3, 4, 5, 6}}, {dtype}[2] b = {{7, 8}}>
        {{ p = MatMul(x, w) y = Add(p, b) }}
        """
    )


def test_reshapes_that_copy_sizes(optimized):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    optimized(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[a,b,c] x) => (float[i,j,k] y, float[l,m] z, float[n,o,p] w)
        <int64[3] swap = {4, 0, -1}, int64[3] copy = {0, 0, -1}, int64[2] flat = {0, -1}, int64[2] two = {6, 4}>
        {
            r = Reshape(x, swap)
            y = Reshape(r, copy)
            s = Reshape(x, two)
            z = Reshape(s, flat)
            t = Reshape(x, flat)
            w = Reshape(t, copy2)
        }
        """.replace("float[a,b,c] x) =>", "float[a,b,c] x, int64[3] copy2) =>"),
        [{"x": x, "copy2": np.array([0, 4, -1])}],
    )


def test_empty_tensors_through_reshapes_with_allowzero(optimized):
    optimized(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n,3] x) => (float[i,j,k] y, float[l,m] z)
        <int64[3] zero = {0, 3, 1}, int64[2] both = {0, 3}>
        {
            y = Reshape <allowzero = 1> (x, zero)
            z = Reshape <allowzero = 1> (y, both)
        }
        """,
        [{"x": np.zeros((0, 3), np.float32)}],
    )


def test_no_attribute_appears_before_its_opset(optimized):
    model = optimized(
        """
        <ir_version: 7, opset_import: ["" : 12]>
        g (float[2,n,4] x) => (float[i,j] y)
        <int64[3] one = {0, 0, 4}, int64[2] two = {0, -1}>
        { a = Reshape(x, one) b = Transpose <perm = [0, 1, 2]> (a) y = Reshape(b, two) }
        """
    )
    assert not any("allowzero" in node.attributes for node in model.graph)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("width", [1, 3])
def test_the_output_of_a_text_recognizer_keeps_its_axes(optimized, width):
    """Height 1 is squeezed, the width leads, and the result has three axes, for one and for many columns."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 12]>
        g (float[N,6,1,W] x) => (float[t,n,10] y)
        <int64[1] axis = {2}, int64 one = {1}, int64 zero = {0}, int64[1] minus = {-1}, int64[3] rows = {0, 0, 10}>
        {
            s = Squeeze <axes = [2]> (x)
            p = Transpose <perm = [2, 0, 1]> (s)
            shape = Shape(p)
            t = Gather(shape, zero)
            n = Gather(shape, one)
            tu = Unsqueeze <axes = [0]> (t)
            nu = Unsqueeze <axes = [0]> (n)
            f = Reshape(p, flat)
            m = MatMul(f, w)
            b = Add(m, bias)
            target = Concat <axis = 0> (tu, nu, minus)
            r = Reshape(b, target)
            y = Softmax <axis = 2> (r)
        }
        """
    )
    for name, array in {
        "flat": np.array([-1, 6]),
        "w": rng.standard_normal((6, 10)).astype(np.float32),
        "bias": rng.standard_normal(10).astype(np.float32),
    }.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    optimized(proto, [{"x": rng.standard_normal((2, 6, 1, width)).astype(np.float32)}])


# Weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Mul", "Add", "Div"])
def test_a_vector_along_the_last_axis_is_not_one_along_channels(optimized, op):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,3,5,5] x) => (float[1,5,5,5] y)
        {{ c = Conv <pads = [1,1,1,1]> (x, w, b) y = {op}(c, v) }}
        """
    )
    for name, shape in {"w": (5, 3, 3, 3), "b": (5,), "v": (5,)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = optimized(proto)
    assert ops(model)[op] == 1


@pytest.mark.parametrize("exponent", [3, 4])
def test_a_mean_of_other_powers_is_no_layer_normalization(optimized, exponent):
    model = optimized(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3,8] x) => (float[2,3,8] y)
        <float p = {{{exponent}}}, float eps = {{0.5}}, float[8] w = {{1,2,3,4,5,6,7,8}}, float[8] b = {{1,2,3,4,5,6,7,8}}>
        {{
            m = ReduceMean <axes = [-1]> (x)
            d = Sub(x, m)
            q = Pow(d, p)
            v = ReduceMean <axes = [-1]> (q)
            e = Add(v, eps)
            s = Sqrt(e)
            n = Div(d, s)
            g = Mul(n, w)
            y = Add(g, b)
        }}
        """,
        [{"x": np.sort(np.random.default_rng(0).random((2, 3, 8), np.float32)) ** 2}],
    )
    assert "LayerNormalization" not in ops(model)


def test_a_tied_embedding_is_stored_once(optimized):
    table = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    proto = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (int64[1,n] ids) => (float[1,n,64] y)
        { h = Gather(table, ids) t = Transpose <perm = [1, 0]> (table) y = MatMul(h, t) }
        """
    )
    proto.graph.initializer.append(numpy_helper.from_array(table, "table"))
    model = optimized(proto)
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values()) < 1.1 * table.nbytes


def test_weights_that_are_filled_in_are_not_stored(optimized, tmp_path):
    proto = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,8] x) => (float[1,512] y)
        <int64[2] shape = {512, 8}, int64[1] size = {512}>
        {
            w = ConstantOfShape <value = float[1] {0.5}> (shape)
            b = ConstantOfShape <value = float[1] {0.25}> (size)
            y = Gemm <transB = 1> (x, w, b)
        }
        """
    )
    model = optimized(proto)
    onnxopt.save(model, tmp_path / "saved.onnx")
    assert (tmp_path / "saved.onnx").stat().st_size < 2 * proto.ByteSize()


def test_a_matmul_of_three_axes_is_not_flattened(optimized):
    model = optimized(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3,4] x) => (float[2,3,2] y)
        <float[4,2] w = {1,2,3,4,5,6,7,8}, float[2] b = {1, 2}>
        { p = MatMul(x, w) y = Add(p, b) }
        """
    )
    assert sum(ops(model).values()) <= 2


# Models that are out of the ordinary ------------------------------------------------------------------------


def test_nested_graphs_stay_in_order(optimized):
    """What a branch uses is computed before the node that carries it, wherever edits put new nodes."""
    model = optimized(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2,8] x, bool c) => (float[2,8] y)
        <float[8] w = {1,2,3,4,5,6,7,8}, float[8] b = {1,2,3,4,5,6,7,8}, float two = {2}, float eps = {0.5}>
        {
            a = Exp(x)
            y = If (c) <
                then_branch = t () => (float[2,8] p) {
                    m = ReduceMean <axes = [-1]> (a)
                    d = Sub(a, m)
                    q = Pow(d, two)
                    v = ReduceMean <axes = [-1]> (q)
                    e = Add(v, eps)
                    s = Sqrt(e)
                    n = Div(d, s)
                    g = Mul(n, w)
                    p = Add(g, b)
                },
                else_branch = e () => (float[2,8] r) { f = Exp(x) h = Identity(f) r = Neg(h) }
            >
        }
        """
    )
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_sequences_and_optional_values_keep_their_types(optimized):
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    sequence = helper.make_sequence_type_proto(tensor)
    optional = helper.make_optional_type_proto(sequence)
    nodes = [
        helper.make_node("Identity", ["s"], ["a"]),
        helper.make_node("SequenceInsert", ["a", "x"], ["b"]),
        helper.make_node("Identity", ["b"], ["out"]),
        helper.make_node("Optional", ["out"], ["o"]),
        helper.make_node("Identity", ["o"], ["opt"]),
        helper.make_node("OptionalHasElement", ["opt"], ["has"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_value_info("s", sequence), helper.make_value_info("x", tensor)],
        [
            helper.make_value_info("out", sequence),
            helper.make_value_info("opt", optional),
            helper.make_tensor_value_info("has", TensorProto.BOOL, []),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    one, two = np.ones(2, np.float32), np.zeros(2, np.float32)
    model = optimized(proto, [{"s": [one], "x": two}], compare=False)
    assert list(ir.to_proto(model).graph.output) == list(proto.graph.output)
    del proto.graph.node[3:], proto.graph.output[1:]
    optimized(proto, [{"s": [one], "x": two}])


@pytest.mark.parametrize(
    "dtype",
    [
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.int4,
        ml_dtypes.uint4,
        ml_dtypes.int2,
        ml_dtypes.bfloat16,
        np.float16,
    ],
    ids=lambda d: np.dtype(d).name,
)
def test_narrow_initializers_are_kept_bit_by_bit(optimized, dtype):
    dtype = np.dtype(dtype)
    values = np.array([1, 0, 1 if dtype.name.startswith("u") else -2, 1, 1], np.float32)
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    nodes = [
        helper.make_node("Cast", ["w"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["again"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "a"], ["c"]),
        helper.make_node("Sin", ["c"], ["d"]),
        helper.make_node("Add", ["d", "b"], ["y"]),
    ]
    weights = [helper.make_tensor(name, kind, [5], values) for name in ("w", "again")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [5]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    imports = [helper.make_opsetid("", 25 if dtype.name == "int2" else 21)]
    model = optimized(helper.make_model(graph, opset_imports=imports, ir_version=10), compare=False)
    assert (ops(model)["Mul"], ops(model)["Add"]) == (1, 1)
    constants = [t for v in model.graph.initializers.values() if (t := constant_tensor(v)) is not None]
    assert constants
    assert all(np.array_equal(t.numpy().astype(np.float32), values) for t in constants)


def test_models_of_ir_version_3_still_need_no_weights(optimized):
    proto = onnx.parser.parse_model(
        """
        <ir_version: 3, opset_import: ["" : 9]>
        g (float[2] x, float[2] w, float[2] v) => (float[2] y) { s = Add(w, v) i = Identity(s) y = Mul(x, i) }
        """
    )
    for name in "wv":
        proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.float32), name))
    model = optimized(proto, [{"x": np.array([3, 4], np.float32)}])
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert ops(model) == {"Mul": 1}


def test_models_of_ir_version_3_list_their_weights_as_inputs(tmp_path):
    proto = onnx.parser.parse_model(
        """
        <ir_version: 3, opset_import: ["" : 9]>
        g (float[2] x, float[2] w, float[2] v) => (float[2] y) { s = Add(w, v) y = Mul(x, s) }
        """
    )
    for name in "wv":
        proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.float32), name))
    onnxopt.save(onnxopt.optimize(proto, verify=False, measure=False).model, tmp_path / "m.onnx")
    saved = onnx.load(tmp_path / "m.onnx")
    assert saved.ir_version == 3
    inputs = [i.name for i in saved.graph.input]
    assert inputs[0] == "x"
    assert set(inputs[1:]) == {t.name for t in saved.graph.initializer}
    onnx.checker.check_model(saved, full_check=True)
