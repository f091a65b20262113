import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import onnxopt

SPEC = "inline-branches"


def model(condition, opset=17, outputs="float[2] y", after="y = Relu(z)"):
    """An If over z, with branches that capture x and share the name of a value."""
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g (float[2] x, bool given) => ({outputs})
    <bool yes = {{1}}, bool no = {{0}}, int64[2] two = {{1, 2}}>
    {{
        {condition}
        z = If (c) <
            then_branch = t () => (float[2] r) {{ s = Neg(x) r = Abs(s) }},
            else_branch = e () => (float[2] r) {{ s = Exp(x) r = Add(s, x) }}
        >
        {after}
    }}
    """


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("c = Identity(yes)", {"Neg": 1, "Abs": 1}),
        ("c = Identity(no)", {"Exp": 1, "Add": 1}),
        ("n = Size(x) k = Size(two) c = Equal(n, k)", {"Neg": 1, "Abs": 1}),
    ],
    ids=["true", "false", "by shape"],
)
def test_the_branch_that_is_taken_is_inlined(rewritten, condition, kept):
    found = rewritten(model(condition), "inline-branches,fold-constants,remove-dead-code")
    assert found.ops == {**kept, "Relu": 1}


def test_a_condition_given_by_the_caller_is_not_known(rewritten):
    assert rewritten(model("c = Identity(given)"), SPEC).ops["If"] == 1
    overridable = onnx.parser.parse_model(model("c = Identity(given)").replace("bool given)", "bool given = {1})", 1))
    assert [t.name for t in overridable.graph.initializer].count("given") == 1
    assert rewritten(overridable, SPEC).ops["If"] == 1


def test_graph_outputs_keep_their_names(rewritten):
    found = rewritten(model("c = Identity(yes)", outputs="float[2] z", after=""), SPEC)
    assert [v.name for v in found.model.graph.outputs] == ["z"]
    assert found.nodes[-1].op_type == "Abs"


def test_an_output_that_is_a_constant_of_the_branch_gets_an_identity(rewritten):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] a, float[1] c)
    <bool yes = {1}>
    {
        a, c = If (yes) <
            then_branch = t () => (float[2] r, float[1] w) <float[1] w = {3}> { r = Neg(x) },
            else_branch = e () => (float[2] p, float[1] v) <float[1] v = {4}> { p = Exp(x) }
        >
    }
    """
    found = rewritten(text, SPEC)
    assert found.ops == {"Neg": 1, "Identity": 1}
    assert [v.name for v in found.model.graph.outputs] == ["a", "c"]


def test_nested_ifs_go_in_one_round(rewritten):
    inner = """If (no) <
                then_branch = tt () => (float[2] q) { q = Neg(x) },
                else_branch = te () => (float[2] q) { s = Exp(x) q = Abs(s) }
            >"""
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y)
    <bool yes = {{1}}, bool no = {{0}}>
    {{
        a = Relu(x)
        z = If (yes) <
            then_branch = t () => (float[2] r) {{ i = {inner} j = {inner} k = Add(i, j) r = Sqrt(k) }},
            else_branch = e () => (float[2] r) {{ r = Sin(x) }}
        >
        y = Add(z, a)
    }}
    """
    found = rewritten(text, SPEC)
    assert found.ops == {"Relu": 1, "Exp": 2, "Abs": 2, "Sqrt": 1, "Add": 2}
    names = [v.name for node in found.nodes for v in node.outputs]
    assert len(set(names)) == len(names)


def test_a_branch_inside_a_loop_body_is_inlined_there(rewritten):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x, int64 n) => (float[2] y)
    <bool yes = {1}>
    {
        y = Loop (n, yes, x) <
            body = b (int64 i, bool k, float[2] s) => (bool o, float[2] t) {
                o = Identity(k)
                t = If (yes) <
                    then_branch = t1 () => (float[2] r) <float[2] w = {1, 2}> { r = Mul(s, w) },
                    else_branch = e1 () => (float[2] r) { r = Neg(s) }
                >
            }
        >
    }
    """
    found = rewritten(text, SPEC)
    assert found.ops == {"Loop": 1, "Identity": 1, "Mul": 1}


