import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import onnxopt

SPEC = "fuse-conv-bn"
RNG = np.random.default_rng(0)


def make(nodes, inputs, outputs, constants, *, opset=17, dtype=np.float32, functions=()):
    """Build a model from (operator, inputs, outputs, attributes) tuples."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = [helper.make_node(op, i, o, name=f"n{k}", **a) for k, (op, i, o, a) in enumerate(nodes)]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def statistics(channels, dtype=np.float32):
    def draw():
        return RNG.standard_normal(channels)

    values = {"scale": draw(), "shift": draw(), "mean": draw(), "var": draw() ** 2 + 0.1}
    return {name: v.astype(dtype) for name, v in values.items()}


def conv_bn(
    op="Conv",
    weight=(6, 4, 3, 3),
    channels=6,
    bias=True,
    size=(2, 4, 8, 8),
    opset=17,
    dtype=np.float32,
    **attributes,
):
    constants = {"w": RNG.standard_normal(weight).astype(dtype), **statistics(channels, dtype)}
    inputs = ["x", "w"]
    if bias:
        constants["b"] = RNG.standard_normal(channels).astype(dtype)
        inputs.append("b")
    nodes = [
        (op, inputs, ["c"], attributes),
        ("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"], {"epsilon": 0.01}),
    ]
    return make(nodes, {"x": size}, ["y"], constants, opset=opset, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"auto_pad": "SAME_UPPER"},
        {"weight": (6, 2, 3, 3), "group": 2},
        {"weight": (4, 1, 3, 3), "channels": 4, "group": 4},
        {"weight": (6, 4, 5), "size": (2, 4, 9)},
        {"weight": (6, 4, 1, 1, 1), "size": (1, 4, 3, 3, 3), "opset": 9},
        {"op": "ConvTranspose", "weight": (4, 6, 3, 3)},
        {"op": "ConvTranspose", "weight": (4, 3, 3, 3), "group": 2, "strides": [2, 2], "output_padding": [1, 1]},
    ],
    ids=["2-D", "grouped", "depthwise", "1-D", "3-D", "transposed", "transposed, grouped"],
)
def test_convolutions(rewritten, options, bias):
    found = rewritten(conv_bn(bias=bias, **options), SPEC)
    assert found.ops == {options.get("op", "Conv"): 1}
    assert sorted(found.model.graph.initializers) == (["b_bn", "w_bn"] if bias else ["shift_bn", "w_bn"])
    assert [v.name for v in found.model.graph.outputs] == ["y"]
    assert str(found.report.passes[0].applied[0].site) == f"{SPEC} at c"


@pytest.mark.parametrize(
    ("attributes", "weight", "bias"),
    [
        ({}, (4, 6), (6,)),
        ({"transB": 1, "alpha": 0.5, "beta": 2.0}, (6, 4), (1, 6)),
        ({"beta": 0.0}, (4, 6), ()),
        ({}, (4, 6), None),
    ],
)
def test_dense_layers(rewritten, attributes, weight, bias):
    constants = {"w": RNG.standard_normal(weight).astype("f"), **statistics(6)}
    inputs = ["x", "w"]
    if bias is not None:
        constants["b"] = np.asarray(RNG.standard_normal(bias), "f")
        inputs.append("b")
    norm = ("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"], {})
    found = rewritten(make([("Gemm", inputs, ["c"], attributes), norm], {"x": (3, 4)}, ["y"], constants), SPEC)
    assert found.ops == {"Gemm": 1}


def test_half_precision_is_computed_in_double_and_rounded_once():
    proto = conv_bn(dtype=np.float16)
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    (node,) = result.model.graph
    before = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    factor = before["scale"] / np.sqrt(before["var"] + np.float64(np.float32(0.01)))
    wanted = (before["w"] * factor.reshape(-1, 1, 1, 1)).astype(np.float16)
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), wanted)


def test_bfloat16_weights():
    w = RNG.standard_normal((6, 4, 3, 3)).astype(ml_dtypes.bfloat16)
    proto = conv_bn(bias=False)
    del proto.graph.initializer[0]
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    (node,) = result.model.graph
    assert node.inputs[1].const_value.dtype == ir.DataType.BFLOAT16


def change(proto, **arrays):
    for tensor in proto.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return proto


def with_input(proto, name):
    """Let the caller override an initializer."""
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return proto


def with_attribute(proto, node, **attributes):
    proto.graph.node[node].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    return proto


def with_output(proto, name):
    proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return proto


def with_node(proto, op, inputs, output):
    proto.graph.node.insert(1, helper.make_node(op, inputs, [output]))
    return with_output(proto, output)


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (lambda: with_output(conv_bn(), "c"), "the convolution's output is used elsewhere, too"),
        (lambda: with_node(conv_bn(), "Neg", ["c"], "z"), "the convolution's output is used elsewhere, too"),
        (lambda: with_node(conv_bn(), "Neg", ["w"], "z"), "the weight is used elsewhere, too"),
        (lambda: with_input(conv_bn(), "w"), "the weight is not constant"),
        (lambda: with_input(conv_bn(), "b"), "the bias is not constant"),
        (lambda: with_input(conv_bn(), "mean"), "a parameter of the normalization is not constant"),
        (lambda: change(conv_bn(), var=np.full(6, -1, "f")), "variance + epsilon is not positive"),
        (lambda: change(conv_bn(), var=np.full(6, np.nan, "f")), "variance + epsilon is not positive"),
        (
            lambda: change(conv_bn(), scale=np.full(6, 3e38, "f"), var=np.full(6, 1e-12, "f")),
            "the fused weight or bias does not fit into the element type",
        ),
        (lambda: with_attribute(conv_bn(), 1, training_mode=1), "the normalization is in training mode"),
        (lambda: with_attribute(conv_bn(opset=8), 1, spatial=0), "the normalization is per element (spatial=0)"),
        (lambda: conv_bn(opset=6), "before opset 7 the node may be in training mode"),
    ],
)
def test_near_misses(proto, reason):
    result = onnxopt.optimize(proto(), passes=SPEC, verify=False, measure=False)
    (report,) = result.report.passes
    assert (report.applied, report.refusals) == ((), ((reason, 1),))


def test_further_outputs_before_opset_14_mean_training():
    proto = conv_bn(opset=9)
    proto.graph.node[1].output.extend(["m", "v"])
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    assert result.report.passes[0].refusals == (("the normalization is in training mode", 1),)


def test_one_bias_per_row_is_none_per_column():
    constants = {"w": np.ones((4, 6), "f"), "b": np.ones((3, 1), "f"), **statistics(6)}
    nodes = [
        ("Gemm", ["x", "w", "b"], ["c"], {}),
        ("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"], {}),
    ]
    result = onnxopt.optimize(make(nodes, {"x": (3, 4)}, ["y"], constants), passes=SPEC, verify=False, measure=False)
    assert result.report.passes[0].refusals == (("weight, bias and normalization do not fit together", 1),)


def test_chains_and_shared_statistics(rewritten):
    # Equal statistics are often stored once; they stay until the last user is fused.
    constants = {
        "w0": RNG.standard_normal((4, 4, 1, 1)).astype("f"),
        "w1": RNG.standard_normal((4, 4, 1, 1)).astype("f"),
    }
    norm = ["scale", "shift", "mean", "var"]
    nodes = [
        ("Conv", ["x", "w0"], ["c0"], {}),
        ("BatchNormalization", ["c0", *norm], ["y0"], {}),
        ("Relu", ["y0"], ["r"], {}),
        ("Conv", ["r", "w1"], ["c1"], {}),
        ("BatchNormalization", ["c1", *norm], ["y"], {}),
    ]
    found = rewritten(make(nodes, {"x": (1, 4, 3, 3)}, ["y"], {**constants, **statistics(4)}), SPEC)
    assert found.ops == {"Conv": 2, "Relu": 1}
    assert not set(norm) & set(found.model.graph.initializers)


TEXT = """
    w = Constant <value = float[2,1,1,1] {1, 2}> ()
    s = Constant <value = float[2] {1, 2}> () m = Constant <value = float[2] {3, 4}> ()
    c = Conv(x, w) y = BatchNormalization(c, s, m, m, s)
