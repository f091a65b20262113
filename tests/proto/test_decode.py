"""What is malformed is refused in one sentence that names it, before memory is taken."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxopt.errors import ModelError
from onnxopt.model import load
from onnxopt.proto.order import sort


def base() -> onnx.ModelProto:
    return parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x, bool c) => (float[N, 3] y) <float[3] w = {1, 2, 3}> {
            t = Add(x, w)
            u = If(c) <then_branch = th () => (a) { a = Relu(t) }, else_branch = el () => (b) { b = Identity(t) }>
            k = Constant<value = float[2] {1, 2}>()
            y = Relu(u) }"""
    )


Change = Callable[[onnx.ModelProto], object]


def set_dims(*dims: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        del proto.graph.initializer[0].dims[:]
        proto.graph.initializer[0].dims.extend(dims)

    return change


def add_initializer(name: str) -> Change:
    return lambda p: p.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [1], [1]))


def add_node(*args: object, **attributes: object) -> Change:
    return lambda p: p.graph.node.append(helper.make_node(*args, **attributes))


def put(path: str, value: object) -> Change:
    """Set a field, such as "graph.node[0].op_type"."""

    def change(proto: onnx.ModelProto) -> None:
        exec(f"proto.{path} = value", {"proto": proto, "value": value})

    return change


def sparse(values: list[float], indices: object, dims: list[int]) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.sparse_initializer.add(dims=dims)
        tensor.values.CopyFrom(onnx.numpy_helper.from_array(np.array(values, np.float32), "s"))
        tensor.indices.CopyFrom(onnx.numpy_helper.from_array(np.array(indices), "i"))

    return change


