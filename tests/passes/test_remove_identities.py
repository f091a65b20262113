import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxopt
from onnxopt.graph import all_nodes

SPEC = "remove-identities"
SHAPED = "float[n,3,4] x"

INITIALIZERS = {
    "zero": np.zeros(1, "f"),
    "zeros": np.zeros((3, 1), "f"),
    "one": np.ones((), "f"),
    "ones": np.ones((1, 3, 4), "f"),
    "wide": np.ones((2, 1, 3, 4), "f"),
    "half": np.array([1, 0.5, 1, 1], "f"),
    "no": np.array(False),
    "yes": np.array(True),
    "nothing": np.zeros(0, np.int64),
    "pads": np.zeros(6, np.int64),
    "pad": np.array([0, 0, 0, 0, 0, 1]),
    "repeats": np.ones(3, np.int64),
    "same": np.array([0, 3, -1]),
    "none": np.array([0, 3, 4]),
    "other": np.array([0, 4, -1]),
    "open": np.array([-1, 3, 4]),
    "start": np.zeros(2, np.int64),
    "from": np.array([-4, -3]),
    "ends": np.array([2**63 - 1, 4]),
    "short": np.array([2**63 - 1, 3]),
    "axes": np.array([1, 2]),
    "last": np.array([-1, 1]),
    "steps": np.ones(2, np.int64),
    "back": np.array([1, -1]),
    "row": np.array([1, 4]),
    "rows": np.array([3, 3, 4]),
    "axis": np.array([1]),
    "begin": np.zeros(1, np.int64),
    "first": np.zeros(1, np.int64),
}


def graph(body, inputs=SHAPED, opset=17, out_type="float"):
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({out_type}[a,b,c] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    shape = proto.graph.output[0].type.tensor_type
    shape.ClearField("shape")
    used = {i for n in proto.graph.node for i in n.input}
    for name in sorted(used & INITIALIZERS.keys()):
        proto.graph.initializer.append(numpy_helper.from_array(INITIALIZERS[name], name))
    return proto


GOES = [
    ("Identity(v)", 17),
    ("Dropout(v)", 17),
    ("Dropout(v)", 10),
    ("Dropout(v, one, no)", 17),
    ("Cast <to = 1> (v)", 17),
    ("CastLike(v, one)", 17),
    ("Transpose <perm = [0, 1, 2]> (v)", 17),
    ("Reshape(v, same)", 17),
    ("Reshape(v, open)", 17),
    ("Expand(v, row)", 17),
    ("Tile(v, repeats)", 17),
    ("Slice(v, start, ends, axes)", 17),
    ("Slice(v, start, ends, axes, steps)", 17),
    ("Slice(v, from, ends, last)", 17),
    ("Slice <starts = [0], ends = [9], axes = [2]> (v)", 9),
    ("Pad(v, pads)", 17),
    ('Pad <mode = "reflect", pads = [0, 0, 0, 0, 0, 0]> (v)', 10),
    ("Unsqueeze(v, nothing)", 17),
    ("Split <axis = 1> (v)", 17),
    ("Concat <axis = 0> (v)", 17),
    ("Sum(v)", 17),
    ("Mean(v)", 17),
    ("Max(v)", 17),
    ("Min(v)", 17),
    ("ReduceSum <noop_with_empty_axes = 1> (v, nothing)", 17),
    ("ReduceMax <noop_with_empty_axes = 1> (v)", 18),
    ("Add(v, zero)", 17),
    ("Add(zeros, v)", 17),
    ("Sub(v, zeros)", 17),
    ("Mul(v, one)", 17),
    ("Mul(ones, v)", 17),
    ("Div(v, ones)", 17),
    ("Pow(v, one)", 17),
]

STAYS = [
    ("Dropout(v, one, given)", 17),
    ("Dropout(v, one, yes)", 17),
    ("Transpose <perm = [0, 2, 1]> (v)", 17),
    ("Transpose(v)", 17),
    ("Reshape(v, other)", 17),
    ("Expand(v, rows)", 17),
    ("Slice(v, start, short, axes)", 17),
    ("Slice(v, start, ends, axes, back)", 17),
    ("Pad(v, pad)", 17),
    ("Unsqueeze(v, axis)", 17),
    ("Squeeze(v)", 17),
    ("Concat <axis = 0> (v, v)", 17),
    ("Sum(v, v)", 17),
    ("ReduceSum(v, nothing)", 17),
    ("Add(v, one)", 17),
    ("Sub(zero, v)", 17),
    ("Mul(v, half)", 17),
    ("Div(one, v)", 17),
    ("Pow(one, v)", 17),
    ("Pow(v, half)", 17),
]


@pytest.mark.parametrize(("node", "opset"), GOES)
def test_what_changes_nothing_goes(rewritten, node, opset):
    found = rewritten(graph(f"v = Neg(x) w = {node} y = Abs(w)", opset=opset), SPEC)
    assert found.ops == {"Neg": 1, "Abs": 1}
    assert not found.model.graph.initializers


@pytest.mark.parametrize(("node", "opset"), STAYS)
def test_what_may_change_something_stays(rewritten, node, opset):
    proto = graph(f"v = Neg(x) w = {node} y = Abs(w)", inputs=f"{SHAPED}, bool given", opset=opset)
    assert rewritten(proto, SPEC, verify="Dropout" not in node).edits == 0


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("Mul(v, wide)", "its neutral operand may change the shape by broadcasting"),
        ("Clip(v)", "without bounds it still makes infinities finite"),
    ],
)
def test_near_misses_say_why(rewritten, node, reason):
    found = rewritten(graph(f"v = Neg(x) w = {node} y = Abs(w)"), SPEC)
    assert (found.edits, found.refusals) == (0, {reason})