def two_branches(first, second):
    """An If of a condition that nothing is known about."""
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x, float[2] z, bool c) => (float[2] y)
    {{ y = If (c) < then_branch = {first}, else_branch = {second} > }}
    """


def test_two_equal_branches_are_one(rewritten):
    inner = "If (c) < then_branch = {0}1 () => (float[2] {0}p) {{ {0}p = Neg({0}) }}, else_branch = {0}2 () => (float[2] {0}q) {{ {0}q = Abs({0}) }} >"
    first = f"t () => (float[2] b) <float[2] w = {{1, 2}}> {{ a = Mul(x, w) r = {inner.format('a')} b = LeakyRelu <alpha = 0.5> (r) }}"
    second = f"e () => (float[2] d) <float[2] v = {{1, 2}}> {{ k = Mul(x, v) s = {inner.format('k')} d = LeakyRelu <alpha = 0.5> (s) }}"
    assert rewritten(two_branches(first, second), SPEC).ops == {"Mul": 1, "If": 1, "Neg": 1, "Abs": 1, "LeakyRelu": 1}


@pytest.mark.parametrize(
    "second",
    [
        "e () => (float[2] d) <float[2] v = {1, 3}> { k = Mul(x, v) d = LeakyRelu <alpha = 0.5> (k) }",
        "e () => (float[2] d) <float[2] v = {1, 2}> { k = Mul(z, v) d = LeakyRelu <alpha = 0.5> (k) }",
        "e () => (float[2] d) <float[2] v = {1, 2}> { k = Mul(x, v) d = LeakyRelu <alpha = 0.25> (k) }",
        "e () => (float[2] d) <float[2] v = {1, 2}> { k = Mul(x, v) d = Elu <alpha = 0.5> (k) }",
        "e () => (float[2] k) <float[2] v = {1, 2}> { k = Mul(x, v) d = LeakyRelu <alpha = 0.5> (k) }",
        "e () => (float[2] d) <float[2] v = {1, 2}> { k = Mul(x, v) d = LeakyRelu(k) }",
        "e () => (float[2] d) <float[2] v = {1, 2}> { k = Mul(x, v) l = LeakyRelu <alpha = 0.5> (k) d = Identity(l) }",
    ],
    ids=["weight", "input", "attribute", "operator", "output", "default", "one more"],
)
def test_branches_that_differ_stay(rewritten, second):
    first = "t () => (float[2] b) <float[2] w = {1, 2}> { a = Mul(x, w) b = LeakyRelu <alpha = 0.5> (a) }"
    assert not rewritten(two_branches(first, second), SPEC).edits


def sequence_model(opset, *, direct):
    """An If that returns a sequence, made in the branch or captured."""
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))

    def value(name, kind):
        return helper.make_value_info(name, kind)

    made = [helper.make_node("SequenceConstruct", ["x", "x"], ["r"])]
    branches = {
        f"{name}_branch": helper.make_graph(made, name, [], [value("r", sequence)]) for name in ("then", "else")
    }
    nodes = [helper.make_node("If", ["yes"], ["s"], **branches)]
    outputs = [value("s", sequence)]
    if not direct:
        nodes.append(helper.make_node("SequenceLength", ["s"], ["n"]))
        outputs = [helper.make_tensor_value_info("n", TensorProto.INT64, [])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        outputs,
        [helper.make_tensor("yes", TensorProto.BOOL, [], [True])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_sequences_keep_their_type(rewritten):
    found = rewritten(sequence_model(17, direct=True), SPEC)
    assert found.ops == {"SequenceConstruct": 1}
    assert isinstance(found.model.graph.outputs[0].type, ir.SequenceType)
    assert rewritten(sequence_model(11, direct=False), SPEC).ops == {"SequenceConstruct": 1, "SequenceLength": 1}
    refused = rewritten(sequence_model(11, direct=True), SPEC)
    assert refused.ops["If"] == 1
    assert refused.refusals == {"a graph output is a sequence, which needs opset 14"}


def test_functions_get_constants_instead_of_initializers(rewritten):
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y) { y = local.f(x) }
    <opset_import: ["" : 17], domain: "local">
    f (x) => (y) {
        yes = Constant <value = bool {1}> ()
        y = If (yes) <
            then_branch = t () => (float[2] r) <float[2] w = {1, 2}> { r = Mul(x, w) },
            else_branch = e () => (float[2] r) { r = Neg(x) }
        >
    }
    """
    found = rewritten(text, SPEC)
    assert found.ops == {"f": 1, "Constant": 1, "Mul": 1}


def test_the_recipe_survives_dead_branches_that_do_not_fit_the_shapes(rewritten):
    # Once shapes are known, ONNX Runtime's own inference rejects the branch that is never taken.
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[3,2] x) => (float[n,m] y)
    <int64[1] last = {-1}, int64 one = {1}>
    {
        s = Shape(x)
        d = Gather(s, one)
        f = Cast <to = 6> (d)
        e = Cast <to = 7> (f)
        c = Equal(e, one)
        y = If (c) <
            then_branch = t () => (float[n] r) { r = Squeeze(x, last) },
            else_branch = e () => (float[n,m] r) { r = Neg(x) }
        >
    }
    """
    result = onnxopt.optimize(onnx.parser.parse_model(text), recipe="lossless", measure=False)
    assert [n.op_type for n in result.model.graph] == ["Neg"]