CASES: dict[str, tuple[Change, str]] = {
    "no graph": (lambda p: p.ClearField("graph"), "no graph"),
    "no opset": (lambda p: p.ClearField("opset_import"), "imports no operator set"),
    "no outputs": (lambda p: p.graph.ClearField("output"), "no outputs"),
    "no ir version": (lambda p: p.ClearField("ir_version"), "no IR version"),
    "ir version from the future": (put("ir_version", 999), r"IR version is 999.* reads up to \d+; upgrade onnx"),
    "opset from the future": (put("opset_import[0].version", 999), r'version 999 of .*"ai.onnx".*with opset \d+'),
    "opset 0": (put("opset_import[0].version", 0), "version 0"),
    "ml opset from the future": (
        lambda p: p.opset_import.add(domain="ai.onnx.ml", version=99),
        'version 99 of .*"ai.onnx.ml"',
    ),
    "two opsets": (lambda p: p.opset_import.add(domain="ai.onnx", version=9), "two different versions"),
    "negative dimension": (set_dims(3, -1), r'initializer "w" has the shape \[3, -1\]; .*negative'),
    "too large a shape": (set_dims(1 << 40), "takes 1099511627776 values, but holds 3"),
    "absurd shape": (set_dims(1 << 40, 1 << 40), "absurd"),
    "absurd shape of nothing": (set_dims(0, 1 << 40, 1 << 40), "absurd"),
    "raw data too short": (put("graph.initializer[0].raw_data", b"12"), "takes 12 bytes, but holds 2"),
    "attribute too short": (
        lambda p: p.graph.node[2].attribute[0].t.dims.append(7),
        'the attribute "value" has the shape',
    ),
    "unknown element type": (put("graph.initializer[0].data_type", 99), "element type 99"),
    "undefined element type": (put("graph.initializer[0].data_type", 0), "element type 0"),
    "unknown type of a value": (put("graph.input[0].type.tensor_type.elem_type", 99), "element type 99"),
    "unknown type of an attribute": (
        # Node { op_type: "N", attribute { type: 99 } }, which the library itself would not let us write.
        lambda p: p.MergeFromString(b"\x3a\x0a\x0a\x08\x22\x01N\x2a\x03\xa0\x01\x63"),
        "no value that onnx",
    ),
    "strings as raw data": (
        lambda p: p.graph.initializer.add(name="s", data_type=TensorProto.STRING, dims=[1], raw_data=b"x"),
        "of strings",
    ),
    "segments": (lambda p: p.graph.initializer[0].segment.SetInParent(), "in segments"),
    "initializer twice": (add_initializer("w"), 'two initializers with the name "w"'),
    "initializer without a name": (add_initializer(""), "no name"),
    "initializer like a node's output": (add_initializer("t"), 'the node "t" .*another value'),
    "input twice": (lambda p: p.graph.input.append(p.graph.input[0]), 'an input has the name "x"'),
    "value twice": (add_node("Relu", ["x"], ["t"], name="again"), 'the node "again" .* name "t"'),
    "unknown input": (add_node("Relu", ["nothing"], ["z"], name="n"), 'the node "n" .*"nothing"'),
    "unknown input in a body": (put("graph.node[1].attribute[0].g.node[0].input[:]", ["nothing"]), '"nothing"'),
    "unknown output": (
        put("graph.output[0].name", "nothing"),
        '"nothing" of the graph "g" is computed by no node',
    ),
    "body returns an outer value": (put("graph.node[1].attribute[0].g.output[0].name", "t"), "put an Identity"),
    "unknown output of a function": (
        lambda p: p.functions.add(domain="f", name="F", output=["z"]),
        '"z" of the function "f::F"',
    ),
    "function twice": (
        lambda p: [p.functions.add(domain="f", name="F") for _ in range(2)],
        'function "f::F" is defined twice',
    ),
    "no operator": (lambda p: p.graph.node[0].ClearField("op_type"), "names no operator"),
    "attribute twice": (
        lambda p: p.graph.node[2].attribute.append(p.graph.node[2].attribute[0]),
        "has an attribute twice",
    ),
    "cycle": (put("graph.node[0].input[:]", ["x", "y"]), r'the graph "g" has a cycle through the node "\w" \('),
    "cycle of one": (add_node("Relu", ["z"], ["z"], name="self"), 'cycle through the node "self"'),
    "cycle through a body": (
        put("graph.node[1].attribute[0].g.node[0].input[:]", ["y"]),
        r'the graph "g" has a cycle through the node "[uy]"',
    ),
    "map in an attribute": (
        lambda p: (
            p.graph.node[2].attribute.add(name="m", type=onnx.AttributeProto.TYPE_PROTO).tp.map_type.SetInParent()
        ),
        'attribute "m" holds a map',
    ),
    "sparse indices outside": (sparse([1, 2], [1, 6], [2, 3]), "outside its shape"),
    "sparse pairs outside": (sparse([1, 2], [[0, 0], [1, 3]], [2, 3]), "outside its shape"),
    "negative sparse index": (sparse([1, 2], [-1, 3], [2, 3]), "outside its shape"),
    "too few sparse indices": (sparse([1, 2], [1], [2, 3]), "do not fit its 2 values"),
    "sparse tensor that explodes": (sparse([1], [1], [1 << 31, 4]), "more than 2 GB"),
    "name that is not UTF-8": (
        lambda p: p.MergeFromString(b"\x3a\x09\x0a\x07\x0a\x01x\x1a\x02\xff\xfe"),
        "not UTF-8",
    ),
}


def apply(change: Change, proto: onnx.ModelProto) -> None:
    change(proto)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_path", [False, True], ids=["proto", "file"])
def test_malformed(tmp_path: Path, case: str, by_path: bool) -> None:
    change, complaint = CASES[case]
    proto = base()
    load(proto)
    apply(change, proto)
    source: onnx.ModelProto | Path = proto
    if by_path:
        source = tmp_path / "m.onnx"
        source.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=complaint) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    if by_path:
        assert str(caught.value).startswith(str(tmp_path / "m.onnx"))


def test_zero_size_dimensions() -> None:
    proto = base()
    proto.graph.initializer.append(helper.make_tensor("empty", TensorProto.FLOAT, [0, 3], []))
    assert load(proto).graph.initializers["empty"].const_value.numpy().shape == (0, 3)