def test_broadcasting_with_an_axis_of_unknown_size_may_change_it():
    # x may have one row, and then the sum has three.
    proto = graph("v = Neg(x) y = Add(v, zeros)", inputs="float[n,m] x")
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    assert [n.op_type for n in result.model.graph] == ["Neg", "Add"]


def test_unknown_sizes_are_compared_as_expressions(rewritten):
    body = """v = Neg(x) s = Shape(v) a = Reshape(v, s) e = Expand(a, s)
        k = Shape <start = 0, end = 1> (x) w = Slice(e, begin, k, first) y = Abs(w)"""
    found = rewritten(graph(body, inputs="float[n,m,4] x"), f"{SPEC},remove-dead-code")
    assert found.ops == {"Neg": 1, "Abs": 1}


def test_a_cast_to_another_type_stays(rewritten):
    assert rewritten(graph("v = Neg(x) y = Cast <to = 10> (v)", out_type="float16"), SPEC).edits == 0


def test_integers_are_clipped_by_nothing(rewritten):
    found = rewritten(graph("v = Neg(x) w = Clip(v) y = Abs(w)", inputs="int32[n] x", out_type="int32"), SPEC)
    assert found.ops == {"Neg": 1, "Abs": 1}


def test_a_flatten_of_a_matrix(rewritten):
    assert rewritten(graph("v = Neg(x) w = Flatten(v) y = Abs(w)", inputs="float[n,m] x"), SPEC).edits == 1
    assert rewritten(graph("v = Neg(x) w = Flatten(v) y = Abs(w)"), SPEC).edits == 0
    assert rewritten(graph("v = Neg(x) w = Flatten <axis = 0> (v) y = Abs(w)", inputs="float[n,m] x"), SPEC).edits == 0


def test_a_used_mask_keeps_a_dropout(rewritten):
    found = rewritten(graph("v = Neg(x) w, mask = Dropout(v) m = Cast <to = 1> (mask) y = Add(w, m)"), SPEC)
    assert found.ops["Dropout"] == 1


# Names ------------------------------------------------------------------------------------------------------


def test_a_graph_output_keeps_its_name_and_type(rewritten):
    found = rewritten(graph("v = Neg(x) y = Identity(v)"), SPEC)
    assert [(v.name, v.dtype.name) for v in found.model.graph.outputs] == [("y", "FLOAT")]
    assert found.ops == {"Neg": 1}


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("y = Identity(x)", "float[2] y", "a graph input or initializer cannot take the name of a graph output"),
        (
            "v = Neg(x) y = Identity(v)",
            "float[2] v, float[2] y",
            "both values are graph outputs, whose names must stay",
        ),
    ],
)
def test_identities_that_a_name_depends_on_stay(rewritten, body, outputs, reason):
    found = rewritten(f'<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => ({outputs}) {{ {body} }}', SPEC)
    assert (found.edits, found.refusals) == (0, {reason})


# Where ------------------------------------------------------------------------------------------------------


def test_nested_graphs_and_captured_values(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y) {
            m = Abs(x)  k = Identity(m)
            y = If (c) <
                then_branch = t () => (float[2] a) { i = Identity(k)  n = Neg(i)  a = Identity(n) },
                else_branch = e () => (float[2] b) { b = Identity(k) }>
        }""",
        SPEC,
    )
    # The last one stays: a branch must compute its output itself.
    assert found.ops == {"Abs": 1, "If": 1, "Neg": 1, "Identity": 1}
    assert found.refusals == {"the graph output would come from an outer graph"}


def test_functions(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2] x) => (float[2] y) { y = my.F <to = 1> (x) }
        <domain: "my", opset_import: ["" : 17]>
        F <to> (x) => (y) {
            zero = Constant <value_float = 0.0> ()  a = Identity(x)  b = Add(a, zero)  c = Cast <to: int = @to> (b)
            d = Neg(c)  y = Identity(d)
        }""",
        SPEC,
    )
    assert found.ops == {"F": 1, "Cast": 1, "Neg": 1}


def test_attributes_of_the_caller_are_not_known(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2,2] x) => (float[2,2] y) { y = my.F <order = [1, 0]> (x) }
        <domain: "my", opset_import: ["" : 17]>
        F <order> (x) => (y) { a = Transpose <perm: ints = @order> (x)  y = Neg(a) }""",
        SPEC,
    )
    assert found.edits == 0


def test_a_zero_in_the_target_of_a_reshape_can_mean_zero(rewritten):
    # Valid only when x is empty along the first axis; the other Reshape copies that size.
    assert rewritten(graph("v = Neg(x) y = Reshape <allowzero = 1> (v, none)"), SPEC, verify=False).edits == 0
    assert rewritten(graph("v = Neg(x) y = Reshape(v, none)"), SPEC).edits == 1


def test_an_overridable_operand_is_not_neutral():
    proto = graph("v = Neg(x) y = Add(v, zero)", inputs=f"{SHAPED}, float[1] zero")
    assert [i.name for i in proto.graph.input] == ["x", "zero"]
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    assert sorted(n.op_type for n in all_nodes(result.model)) == ["Add", "Neg"]


def test_an_identity_of_an_overridable_initializer_goes(rewritten):
    proto = graph("v = Identity(zero) y = Add(x, v)", inputs=f"{SHAPED}, float[1] zero")
    found = rewritten(proto, SPEC)
    assert found.ops == {"Add": 1}
    assert [v.name for v in found.nodes[0].inputs] == ["x", "zero"]


def test_the_scale_of_a_normalization_stays_for_the_runtime_to_fuse(rewritten):
    found = rewritten(graph("q = Abs(x) r = Sqrt(q) d = Div(x, r) y = Mul(d, ones)"), SPEC)
    assert found.edits == 0
