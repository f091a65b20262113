import onnx
import pytest
from onnx import TensorProto, helper

SPEC = "inline-functions,remove-dead-code"


def test_a_function_is_inlined_and_goes(rewritten):
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y, float[2] t) { t = local.twice(x) y = local.twice(t) }
    <opset_import: ["" : 17], domain: "local">
    twice (x) => (y) { t = Neg(x) y = Add(t, x) }
    """
    found = rewritten(text, SPEC)
    assert found.ops == {"Neg": 2, "Add": 2}
    assert not found.model.functions
    names = [v.name for node in found.nodes for v in node.outputs]
    assert len(set(names)) == len(names)
    assert {"y", "t"} <= set(names)


def test_attributes_come_from_the_call_or_the_default_or_are_left_out(rewritten):
    text = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2,3] x) => (float[a,b] p, float[c,d] q) { p = local.f <alpha = 0.5> (x) q = local.f <alpha = 0.25, axis = 1> (x) }
    <opset_import: ["" : 17], domain: "local">
    f <alpha, axis: int = 0, beta> (x) => (y) { a = LeakyRelu <alpha: float = @alpha> (x) y = Softmax <axis: int = @axis> (a) }
    """.replace(", beta>", ">")
    found = rewritten(text, SPEC)
    attributes = [(n.op_type, {k: round(a.value, 3) for k, a in n.attributes.items()}) for n in found.nodes]
    assert attributes == [
        ("LeakyRelu", {"alpha": 0.5}),
        ("Softmax", {"axis": 0}),
        ("LeakyRelu", {"alpha": 0.25}),
        ("Softmax", {"axis": 1}),
    ]


def test_attributes_are_handed_on_to_functions_inside(rewritten):
    text = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2,3] x) => (float[2,3] y) { y = local.outer <slope = 0.5> (x) }
    <opset_import: ["" : 17, "local" : 1], domain: "local">
    outer <slope> (x) => (y) { a = local.inner <alpha: float = @slope> (x) y = Neg(a) }
    <opset_import: ["" : 17], domain: "local">
    inner <alpha> (x) => (y) { y = LeakyRelu <alpha: float = @alpha> (x) }
    """
    found = rewritten(text, SPEC)
    assert [n.op_type for n in found.nodes] == ["LeakyRelu", "Neg"]
    assert found.nodes[0].attributes["alpha"].value == 0.5


def test_inputs_that_are_left_out_stay_left_out(rewritten):
    text = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y) { y = local.f(x) }
    <opset_import: ["" : 17], domain: "local">
    f (x, low, high) => (y) { y = Clip(x, low, high) }
    """
    found = rewritten(text, SPEC)
    assert [n.op_type for n in found.nodes] == ["Clip"]
    assert not any(found.nodes[0].inputs[1:])


def test_an_input_that_is_returned_gets_an_identity(rewritten):
    text = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y, float[2] z) { y, z = local.f(x) }
    <opset_import: ["" : 17], domain: "local">
    f (x) => (y, x) { y = Neg(x) }
    """
    found = rewritten(text, SPEC, verify=False)
    assert [n.op_type for n in found.nodes] == ["Neg", "Identity"]


def test_names_inside_nested_graphs_are_renamed_too(rewritten):
    text = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x, bool c) => (float[2] y) { r = Neg(x) z = local.f(r, c) y = Add(z, r) }
    <opset_import: ["" : 17], domain: "local">
    f (x, c) => (y) {
        y = If (c) <
            then_branch = t () => (float[2] r) { r = Abs(x) },
            else_branch = e () => (float[2] s) { s = Exp(x) }
        >
    }
    """
    assert rewritten(text, SPEC).ops == {"Neg": 1, "If": 1, "Abs": 1, "Exp": 1, "Add": 1}


def test_calls_inside_nested_graphs_are_inlined(rewritten):
    text = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <
            then_branch = t () => (float[2] r) { r = local.f(x) },
            else_branch = e () => (float[2] s) { s = Exp(x) }
        >
    }
    <opset_import: ["" : 17], domain: "local">
    f (x) => (y) { w = Constant <value_floats = [1.0, 2.0]> () y = Mul(x, w) }
    """
    assert rewritten(text, SPEC).ops == {"If": 1, "Constant": 1, "Mul": 1, "Exp": 1}


def test_metadata_of_the_call_reaches_the_nodes(rewritten):
    proto = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y) { y = local.f(x) }
    <opset_import: ["" : 17], domain: "local">
    f (x) => (y) { y = Neg(x) }
    """)
    helper.set_model_props(proto, {})
    proto.graph.node[0].metadata_props.add(key="scope", value="layer.0")
    proto.functions[0].node[0].metadata_props.add(key="own", value="neg")
    assert rewritten(proto, SPEC).nodes[0].metadata_props == {"scope": "layer.0", "own": "neg"}


def weighted(calls, elements):
    """A function with a weight of its own, called a number of times."""
    weight = helper.make_node(
        "Constant", [], ["w"], value=helper.make_tensor("w", TensorProto.FLOAT, [elements], [0.5] * elements)
    )
    body = [weight, helper.make_node("Mul", ["x", "w"], ["y"])]
    function = helper.make_function("local", "f", ["x"], ["y"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("f", [f"v{i}"], [f"v{i + 1}"], domain="local") for i in range(calls)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [elements])],
        [helper.make_tensor_value_info(f"v{calls}", TensorProto.FLOAT, [elements])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=9)


@pytest.mark.parametrize(("calls", "elements", "inlined"), [(1, 4096, True), (3, 16, True), (3, 4096, False)])
def test_weights_are_not_copied_to_every_call(rewritten, calls, elements, inlined):
    found = rewritten(weighted(calls, elements), SPEC)
    assert ("f" not in found.ops) == inlined
    assert found.refusals == (set() if inlined else {"copying its body to every call would make the model bigger"})


def test_calls_multiply_through_functions_that_call_functions(rewritten):
    # Copied to every call, b would make 36 times its 6 nodes; there are but 6 calls of it.
    chain = " ".join(f"v{i + 1} = local.{{0}}(v{i})" for i in range(6))

    def function(name, body):
        return f'<opset_import: ["" : 17, "local" : 1], domain: "local"> {name} (v0) => (v6) {{ {body} }}'

    text = f"""
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2] v0) => (float[2] v6) {{ {chain.format("a")} }}
    {function("a", chain.format("b"))}
    {function("b", chain.format("c"))}
    {function("c", "p = Neg(v0) q = Abs(p) v6 = Exp(q)")}
    """
    found = rewritten(text, SPEC)
    assert found.ops == {"b": 36, "Neg": 6, "Abs": 6, "Exp": 6}


def test_another_operator_set_version_is_refused(rewritten):
    text = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y) { y = local.f(x) }
    <opset_import: ["" : 16], domain: "local">
    f (x) => (y) { y = Neg(x) }
    """
    found = rewritten(text, SPEC, verify=False)
    assert found.ops["f"] == 1
    assert found.refusals == {"it is written in another version of an operator set than its caller"}


def test_models_without_functions_are_skipped(rewritten):
    found = rewritten('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Neg(x) }', SPEC)
    assert found.report.passes[0].reason == "the model has no functions"
