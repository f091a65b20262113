import numpy as np
import onnx
import pytest

import onnxopt

SPEC = "merge-chains"


def graph(body, *, inputs="float[3,4,5] x", outputs="float[a,b,c] y", opset=17, constants=""):
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({outputs})
    <{constants}>
    {{ {body} }}
    """


def only_node(found):
    assert len(found.nodes) == 1
    return found.nodes[0]


def values(node, start=1):
    """The constant inputs of a node as lists."""
    return [v.const_value.numpy().tolist() for v in node.inputs[start:]]


def same(text, model, feeds):
    verification = onnxopt.verify(onnx.parser.parse_model(text), model, feeds=feeds)
    assert verification.ok, verification.reason


# Cast -------------------------------------------------------------------------------------------------------

TYPES = {"float": 1, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "double": 11, "uint8": 2}


def casts(source, between, to):
    body = f"a = Cast <to = {TYPES[between]}> (x) y = Cast <to = {TYPES[to]}> (a)"
    return graph(body, inputs=f"{source}[3] x", outputs=f"{to}[3] y")


@pytest.mark.parametrize(
    ("source", "between", "to"),
    [
        ("float16", "float", "double"),
        ("int8", "int32", "float"),
        ("uint8", "float", "float16"),
        ("bool", "int64", "float"),
        ("int8", "int64", "uint8"),
        ("bool", "float", "int8"),
        ("int32", "double", "bool"),
        ("uint8", "float16", "int32"),
    ],
)
def test_a_cast_that_loses_nothing_is_left_out(rewritten, source, between, to):
    node = only_node(rewritten(casts(source, between, to), SPEC))
    assert node.op_type == "Cast"
    assert node.attributes["to"].value == TYPES[to]


@pytest.mark.parametrize(("source", "between"), [("float16", "float"), ("int32", "double"), ("bool", "int8")])
def test_a_cast_there_and_back_goes(rewritten, source, between):
    text = casts(source, between, source).replace("y = Cast", "b = Cast").replace(" }", " y = Identity(b) }")
    assert rewritten(text, SPEC).ops == {"Identity": 1}


@pytest.mark.parametrize(
    ("source", "between", "to"),
    [
        ("float", "float16", "float"),
        ("float", "int32", "float"),
        ("int64", "int32", "int64"),
        ("int64", "float", "double"),
        ("int8", "uint8", "int32"),
        ("float", "bool", "float"),
    ],
)
def test_a_cast_that_may_lose_something_stays(rewritten, source, between, to):
    found = rewritten(casts(source, between, to), SPEC)
    assert found.ops == {"Cast": 2}
    assert found.refusals == {"the first Cast may lose something"}


def test_a_float_that_may_not_fit_an_integer_is_converted_as_before(rewritten):
    found = rewritten(casts("float16", "float", "int8"), SPEC)
    assert found.ops == {"Cast": 2}
    assert found.refusals == {"a floating-point number may not fit into the integer type"}


def test_a_cast_used_twice_is_kept(rewritten):
    text = graph(
        "a = Cast <to = 1> (x) y = Cast <to = 11> (a) z = Exp(a)",
        inputs="float16[3] x",
        outputs="double[3] y, float[3] z",
    )
    assert rewritten(text, SPEC).ops == {"Cast": 2, "Exp": 1}


# Pad --------------------------------------------------------------------------------------------------------

PADS = "int64[6] p = {0, 1, 0, 0, 0, 2}, int64[6] q = {1, 1, 0, 0, 0, 3}"


@pytest.mark.parametrize(
    ("first", "second"), [("", ""), ("", ", zero"), (", zero", ""), (", one", ", one"), (", one", ", again")]
)
def test_pads_with_the_same_constant_are_added_up(rewritten, first, second):
    constants = f"{PADS}, float zero = {{0}}, float one = {{1}}, float again = {{1}}"
    text = graph(f"a = Pad(x, p{first}) y = Pad(a, q{second})", constants=constants)
    assert values(only_node(rewritten(text, SPEC)))[0] == [1, 2, 0, 0, 0, 5]


def test_pads_before_opset_11(rewritten):
    body = "a = Pad <pads = [0,1,0,0,0,2], value = 1.5> (x) y = Pad <pads = [1,0,0,0,0,0], value = 1.5> (a)"
    node = only_node(rewritten(graph(body, opset=10), SPEC))
    assert node.attributes["pads"].value == (1, 1, 0, 0, 0, 2)
    assert node.attributes["value"].value == 1.5


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Pad(x, p) y = Pad(a, q, one)", "the two do not fill with the same constant"),
        ("a = Pad(x, p, given) y = Pad(a, q)", "the two do not fill with the same constant"),
        ("a = Pad(x, p) y = Pad(a, cut)", "one Pad cuts something off"),
        ('a = Pad <mode = "edge"> (x, p) y = Pad(a, q)', None),
        ('a = Pad <mode = "reflect"> (x, p) y = Pad <mode = "reflect"> (a, q)', None),
    ],
)
def test_other_pads_stay(rewritten, body, reason):
    constants = f"{PADS}, float one = {{1}}, int64[6] cut = {{0, -1, 0, 0, 0, 0}}"
    found = rewritten(graph(body, constants=constants, inputs="float[3,4,5] x, float given"), SPEC)
    assert found.ops == {"Pad": 2}
    assert found.refusals == ({reason} if reason else set())


# Slice ------------------------------------------------------------------------------------------------------


def slices(*cuts, dims="n,m,k", opset=17):
    """A chain of Slices; each cut is {axis: (start, end, step)}."""
    steps, constants, value = [], [], "x"
    for number, cut in enumerate(cuts):
        columns = {"s": [c[0] for c in cut.values()], "e": [c[1] for c in cut.values()], "a": list(cut)}
        columns["t"] = [c[2] if len(c) > 2 else 1 for c in cut.values()]
        for key, column in columns.items():
            constants.append(f"int64[{len(column)}] {key}{number} = {{{', '.join(map(str, column))}}}")
        names = ", ".join(f"{key}{number}" for key in columns)
        steps.append(f"v{number} = Slice({value}, {names})")
        value = f"v{number}"
    steps.append(f"y = Identity({value})")
    return graph(" ".join(steps), inputs=f"float[{dims}] x", constants=", ".join(constants), opset=opset)


BIG = 2**63 - 1
FEEDS = [{"x": np.arange(n * m * 7, dtype=np.float32).reshape(n, m, 7)} for n, m in ((6, 5), (2, 9), (1, 1), (4, 3))]


@pytest.mark.parametrize("dims", ["n,m,k", "6,5,7"])
@pytest.mark.parametrize(
    "cuts",
    [
        [{0: (1, 3)}, {1: (2, 4)}],
        [{0: (1, 5)}, {0: (1, 3)}],
        [{0: (2, BIG)}, {0: (1, 3)}],
        [{0: (1, -1)}, {0: (1, BIG)}],
        [{0: (0, 4), 1: (1, BIG)}, {2: (1, 6, 2), 1: (0, 2)}],
        [{0: (3, 1)}, {0: (0, 4)}],
        [{0: (1, 5)}, {0: (1, 3)}, {0: (1, BIG)}],
        [{2: (6, 0, -2)}, {0: (0, 2)}],
        [{-1: (1, 5)}, {2: (1, 2)}],
    ],
)
def test_slices_of_slices(rewritten, cuts, dims):
    text = slices(*cuts, dims=dims)
    found = rewritten(text, SPEC)
    assert found.ops == {"Slice": 1, "Identity": 1}
    same(text, found.model, FEEDS[:1] if dims == "6,5,7" else FEEDS)


@pytest.mark.parametrize(
    "cuts",
    [
        [{0: (-3, BIG)}, {0: (1, 2)}],
        [{0: (0, 4)}, {0: (0, -1)}],
        [{0: (0, -1)}, {0: (0, 2)}],
        [{0: (0, 6, 2)}, {0: (0, 2)}],
    ],
)
def test_slices_that_depend_on_the_size_stay(rewritten, cuts):
    found = rewritten(slices(*cuts), SPEC)
    assert found.ops["Slice"] == 2
    assert found.refusals == {"both cut the same axis in a way that depends on its size"}
    fixed = slices(*cuts, dims="6,5,7")
    if len(cuts[0][0]) == 2:
        assert rewritten(fixed, SPEC).ops["Slice"] == 1


def test_slices_before_opset_10(rewritten):
    body = "a = Slice <starts = [1], ends = [3], axes = [0]> (x) y = Slice <starts = [1], ends = [2], axes = [0]> (a)"
    node = only_node(rewritten(graph(body, opset=9), SPEC))
    assert {k: a.value for k, a in node.attributes.items()} == {"starts": (2,), "ends": (3,), "axes": (0,)}


@pytest.mark.parametrize(
    ("start", "end", "axis", "squeeze", "index"),
    [(0, 1, 0, 0, 0), (2, 3, 1, 1, 2), (-1, BIG, 2, -1, -1), (-2, -1, -1, 2, -2), (4, BIG, 2, 2, 4)],
)
def test_one_element_is_gathered(rewritten, start, end, axis, squeeze, index):
    constants = f"int64[1] s = {{{start}}}, int64[1] e = {{{end}}}, int64[1] a = {{{axis}}}, int64[1] q = {{{squeeze}}}"
    dims = "3,4,5" if end == BIG and start > 0 else "n,m,k"
    text = graph(
        "v = Slice(x, s, e, a) y = Squeeze(v, q)",
        inputs=f"float[{dims}] x",
        outputs="float[a,b] y",
        constants=constants,
    )
    node = only_node(rewritten(text, SPEC, verify=False))
    assert node.op_type == "Gather"
    assert values(node) == [index]
    assert node.attributes["axis"].value == axis % 3
    feeds = [{"x": np.random.default_rng(0).random((3, 4, 5), np.float32)}]
    same(text, rewritten(text, SPEC, verify=False).model, feeds)


@pytest.mark.parametrize(
    ("constants", "opset"),
    [
        ("int64[1] s = {0}, int64[1] e = {2}, int64[1] a = {0}, int64[1] q = {0}", 17),
        ("int64[1] s = {1}, int64[1] e = {2147483647}, int64[1] a = {0}, int64[1] q = {0}", 17),
        ("int64[2] s = {0, 0}, int64[2] e = {1, 2}, int64[2] a = {0, 1}, int64[1] q = {0}", 17),
    ],
)
def test_more_than_one_element_is_not(rewritten, constants, opset):
    text = graph(
        "v = Slice(x, s, e, a) y = Squeeze(v, q)", inputs="float[n,m] x", outputs="float[b] y", constants=constants
    )
    assert rewritten(text, SPEC, verify=False).ops == {"Slice": 1, "Squeeze": 1}


def test_indices_from_the_end_need_opset_11(rewritten):
    def text(opset):
        return graph(
            "v = Slice(x, s, e, a) y = Squeeze <axes = [0]> (v)",
            inputs="float[n,3] x",
            outputs="float[b] y",
            constants="int64[1] s = {-1}, int64[1] e = {2147483647}, int64[1] a = {0}",
            opset=opset,
        )

    assert rewritten(text(10), SPEC).ops == {"Slice": 1, "Squeeze": 1}
    assert rewritten(text(11), SPEC).ops == {"Gather": 1}


# Reductions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduce", "opset"),
    [
        ("ReduceMean <axes = [1]> (x)", 17),
        ("ReduceMax <axes = [-2]> (x)", 11),
        ("ReduceSum(x, one)", 17),
        ("ReduceMean(x, one)", 18),
        ("ArgMax <axis = 1> (x)", 17),
    ],
)
def test_squeeze_of_what_was_reduced(rewritten, reduce, opset):
    kind = "int64" if "Arg" in reduce else "float"
    squeeze = "Squeeze(a, one)" if opset >= 13 else "Squeeze <axes = [1]> (a)"
    text = graph(f"a = {reduce} y = {squeeze}", outputs=f"{kind}[b,c] y", constants="int64[1] one = {1}", opset=opset)
    node = only_node(rewritten(text, SPEC))
    assert node.attributes["keepdims"].value == 0


def test_unsqueeze_of_what_was_reduced(rewritten):
    text = graph(
        "a = ReduceMean <axes = [0, -1], keepdims = 0> (x) y = Unsqueeze(a, axes)",
        constants="int64[2] axes = {2, 0}",
    )
    node = only_node(rewritten(text, SPEC))
    assert node.attributes["keepdims"].value == 1


@pytest.mark.parametrize(
    "body",
    [
        "a = ReduceMean <axes = [1, 2]> (x) b = Squeeze(a, one) y = Exp(b)",
        "a = ReduceMean <axes = [2]> (x) b = Squeeze(a, one) y = Exp(b)",
        "a = ReduceMean <axes = [1], keepdims = 0> (x) b = Unsqueeze(a, zero) y = Exp(b)",
        "a = ReduceMean <axes = [0], keepdims = 0> (x) b = Unsqueeze(a, outer) y = Exp(b)",
        "a = ReduceMean <axes = [1]> (x) z = Squeeze(a, one) y = Exp(a)",
    ],
)
def test_other_axes_and_uses_stay(rewritten, body):
    outputs = "float y, float[3,5] z" if "z =" in body else "float y"
    constants = "int64[1] one = {1}, int64[1] zero = {0}, int64[2] outer = {0, 3}"
    proto = onnx.parser.parse_model(graph(body, inputs="float[3,1,5] x", outputs=outputs, constants=constants))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert not rewritten(proto, SPEC).edits


def test_nodes_of_outer_graphs_are_not_repeated_inside(rewritten):
    proto = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float16[2] x, int64 n, bool c) => (double[2] y)
    {
        a = Cast <to = 1> (x)
        b = Cast <to = 11> (a)
        y = Loop (n, c, b) <
            body = l (int64 i, bool k, double[2] s) => (bool o, double[2] t) {
                o = Identity(k) d = Cast <to = 11> (a) t = Add(s, d)
            }
        >
    }
    """)
    assert rewritten(proto, SPEC).ops["Cast"] == 3


def test_constants_are_not_left_behind(rewritten):
    text = graph("a = Pad(x, p) y = Pad(a, q)", constants=PADS)
    assert len(rewritten(text, SPEC).model.graph.initializers) == 1
