"""What `Shapes` knows about single values: sources of truth, edits, nested graphs, functions, and very long chains."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim, symbol
from onnxopt.analysis.shapes import Shapes

B, S = symbol("b"), symbol("s")


def model_of(
    body: str, header: str = 'ir_version: 10, opset_import: ["":23, "com.microsoft":1, "custom":1]'
) -> ir.Model:
    return ir.from_onnx_text(f"<{header}> {body}")


def named(model: ir.Model, name: str) -> ir.Value:
    for graph in [model.graph, *model.graph.subgraphs(), *(f.graph for f in model.functions.values())]:
        for value in (*graph.inputs, *graph.initializers.values()):
            if value.name == name:
                return value
        for node in graph:
            for value in node.outputs:
                if value.name == name:
                    return value
    raise AssertionError(f"no value {name}")


def shape_of(body: str, name: str = "y") -> tuple[Dim, ...] | None:
    model = model_of(body)
    return Shapes(model).of(named(model, name))


def text_of(shape: tuple[Dim, ...] | None) -> list[str] | None:
    return None if shape is None else [str(d) for d in shape]


# Sources of truth -------------------------------------------------------------------------------------


def test_inputs_with_the_same_name_for_a_size_have_the_same_size() -> None:
    model = model_of("g (float[b,s,8] x, float[b,s] w, float[b] v) => (float[b] y) { y = Identity(v) }")
    shapes = Shapes(model)
    assert shapes.of(model.graph.inputs[0]) == (B, S, 8)
    assert shapes.of(model.graph.inputs[1]) == (B, S)


def test_nameless_sizes_are_told_apart() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["":23]> g (float[a,c,b] x) => (float[a] y) { y = ReduceSum <keepdims=0> (x) }'
    )
    for dim, text in zip(proto.graph.input[0].type.tensor_type.shape.dim, ("?", "?", "b"), strict=True):
        dim.dim_param = text
    proto.graph.input[0].type.tensor_type.shape.dim[2].ClearField("dim_param")
    model = ir.from_proto(proto)
    shape = Shapes(model).of(model.graph.inputs[0])
    assert shape is not None
    assert len(set(shape)) == 3
    assert all(dims.is_opaque(d) for d in shape)


def test_an_input_without_a_declared_shape_is_unknown() -> None:
    model = model_of("g (float[] x, float[3] z) => (float[3] y) { y = Add(x, z) }")
    model.graph.inputs[0].shape = None
    shapes = Shapes(model)
    assert shapes.of(model.graph.inputs[0]) is None
    assert shapes.rank(model.graph.inputs[0]) is None


def test_rules_are_believed_over_declared_shapes() -> None:
    body = "g (float[b,4] x) => (float[9,9,9] y) <float[7,7] t> { t = Relu(x) y = Transpose(t) }"
    assert shape_of(body, "t") == (B, 4)
    assert shape_of(body, "y") == (4, B)


def test_declared_numbers_fill_in_what_no_rule_knows_and_declared_names_do_not() -> None:
    shape = shape_of("g (float[b,4] x) => (float[b,4] y) <float[b,4] t> { t = custom.Thing(x) y = Relu(t) }")
    assert shape is not None
    assert shape[1] == 4
    assert dims.is_opaque(shape[0])


def test_without_a_rule_or_declaration_nothing_is_known() -> None:
    assert shape_of("g (float[b,4] x) => (float[b] z) { y = custom.Thing(x) z = Relu(y) }") is None


def test_unknown_sizes_are_equal_only_to_themselves() -> None:
    model = model_of(
        """g (float[b,4] x, bool[4] m) => (float[b,k] y) {
            p = Compress <axis=1> (x, m)  q = Compress <axis=1> (x, m)  r = Relu(p)  y = Add(p, q) }"""
    )
    shapes = Shapes(model)
    p, q, r = (named(model, n) for n in "pqr")
    assert shapes.same_shape(p, r)
    assert not shapes.same_shape(p, q)


def test_an_overridable_initializer_has_the_shape_its_input_declares() -> None:
    model = model_of("g (float[b,2] x, float[m] w) => (float[b,k] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    weight = model.graph.inputs[1]
    weight.shape = ir.Shape(["m"])  # loading keeps what the file says; onnx_ir alone takes the tensor's shape
    assert Shapes(model).of(weight) == (symbol("m"),)


def test_frozen_initializers_are_constants_and_overridable_ones_are_not() -> None:
    body = """g (float[b,6] x, int64[2] o) => (float[r,c] y)
        <int64[2] o = {2, 3}, int64[2] f = {-1, 3}> { y = Reshape(x, o) z = Reshape(x, f) }"""
    model = model_of(body)
    shapes = Shapes(model)
    assert shapes.content(named(model, "f")) == (-1, 3)
    assert shapes.content(named(model, "o")) is None
    assert shapes.of(named(model, "z")) == (2 * B, 3)
    y = shapes.of(named(model, "y"))
    assert y is not None
    assert [isinstance(d, int) for d in y] == [False, False]


# Shape arithmetic -------------------------------------------------------------------------------------


def test_a_reshape_whose_target_is_computed_from_shapes() -> None:
    body = """g (float[b,s,768] x) => (float[b,s,h,d] y) {
        shape = Shape(x)
        zero = Constant <value_int=0> ()
        one = Constant <value_int=1> ()
        axis = Constant <value_ints=[0]> ()
        b0 = Gather(shape, zero)  s0 = Gather(shape, one)
        b1 = Unsqueeze(b0, axis)  s1 = Unsqueeze(s0, axis)
        rest = Constant <value_ints=[12, -1]> ()
        target = Concat <axis=0> (b1, s1, rest)
        y = Reshape(x, target) }"""
    model = model_of(body)
    shapes = Shapes(model)
    assert shapes.of(named(model, "y")) == (B, S, 12, 64)
    assert shapes.content(named(model, "target")) == (B, S, 12, -1)
    assert shapes.content(named(model, "b0")) == B


def test_an_expand_guarded_by_equal_and_where() -> None:
    """The legacy exporter replaces each -1 of an expand by 1 at run time; sizes are never -1."""
    body = """g (float[b,1,s] x) => (float[b,q,s] y) {
        shape = Shape(x)
        five = Constant <value_ints=[5]> ()
        zero = Constant <value_ints=[0]> ()  one = Constant <value_ints=[1]> ()
        two = Constant <value_ints=[2]> ()  three = Constant <value_ints=[3]> ()
        head = Slice(shape, zero, one)  tail = Slice(shape, two, three)
        wanted = Concat <axis=0> (head, five, tail)
        count = Shape(wanted)
        ones = ConstantOfShape <value = int64[1] {1}> (count)
        minus = Constant <value_int=-1> ()
        negative = Mul(ones, minus)
        free = Equal(wanted, negative)
        target = Where(free, ones, wanted)
        y = Expand(x, target) }"""
    assert shape_of(body) == (B, 5, S)


def test_content_is_none_for_what_is_not_a_small_list_of_integers() -> None:
    model = model_of(
        """g (float[b,3] x, int64[3] i) => (float[b,3] y) {
            f = Constant <value_floats=[1.0, 2.0]> ()
            m = Constant <value = int64[2,2] {1, 2, 3, 4}> ()
            y = Identity(x) }"""
    )
    shapes = Shapes(model)
    for name in ("x", "i", "f", "m", "y"):
        assert shapes.content(named(model, name)) is None
    flat = shapes.known_content(named(model, "m"))
    assert flat is not None
    assert flat.items == (1, 2, 3, 4)


def test_elements_that_are_unknown_do_not_hide_the_others() -> None:
    model = model_of(
        """g (float[b,3] x, int64[1] i) => (float[b] y) {
            shape = Shape(x)  target = Concat <axis=0> (shape, i)  y = Reshape(x, target) }"""
    )
    shapes = Shapes(model)
    assert shapes.content(named(model, "target")) == (B, 3, None)
    y = shapes.of(named(model, "y"))
    assert y is not None
    assert y[:2] == (B, 3)
    assert dims.is_opaque(y[2]), "with an empty batch the last size could be anything"


@pytest.mark.parametrize(
    ("expression", "content"),
    [
        ("Div(a, two)", "floor(b/2)"),
        ("Div(minus, two)", "-3"),  # towards zero
        ("Mod(minus, two)", "1"),
        ("Mod <fmod=1> (minus, two)", "None"),
        ("Div(two, zero)", "None"),
        ("Max(a, zero)", "b"),
        ("Min(a, zero)", "0"),
        ("Neg(a)", "-b"),
        ("Sub(a, two)", "b - 2"),
        ("Equal(a, minus)", "0"),
        ("Equal(a, two)", "None"),
        ("GreaterOrEqual(a, zero)", "1"),
        ("Less(a, zero)", "0"),
        ("Greater(a, zero)", "None"),
        ("Mul(a, huge)", "9223372036854775807*b"),
        ("Mul(huge, two)", "None"),  # overflows
        ("Cast <to=6> (huge)", "None"),
        ("Cast <to=6> (a)", "b"),
        ("Cast <to=3> (a)", "None"),
        ("Cast <to=9> (two)", "1"),
        ("ReduceProd <keepdims=1> (pair)", "7*b"),
        ("ReduceSum <keepdims=1> (pair)", "b + 7"),
        ("ReduceMax <keepdims=1> (pair)", "max(b - 7, 0) + 7"),
    ],
)
def test_arithmetic_on_sizes(expression: str, content: str) -> None:
    body = f"""g (float[b,7] x) => (int64[2] pair) {{
        pair = Shape(x)
        a = Shape <end=1> (x)
        two = Constant <value_ints=[2]> ()  zero = Constant <value_ints=[0]> ()
        minus = Constant <value_ints=[-7]> ()
        huge = Constant <value_ints=[9223372036854775807]> ()
        y = {expression} }}"""
    model = model_of(body)
    known = Shapes(model).known_content(named(model, "y"))
    assert (str(known.items[0]) if known is not None else "None") == content


def test_the_size_of_a_layer_is_not_negative_even_where_the_formula_could_be() -> None:
    body = """g (float[1,3,h] x, float[4,3,5] w) => (int64[1] y) {
        c = Conv(x, w)  size = Shape <start=2> (c)
        two = Constant <value_ints=[2]> ()  y = Div(size, two) }"""
    model = model_of(body)
    known = Shapes(model).content(named(model, "y"))
    assert known == ((symbol("h") - 4) // 2,)


# Comparisons ------------------------------------------------------------------------------------------


def test_same_shape_and_broadcasts_to() -> None:
    model = model_of(
        """g (float[b,s,8] x, float[s,1] w, float[8] v, float[b,s,8] u, float z) => (float[b,s,8] y)
        { y = Add(x, w) }"""
    )
    shapes = Shapes(model)
    x, w, v, u, z = model.graph.inputs
    assert shapes.same_shape(x, u)
    assert not shapes.same_shape(x, w)
    assert shapes.broadcasts_to(w, x)
    assert shapes.broadcasts_to(v, x)
    assert shapes.broadcasts_to(z, x)
    assert shapes.broadcasts_to(x, x)
    assert not shapes.broadcasts_to(x, w)
    assert shapes.broadcasts_to((1, 8), x)
    assert not shapes.broadcasts_to((B, 8), x), "b stands where s is"
    assert shapes.same_shape((B, 1), (B, 1))
    model.graph.inputs[2].shape = None
    assert not Shapes(model).same_shape(v, v)


def test_stretching_two_unknown_sizes_is_neither_of_them() -> None:
    shape = shape_of("g (float[b] x, float[s] w) => (float[n] y) { y = Add(x, w) }")
    assert shape is not None
    assert shape[0] not in (B, S)
    assert text_of(shape) == ["broadcast(b, s)"]


def test_the_shape_to_declare_leaves_derived_sizes_open() -> None:
    model = model_of("g (float[b,s,8] x) => (float[b,n,8] y) { y = Concat <axis=1> (x, x) }")
    shapes = Shapes(model)
    declared = shapes.ir_shape(model.graph.outputs[0])
    assert declared is not None
    assert [d if isinstance(d, int) else d.value for d in declared] == ["b", None, 8]


# Edits ------------------------------------------------------------------------------------------------


def test_new_nodes_are_understood_from_what_produces_them() -> None:
    model = model_of("g (float[b,s,8] x) => (float[b,s,8] y) { y = Relu(x) }")
    shapes = Shapes(model)
    y = model.graph.outputs[0]
    assert shapes.of(y) == (B, S, 8)
    relu = model.graph[0]
    turned = ir.node("Transpose", [model.graph.inputs[0]], {"perm": [2, 0, 1]})
    back = ir.node("Transpose", [turned.outputs[0]], {"perm": [1, 2, 0]})
    model.graph.insert_before(relu, [turned, back])
    relu.replace_input_with(0, back.outputs[0])
    assert shapes.of(turned.outputs[0]) == (8, B, S)
    assert shapes.of(back.outputs[0]) == (B, S, 8)
    assert shapes.of(y) == (B, S, 8)
    assert shapes.dtype(back.outputs[0]) == ir.DataType.FLOAT


def test_the_model_is_not_changed() -> None:
    model = model_of("g (float[b,4] x, bool[4] m) => (float[b,k] y) { t = Compress <axis=1> (x, m) y = Relu(t) }")
    before = ir.to_proto(model).SerializeToString()
    shapes = Shapes(model)
    for node in model.graph:
        shapes.of(node.outputs[0])
        shapes.content(node.outputs[0])
        shapes.dtype(node.outputs[0])
    assert ir.to_proto(model).SerializeToString() == before


def test_two_runs_agree() -> None:
    body = "g (float[b,4] x, bool[4] m) => (float[b,k] y) { t = Compress <axis=1> (x, m) y = Relu(t) }"
    assert text_of(shape_of(body)) == text_of(shape_of(body))


# Element types ----------------------------------------------------------------------------------------


def test_types_follow_from_producers_where_none_is_declared() -> None:
    model = model_of(
        """g (float16[b,4] x, int64[b] i) => (float16[b] y) {
            s = Shape(x)  c = Cast <to=11> (x)  d = Neg(c)  e = Equal(d, d)  t, k = TopK(x, i)
            w = Where(e, c, d)  z = ConstantOfShape(s)  l = CastLike(x, i)  q = Constant <value_int=3> ()
            u = custom.Thing(x)  y = ReduceSum <keepdims=0> (x) }"""
    )
    shapes = Shapes(model)
    types = {name: shapes.dtype(named(model, name)) for name in "scdetkwzlquy"}
    kind = ir.DataType
    assert types == {
        "s": kind.INT64,
        "c": kind.DOUBLE,
        "d": kind.DOUBLE,
        "e": kind.BOOL,
        "t": kind.FLOAT16,
        "k": kind.INT64,
        "w": kind.DOUBLE,
        "z": kind.FLOAT,
        "l": kind.INT64,
        "q": kind.INT64,
        "u": None,
        "y": kind.FLOAT16,
    }


# Graphs in graphs -------------------------------------------------------------------------------------

IF = """g (float[b,4] x, bool c) => (float[n,4] y) {{
    y = If(c) <then_branch = t () => (float[n,4] p) {{ p = {then} }},
               else_branch = e () => (float[m,4] q) {{ q = {other} }}> }}"""


def test_branches_that_agree() -> None:
    assert shape_of(IF.format(then="Relu(x)", other="Neg(x)")) == (B, 4)


def test_branches_that_differ() -> None:
    shape = shape_of(IF.format(then="Relu(x)", other="Concat <axis=0> (x, x)"))
    assert shape is not None
    assert shape[1] == 4
    assert shape[0] not in (B, 2 * B)


def test_the_branch_that_is_always_taken() -> None:
    body = """g (float[b,4] x) => (float[n,4] y, int64[1] z) {
        s = Shape(x)  two = Constant <value_int=2> ()  n = Size(s)  c = Equal(n, two)
        y, z = If(c) <then_branch = t () => (float[n,4] p, int64[1] i) { p = Concat <axis=0> (x, x) i = Shape <end=1> (p) },
                      else_branch = e () => (float[m,4] q, int64[1] j) { q = Relu(x) j = Shape <end=1> (q) }> }"""
    model = model_of(body)
    shapes = Shapes(model)
    assert shapes.of(named(model, "y")) == (2 * B, 4)
    assert shapes.content(named(model, "z")) == (2 * B,)


LOOP = """g (float[b,4] x, int64 n, bool c) => (float[r,4] y, float[r,4] v) {{
    y, v, scanned = Loop(n, c, x, x) <body = l (int64 i, bool k, float[p,4] state, float[q,4] other)
        => (bool k2, float[p,4] state2, float[q,4] other2, float[p,4] out)
        {{ k2 = Identity(k) state2 = {state} other2 = {other} out = Relu(state) }}> }}"""


def test_a_loop_that_keeps_the_shape_of_its_states() -> None:
    model = model_of(LOOP.format(state="Relu(state)", other="Add(other, state)"))
    shapes = Shapes(model)
    assert shapes.of(named(model, "y")) == (B, 4)
    assert shapes.of(named(model, "v")) == (B, 4)
    assert shapes.of(named(model, "state")) == (B, 4)
    assert shapes.of(named(model, "i")) == ()


def test_a_loop_that_lets_a_state_grow() -> None:
    model = model_of(LOOP.format(state="Relu(state)", other="Concat <axis=0> (other, state)"))
    shapes = Shapes(model)
    inner = shapes.of(named(model, "other2"))
    assert inner is not None
    assert dims.is_opaque(inner[0])
    assert shapes.of(named(model, "state2")) == (B, 4)
    assert shapes.of(named(model, "y")) == (B, 4)
    grown = shapes.of(named(model, "v"))
    assert grown is not None
    assert grown[0] != B


def test_a_loop_whose_states_change_places() -> None:
    body = """g (float[b,4] x, float[s,4] w, int64 n, bool c) => (float[r,4] y, float[r,4] v) {
        y, v = Loop(n, c, x, w) <body = l (int64 i, bool k, float[p,4] f, float[q,4] h)
            => (bool k2, float[p,4] f2, float[q,4] h2) { k2 = Identity(k) f2 = Identity(h) h2 = Identity(f) }> }"""
    model = model_of(body)
    shapes = Shapes(model)
    for name in ("y", "v"):
        shape = shapes.of(named(model, name))
        assert shape is not None
        assert shape[0] not in (B, S)


def test_a_scan_stacks_what_its_body_gives() -> None:
    body = """g (float[s,b,4] x, float[b] h) => (float[b] y, float[t,b,3] z) {
        y, z = Scan <num_scan_inputs=1, body = l (float[p] state, float[p,4] row) => (float[p] state2, float[p,3] out)
            { state2 = Relu(state) w = Constant <value = float[4,3] {1,2,3,4,5,6,7,8,9,10,11,12}> () out = MatMul(row, w) }>
            (h, x) }"""
    model = model_of(body)
    shapes = Shapes(model)
    assert shapes.of(named(model, "row")) == (B, 4)
    assert shapes.of(named(model, "y")) == (B,)
    stacked = shapes.of(named(model, "z"))
    assert stacked is not None
    assert stacked[0] == S
    assert stacked[1] != B, "a scan over nothing gives no rounds to tell the size from"


def test_sizes_that_differ_from_round_to_round_stay_inside() -> None:
    body = """g (float[2,9] x, bool[9] m) => (float[2,k] z) {
        z = Scan <num_scan_inputs=1, body = l (float[9] row) => (float[k] out) { out = Compress(row, m) }> (x) }"""
    model = model_of(body)
    shapes = Shapes(model)
    inner, outer = shapes.of(named(model, "out")), shapes.of(named(model, "z"))
    assert inner is not None
    assert outer is not None
    assert outer[0] == 2
    assert outer[1] != inner[0]


def test_functions_may_be_called_with_anything() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["":23, "local":1]>
        g (float[b,4] x) => (float[b,4] y) { y = local.f <to=11> (x) }
        <domain: "local", opset_import: ["":23]>
        f <to> (a) => (r) { one = Constant <value_ints=[1]> () s = Shape(a) r = Add(a, a) c = Cast <to: int = @to> (a) }"""
    )
    shapes = Shapes(model)
    assert shapes.of(named(model, "a")) is None
    assert shapes.of(named(model, "r")) is None
    assert shapes.of(named(model, "one")) == (1,)
    assert shapes.dtype(named(model, "c")) is None
    y = shapes.of(named(model, "y"))
    assert y is not None
    assert y[1] == 4


