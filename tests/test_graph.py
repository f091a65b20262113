"""Helpers over the graph: scopes, constants, names, replacing values."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt import graph

NESTED = """
<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[2] x, bool c) => (float[2] y) {
  y = If <then_branch = t () => (float[2] a) { a = Add(x, x) },
          else_branch = e () => (float[2] b) { b = If <
              then_branch = t2 () => (float[2] p) { p = Neg(x) },
              else_branch = e2 () => (float[2] q) { q = my.Twice(x) }>(c) }>(c)
}
<domain: "my", opset_import: ["" : 15]>
Twice (x) => (y) { two = Constant <value_float = 2.0>() y = Mul(x, two) }
"""


def test_scopes_visit_nested_graphs_and_functions_with_their_opsets() -> None:
    found = list(graph.scopes(ir.from_onnx_text(NESTED)))
    assert [(s.opset, s.nested, s.function is not None) for s in found] == [
        (17, False, False),
        (17, True, False),
        (17, True, False),
        (17, True, False),
        (17, True, False),
        (15, False, True),
    ]
    assert len({s.path for s in found}) == 6
    assert found[-1].path == "function my::Twice"


def test_nodes_removed_while_visiting_are_not_entered() -> None:
    model = ir.from_onnx_text(NESTED)
    visited = []
    for scope in graph.scopes(model):
        visited.append(scope.path)
        if scope.path == "":
            outer = next(iter(scope.graph))
            model.graph.outputs[0] = model.graph.inputs[0]
            graph.remove_node(outer)
    assert visited == ["", "function my::Twice"]


def constant_model() -> ir.Model:
    return ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float[2] over) => (float[2] y)
        <float[2] over = {5, 6}, float[2] w = {1, 2}, int64[2] axes = {0, -1}> {
          one = Constant <value_float = 1.0>()
          ints = Constant <value_ints = [3, 4]>()
          two = Constant <value = float {2}>()
          a = Add(x, w)  b = Add(a, over)  y = Mul(b, two)
        }"""
    )


def test_constants_are_frozen_initializers_and_constant_nodes() -> None:
    model = constant_model()
    values = {v.name: v for node in model.graph for v in (*node.inputs, *node.outputs) if v is not None}
    values |= model.graph.initializers
    np.testing.assert_array_equal(graph.constant_array(values["w"]), [1, 2])
    assert graph.constant_array(values["over"]) is None, "a caller may override it"
    assert graph.constant_array(values["x"]) is None
    assert graph.constant_scalar(values["two"]) == 2.0
    assert graph.constant_scalar(values["one"]) == 1.0
    assert graph.constant_scalar(values["w"]) is None
    assert graph.constant_ints(values["ints"]) == (3, 4)
    assert graph.constant_ints(values["axes"]) == (0, -1)
    assert graph.constant_ints(values["w"]) is None
    assert graph.constant_array(values["w"], max_bytes=4) is None
    assert graph.constant_tensor(None) is None


def test_attributes_that_refer_to_the_caller_are_not_readable() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g (float[2] x) => (float[2] y) { y = my.Leaky <a = 0.5>(x) }
        <domain: "my", opset_import: ["" : 17]> Leaky <a> (x) => (y) { y = LeakyRelu <alpha : float = @a>(x) }"""
    )
    (node,) = next(iter(model.functions.values()))
    assert graph.has_references(node)
    with pytest.raises(ValueError, match="refers to an attribute"):
        graph.attribute(node, "alpha")
    (call,) = model.graph
    assert graph.attribute(call, "a") == 0.5
    assert graph.attribute(call, "b", 3) == 3


def test_fresh_names_collide_with_nothing_anywhere() -> None:
    model = ir.from_onnx_text(NESTED)
    names = graph.Names(model)
    taken = {v.name for node in graph.all_nodes(model) for v in node.outputs}
    for name in ("a", "x", "q", "two", "new"):
        assert names.fresh(name) not in taken | {"x", "c"} or name == "new"
    assert names.fresh("new") == "new_1"


def test_an_output_keeps_name_type_and_shape_when_it_is_replaced() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) { a = Relu(x) y = Identity(a) }'
    )
    relu, identity = model.graph
    assert graph.cannot_replace(identity.outputs[0], relu.outputs[0]) is None
    graph.replace_value(identity.outputs[0], relu.outputs[0])
    graph.remove_node(identity)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.name, o.type.tensor_type.shape.dim[0].dim_param) for o in proto.graph.output] == [("y", "N")]


def test_an_output_without_a_shape_does_not_get_one() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float y) { a = Relu(x) y = Identity(a) }'
    )
    relu, identity = model.graph
    identity.outputs[0].shape, relu.outputs[0].shape = None, ir.Shape([2])
    graph.replace_value(identity.outputs[0], relu.outputs[0])
    assert model.graph.outputs[0].shape is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[2] x) => (float[2] y) { y = Identity(x) }", "cannot take the name"),
        (
            "g (float[2] x) => (float[2] z, float[2] y) { z = Relu(x) y = Identity(z) }",
            "both values are graph outputs",
        ),
    ],
)
def test_replacements_that_would_lose_an_output_are_refused(text: str, reason: str) -> None:
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    node = list(model.graph)[-1]
    assert node.inputs[0] is not None
    found = graph.cannot_replace(node.outputs[0], node.inputs[0])
    assert found is not None
    assert reason in found
    with pytest.raises(ValueError, match="output"):
        graph.replace_value(node.outputs[0], node.inputs[0])


def test_a_branch_output_is_not_taken_from_the_outer_graph() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y) {
          r = Relu(x)
          y = If <then_branch = t () => (float[2] a) { a = Identity(r) },
                  else_branch = e () => (float[2] b) { b = Neg(x) }>(c) }"""
    )
    (identity,) = next(body for _, body in graph.bodies(list(model.graph)[1]))
    assert identity.inputs[0] is not None
    assert "outer graph" in (graph.cannot_replace(identity.outputs[0], identity.inputs[0]) or "")


