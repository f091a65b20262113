"""Which nodes have 8-bit kernels, and which values share a grid."""

import onnx_ir as ir

from onnxopt.analysis.int8 import Ties, activated, between, layer, repeated, worthwhile
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import scopes


def read(body, constants="float zero = {0}, float six = {6}", inputs="float[1,4,8,8] x", opset=18):
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => (float[n,c,h,w] y)
        <float[4,4,1,1] p = {{{",".join("1" * 16)}}}, {constants}> {{ {body} }}"""
    model = ir.from_onnx_text(text)
    scope = next(scopes(model))
    shapes = Shapes(model)
    values = {v.name: v for node in model.graph for v in node.outputs} | {v.name: v for v in model.graph.inputs}
    found = [b for node in model.graph if (b := between(node, scope, shapes, "portable")) is not None]
    return model, scope, shapes, values, found


def test_activations_that_rounding_includes():
    _, _, _, values, _ = read("""a = Conv(x, p) b = Relu(a) c = Conv(b, p) d = Clip(c, zero, six) e = Conv(d, p)
        f = Clip(e, six) g = Conv(f, p) h = Relu(g) i = Neg(g) j = Conv(h, p) k = Clip(j, , six) l = Add(k, i)
        m = Conv(l, p) y = Relu(m)""")
    ends = {name: activated(values[name]).name for name in "acegjm"}
    assert ends == {"a": "b", "c": "d", "e": "e", "g": "g", "j": "j", "m": "y"}


def test_clip_with_attributes():
    _, _, _, values, _ = read(
        "a = Conv(x, p) b = Clip<min = 0.0, max = 6.0>(a) c = Conv(b, p) y = Clip<min = -1.0>(c)", opset=10
    )
    assert activated(values["a"]).name == "b"
    assert activated(values["c"]).name == "c"


def test_layers():
    model, scope, shapes, _, _ = read("a = Conv(x, p) r = Relu(a) y = Neg(r)")
    conv, relu, _ = model.graph
    found = layer(conv, scope, shapes)
    assert (found.weight.name, found.channel_axis, found.bias, found.source.name, found.result.name) == (
        "p",
        0,
        None,
        "x",
        "r",
    )
    assert layer(relu, scope, shapes) is None


def test_nodes_between():
    _, _, _, _, found = read(
        """a = MaxPool<kernel_shape = [2, 2]>(x) b = Sigmoid(a) c = Mul(b, a) d = Relu(c) e = Exp(d)
        f = Transpose(e) s = Shape(x) t = Reshape(s, s) u = ReduceMean<axes = [2, 3]>(f) v = ReduceMean<axes = [3]>(u)
        w = AveragePool<kernel_shape = [1, 1], dilations = [2, 2]>(v) y = Softmax(w)""",
        opset=13,
    )
    assert [(b.node.op_type, [v.name for v in b.results], b.tied) for b in found] == [
        ("MaxPool", ["a"], True),
        ("Sigmoid", ["b"], False),
        ("Mul", ["d"], False),
        ("Transpose", ["f"], True),
        ("ReduceMean", ["u"], False),
    ]


def classes(values, found):
    ties, sets = Ties(found), {}
    for name, value in values.items():
        sets.setdefault(ties.of(value).name, set()).add(name)
    return sorted(sorted(names) for names in sets.values() if len(names) > 1)


def test_what_is_handed_on_shares_a_grid():
    _, _, _, values, found = (
        read("""a = Conv(x, p) b = MaxPool<kernel_shape = [1, 1]>(a) c = Transpose(b) d = Conv(c, p)
        e = Concat<axis = 1>(a, d) y = Neg(e)""")
    )
    assert classes(values, found) == [["a", "b", "c", "d", "e"]]


def test_parts_bounded_in_different_ways_do_not_share_a_grid():
    body = "a = Relu(x) b = {b} m = MaxPool<kernel_shape = [1, 1]>(b) c = Concat<axis = 1>(a, m) y = Neg(c)"
    for other, expected in (
        ("Relu(x)", [["a", "b", "c", "m"]]),
        ("Neg(x)", [["b", "m"]]),
        ("Clip(x, zero, six)", [["b", "m"]]),
    ):
        _, _, _, values, found = read(body.format(b=other))
        assert classes(values, found) == expected
    _, _, _, values, found = read("a = Neg(x) c = Concat<axis = 1>(a, x) r = Relu(c) y = Neg(r)")
    assert classes(values, found) == []


def chosen(body, integers):
    _, _, _, _, found = read(body)
    return [b.results[0].name for b in worthwhile(found, lambda value: value.name in integers)]


def test_only_nodes_on_a_way_from_integers_to_integers_are_worth_it():
    chain = "a = Sigmoid(x) b = Transpose(a) c = Mul(b, x) d = LeakyRelu(c) e = Exp(d) f = Sigmoid(e) y = Neg(f)"
    assert chosen(chain, {"x", "d"}) == ["a", "b", "c", "d"]
    assert chosen(chain, {"x", "b"}) == ["a", "b"]
    assert chosen(chain, {"x"}) == []
    assert chosen(chain, {"d"}) == []
    assert chosen(chain, {"e", "f"}) == ["f"]
    assert chosen(chain, {"x", "d", "f"}) == ["a", "b", "c", "d"]


def test_one_integer_input_is_enough():
    assert chosen("a = Exp(x) b = Exp(a) c = Add(a, b) y = Neg(c)", {"a", "c"}) == ["c"]


def test_multiples_are_told_from_other_products():
    _, _, _, _, found = read(
        """a = Mul(x, six) b = Mul(zero, a) c = Mul(b, less) d = Mul(c, wide) e = Mul(six, d) r = Relu(e) f = Mul(r, r)
        y = Conv(f, p)""",
        constants="float zero = {0}, float six = {6}, float[1] less = {-1}, float[1,1,1,1,1] wide = {2}",
    )
    assert [b.factor for b in found] == [6.0, None, None, None, None, None]


def test_repeats_are_whole_factors_rounded_down_or_to_nearest():
    def read_times(attributes, scales):
        constants = f"float[4] scales = {{{scales}}}"
        model, scope, shapes, _, _ = read(f"a = Resize<{attributes}>(x, , scales) y = Conv(a, p)", constants=constants)
        return repeated(next(iter(model.graph)), scope, shapes)

    floor = 'coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
    assert read_times(floor, "1, 1, 2, 3") == {2: 2, 3: 3}
    assert read_times('mode = "nearest"', "1, 1, 1, 2") == {3: 2}
    assert read_times(floor, "1, 1, 1, 1") == {}
    assert read_times(floor, "1, 1, 1.5, 2") == {}
    assert read_times(floor, "1, 1, 0.5, 2") == {}
    assert read_times('coordinate_transformation_mode = "asymmetric"', "1, 1, 2, 2") == {}
    assert read_times('mode = "linear"', "1, 1, 2, 2") == {}