"""


def test_functions(rewritten):
    found = rewritten(
        f"""<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[1,1,3,3] x) => (float[1,2,3,3] y) {{ y = my.F(x) }}
        <domain: "my", opset_import: ["" : 17]> F (x) => (y) {{ {TEXT} }}""",
        SPEC,
    )
    assert found.ops == {"F": 1, "Constant": 2, "Conv": 1}


def test_nested_graphs_take_weights_from_outside(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,3,3] x, bool c) => (float[1,2,3,3] y)
        <float[2,1,1,1] w = {1, 2}, float[2] s = {1, 2}, float[2] m = {3, 4}> {
            y = If (c) <
                then_branch = t () => (float[1,2,3,3] a) { p = Conv(x, w) a = BatchNormalization(p, s, m, m, s) },
                else_branch = e () => (float[1,2,3,3] b) { b = Concat <axis = 1> (x, x) }>
        }""",
        SPEC,
    )
    assert found.ops == {"If": 1, "Conv": 1, "Concat": 1}
    assert not found.model.graph.initializers
    branch = found.nodes[0].attributes["then_branch"].as_graph()
    assert sorted(branch.initializers) == ["m_bn", "w_bn"]


def test_a_convolution_outside_is_left_alone(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,3,3] x, bool c) => (float[1,2,3,3] y)
        <float[2,1,1,1] w = {1, 2}, float[2] s = {1, 2}, float[2] m = {3, 4}> {
            p = Conv(x, w)
            y = If (c) <
                then_branch = t () => (float[1,2,3,3] a) { a = BatchNormalization(p, s, m, m, s) },
                else_branch = e () => (float[1,2,3,3] b) { b = Concat <axis = 1> (x, x) }>
        }""",
        SPEC,
    )
    assert (found.edits, found.refusals) == (0, {"the convolution is in an outer graph"})