def test_a_function_of_the_model_stands_before_the_operator_of_that_name() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["":23, "com.microsoft":1]>
        g (float[b,4] x) => (float[n] z) { y = com.microsoft.Gelu(x) z = Relu(y) }
        <domain: "com.microsoft", opset_import: ["":23]> Gelu (a) => (r) { r = Concat <axis=0> (a, a) }"""
    )
    assert Shapes(model).of(named(model, "y")) is None


def test_sequences_have_no_shape_and_their_tensors_do() -> None:
    body = """g (float[b,6] x, float[s] w) => (float[b,2] y) {
        two = Constant <value_int=2> ()  one = Constant <value_int=1> ()  zero = Constant <value_int=0> ()
        parts = SplitToSequence <axis=1> (x, two)
        y = SequenceAt(parts, one)
        both = SequenceConstruct(w, w)
        z = SequenceAt(both, zero) }"""
    model = model_of(body)
    shapes = Shapes(model)
    assert shapes.of(named(model, "parts")) is None
    assert shapes.of(named(model, "y")) == (B, 2)
    assert shapes.of(named(model, "z")) == (S,)
    assert shapes.dtype(named(model, "z")) == ir.DataType.FLOAT


# Malformed and very large -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node",
    [
        "Transpose <perm=[0,3]> (x)",
        "Concat <axis=7> (x, x)",
        "Reshape(x)",
        "Conv(x, x)",
        "Gather <axis=5> (x, x)",
        "Flatten <axis=9> (x)",
        "MaxPool <kernel_shape=[2], strides=[0]> (x3)",
        "DepthToSpace <blocksize=2> (x)",
        'Einsum <equation="ijk->k"> (x)',
        "Split <axis=4> (x)",
        "Attention(x, x, x)",
    ],
)
def test_nodes_that_cannot_run_are_unknown_and_no_error(node: str) -> None:
    model = model_of(f"g (float[b,4] x, float[b,4,4] x3) => (float[n] z) {{ y = {node} z = Relu(y) }}")
    shape = Shapes(model).of(named(model, "y"))
    assert shape is None or all(dims.is_opaque(d) for d in shape)


def test_a_graph_that_runs_in_circles_is_unknown() -> None:
    model = model_of("g (float[b,4] x) => (float[b,4] z) { p = Add(x, x) q = Relu(p) z = Relu(q) }")
    first, second = model.graph[0], model.graph[1]
    first.replace_input_with(1, second.outputs[0])
    first.replace_input_with(0, second.outputs[0])
    for node in (first, second):
        node.outputs[0].type = None
    shapes = Shapes(model)
    assert shapes.of(second.outputs[0]) is None
    assert shapes.content(second.outputs[0]) is None
    assert shapes.dtype(second.outputs[0]) is None


@pytest.mark.parametrize("operator", ["Relu", "Concat", "Compress", "Mul"])
def test_chains_as_long_as_a_model(operator: str) -> None:
    """No recursion, no quadratic growth: expressions and numbers stay short however many nodes there are."""
    count = 5_000
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["b", "s"]))
    mask = ir.val("m", dtype=ir.DataType.BOOL, shape=ir.Shape([None]))
    nodes: list[ir.Node] = [ir.node("Shape", [x])] if operator == "Mul" else []
    value = nodes[-1].outputs[0] if nodes else x
    for _ in range(count):
        if operator == "Compress":
            nodes.append(ir.node("Compress", [x, mask], {"axis": 1}))
            nodes.append(ir.node("Concat", [value, nodes[-1].outputs[0]], {"axis": 1}))
        elif operator == "Concat":
            nodes.append(ir.node("Concat", [value, value], {"axis": 1}))
        else:
            nodes.append(ir.node(operator, [value] * (2 if operator == "Mul" else 1)))
        value = nodes[-1].outputs[0]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"v{index}"
    model = ir.Model(ir.Graph([x, mask], [value], nodes=nodes, opset_imports={"": 23}), ir_version=10)
    shapes = Shapes(model)
    shape = shapes.of(value)
    assert shape is not None
    assert all(dims.size(d) < 200 for d in shape)
    if operator == "Relu":
        assert shape == (B, S)
    if operator == "Mul":
        assert shapes.content(value) is None


def test_a_large_constant_is_not_read() -> None:
    class Unreadable(ir.Tensor[Any]):
        def numpy(self) -> np.ndarray[Any, Any]:
            raise AssertionError("read")

    tensor = Unreadable(np.zeros(1000, np.int64), name="w")
    value = ir.Value(name="w", const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1000]))
    out = ir.node("Relu", [value])
    model = ir.Model(
        ir.Graph([], [out.outputs[0]], nodes=[out], initializers=[value], opset_imports={"": 23}), ir_version=10
    )
    shapes = Shapes(model)
    assert shapes.of(value) == (1000,)
    assert shapes.content(value) is None