def test_constants_become_initializers_and_nodes_inside_functions() -> None:
    model = ir.from_onnx_text(NESTED)
    names = graph.Names(model)
    for scope in graph.scopes(model):
        node = next(iter(scope.graph))
        graph.add_constant(scope, names, "k", np.ones(3, np.float32), before=node)
    onnx.checker.check_model(ir.to_proto(model))
    assert [len(s.graph.initializers) for s in graph.scopes(model)] == [1, 1, 1, 1, 1, 0]
    assert [n.op_type for n in next(iter(model.functions.values()))] == ["Constant", "Constant", "Mul"]


def test_only_unused_frozen_initializers_are_dropped() -> None:
    model = constant_model()
    values = dict(model.graph.initializers)
    graph.drop_unused_initializers(model.graph, [*values.values(), None])
    assert set(model.graph.initializers) == {"over", "w"}, "axes is unused, w is used, over is an input"


def test_only_use_counts_outputs_and_captures() -> None:
    model = ir.from_onnx_text(NESTED)
    x, c = model.graph.inputs
    assert graph.only_use(x) is None
    assert graph.only_use(c) is None
    model = constant_model()
    add = next(n for n in model.graph if n.op_type == "Add")
    assert graph.only_use(add.outputs[0]) is list(model.graph)[-2]


def test_a_removed_node_captures_nothing_any_more() -> None:
    model = ir.from_onnx_text(NESTED)
    x = model.graph.inputs[0]
    assert graph.use_count(x) == 4
    outer = model.graph.node(0)
    model.graph.outputs[0] = x
    graph.remove_node(outer)
    assert graph.use_count(x) == len(x.uses()) == 0


def test_nodes_are_removed_from_graphs_of_many_outputs() -> None:
    outputs = ", ".join(f"float[2] y{i}" for i in range(100))
    nodes = "".join(f"a{i} = Neg(x) y{i} = Identity(a{i})" for i in range(100))
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => ({outputs}) {{ {nodes} }}')
    with pytest.raises(ValueError, match="still used"):
        graph.remove_node(model.graph.node(0))
    for node in model.graph:
        if node.op_type == "Identity" and node.outputs[0].name != "y7":
            source = node.inputs[0]
            assert source is not None
            graph.replace_value(node.outputs[0], source)
            graph.remove_node(node)
    assert len(model.graph) == 101
    assert [v.name for v in model.graph.outputs] == [f"y{i}" for i in range(100)]
    onnx.checker.check_model(ir.to_proto(model))
    with pytest.raises(ValueError, match="still used"):
        graph.remove_node(model.graph.node(0))


@pytest.mark.parametrize(
    "tensor",
    [
        ir.tensor(np.arange(3), name="old"),
        ir.tensor(onnx.helper.make_tensor("old", onnx.TensorProto.INT4, [3], [1, 2, 3])),
        ir.StringTensor([b"a", b"b"], shape=ir.Shape([2]), name="old"),
        ir.ExternalTensor("f", 8, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="old", base_dir="d"),
    ],
    ids=["numpy", "4 bits", "string", "external"],
)
def test_a_tensor_gets_a_name_without_losing_its_own(tensor: ir.TensorProtocol) -> None:
    found = graph.named(tensor, "new")
    assert (found.name, tensor.name) == ("new", "old")
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    if isinstance(tensor, ir.ExternalTensor):
        assert isinstance(found, ir.ExternalTensor)
        assert (found.path, found.offset, found.length) == (tensor.path, tensor.offset, tensor.length)
    else:
        np.testing.assert_array_equal(found.numpy(), tensor.numpy())


def test_unused_constants_are_dropped_wherever_they_are() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float[2] over) => (float[2] y) <float[2] over = {5, 6}, float[2] w = {1, 2}> {
          one = Constant <value_float = 1.0>() two = Constant <value_float = 2.0>() y = Mul(x, two)
        }"""
    )
    values = [*model.graph.initializers.values(), *(n.outputs[0] for n in model.graph), None]
    graph.drop_unused_constants(values)
    assert list(model.graph.initializers) == ["over"]
    assert [n.outputs[0].name for n in model.graph] == ["two", "y"]