def test_custom_operators() -> None:
    """Of an imported domain, of one that is not imported, and unknown ones of the standard domain."""
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.example": 1]> g (float[N] x) => (float[N] y) {
            a = com.example.Thing(x) b = org.other.Thing(a) y = NobodyKnowsThis(b) }"""
    )
    assert [n.op_type for n in load(proto).graph] == ["Thing", "Thing", "NobodyKnowsThis"]


def test_an_output_that_is_an_input_or_initializer() -> None:
    proto = base()
    for name in ("x", "w"):
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    model = load(proto)
    assert [v.name for v in model.clone().graph.outputs] == ["y", "x", "w"]


def test_nodes_out_of_order_are_sorted() -> None:
    """Also when only a body shows it, and when a body itself is out of order."""
    proto = base()
    nodes = [n for n in proto.graph.node if n.op_type != "If"]
    branch = proto.graph.node[1]
    body = branch.attribute[0].g
    body.node.insert(0, helper.make_node("Relu", ["later"], ["a"]))
    body.node[1].output[0] = "later"
    del proto.graph.node[:]
    proto.graph.node.extend([branch, *reversed(nodes)])
    model = load(proto)
    seen: set[str | None] = {"x", "w", "c"}
    for node in model.graph:
        for _, inner in ((a.name, a.as_graph()) for a in node.attributes.values() if a.type.name == "GRAPH"):
            known = set(seen)
            for nested in inner:
                assert {v.name for v in nested.inputs if v is not None} <= known
                known |= {v.name for v in nested.outputs}
        assert {v.name for v in node.inputs if v is not None} <= seen
        seen |= {v.name for v in node.outputs}
    model.clone()


def test_functions_out_of_order_are_sorted() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[N] x) => (float[N] y) { y = f.F(x) }
        <domain: "f", opset_import: ["": 17]> F (a) => (b) { c = Relu(a) b = Abs(c) }"""
    )
    first, second = proto.functions[0].node
    proto.functions[0].ClearField("node")
    proto.functions[0].node.extend([second, first])
    (function,) = load(proto).functions.values()
    assert [n.op_type for n in function] == ["Relu", "Abs"]


def test_a_long_chain_in_random_order() -> None:
    """Thousands of nodes, deeper than Python's stack, with and without a cycle."""
    count = 3000
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(count)]
    random.Random(0).shuffle(nodes)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(f"v{count}", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = load(proto)
    assert [n.name for n in model.graph] == [f"n{i}" for i in range(count)]
    first, last = next(iter(model.graph)), next(reversed(model.graph))
    first.replace_input_with(0, last.outputs[0])
    with pytest.raises(ModelError, match="the chain has a cycle through the node"):
        sort(model.graph, "the chain")


def doubling(levels: int) -> onnx.ModelProto:
    """Return a model with functions of which each calls the one before twice."""
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "d": 1]> g (float[1] x) => (float[1] y) { y = d.F0(x) }
        <domain: "d", opset_import: ["": 17]> F0 (a) => (b) { b = Relu(a) }"""
    )
    for level in range(1, levels + 1):
        inner = f"F{level - 1}"
        nodes = [helper.make_node(inner, ["a"], ["t"], domain="d"), helper.make_node(inner, ["t"], ["b"], domain="d")]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
        proto.functions.append(helper.make_function("d", f"F{level}", ["a"], ["b"], nodes, imports))
    proto.graph.node[0].op_type = f"F{levels}"
    return proto


def test_functions_that_stand_for_more_nodes_than_memory_holds_are_refused() -> None:
    """Forty functions of two nodes are a trillion nodes, which ONNX Runtime inlines before it looks at them."""
    assert len(load(doubling(20)).functions) == 21
    with pytest.raises(ModelError, match="stand for more than 10,000,000 nodes; export it with fewer levels"):
        load(doubling(40))


@pytest.mark.parametrize("other", ["F0", "F1"])
def test_functions_that_call_themselves_are_refused(other: str) -> None:
    proto = doubling(1)
    proto.functions[0].opset_import.append(helper.make_opsetid("d", 1))
    proto.functions[0].node[0].op_type, proto.functions[0].node[0].domain = other, "d"
    with pytest.raises(ModelError, match=r'the function "d::F[01]" calls itself, which ONNX does not allow'):
        load(proto)
