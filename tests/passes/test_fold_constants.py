import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import onnxopt
from onnxopt.graph import all_nodes

SPEC = "fold-constants"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def declare(text, **arrays):
    """Parse ONNX text and give it initializers."""
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


def initializers(model):
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}


def test_a_chain_of_constants_is_computed_in_one_sweep(rewritten):
    found = rewritten(
        f"""{HEAD}
        g (float[2,3] x) => (float[2,3] y) <int64[2] a = {{2, 3}}, int64[2] b = {{0, 4}}> {{
            c = Add(a, b)  d = Constant <value_int = 0>()  e = Gather(c, d)  f = Cast <to = 1> (e)  g = Sqrt(f)
            y = Mul(x, g)
        }}""",
        SPEC,
    )
    assert found.ops == {"Mul": 1}
    assert initializers(found.model).keys() == {"g"}
    assert initializers(found.model)["g"] == np.float32(np.sqrt(2))
    assert {e.summary for p in found.report.passes for e in p.applied} == {
        "folded Add -> int64[2]",
        "made Constant an initializer",
        "folded Gather -> int64[]",
        "folded Cast -> float[]",
        "folded Sqrt -> float[]",
    }


def test_what_numpy_has_no_kernel_for_is_computed_by_the_runtime(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2,3] x) => (float[2,3] y) <float[3] w = {{1, 2, 3}}> {{
            s = Softmax(w)  t = Erf(s)  y = Add(x, t)
        }}""",
        SPEC,
    )
    assert found.ops == {"Add": 1}


def test_sizes_are_constant_as_far_as_the_model_determines_them(rewritten):
    # Of the shape of x only the last size is known; the Slice takes that, the Gather the other.
    found = rewritten(
        f"""{HEAD} g (float[n,3] x) => (float[m,k] y)
        <int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] zero = {{0}}> {{
            s = Shape(x)  last = Slice(s, one, two)  first = Gather(s, zero)
            twice = Mul(last, two)  size = Concat <axis = 0> (first, twice)
            flat = Concat <axis = 1> (x, x)  y = Reshape(flat, size)
        }}""",
        SPEC,
    )
    assert found.ops == {"Shape": 1, "Gather": 1, "Concat": 2, "Reshape": 1}
    assert initializers(found.model)["twice"].tolist() == [6]


def test_shapes_of_constants(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[n] x) => (float[m] y) <float[3] w = {{1, 2, 3}}> {{
            s = Shape(w)  k = Size(w)  kk = Cast <to = 1> (k)  e = Expand(kk, s)  v = Add(w, e)
            y = Concat <axis = 0> (x, v)
        }}""",
        SPEC,
    )
    assert found.ops == {"Concat": 1}
    assert initializers(found.model)["v"].tolist() == [4, 5, 6]


def test_of_the_second_input_of_cast_like_only_the_type_matters(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[n] x) => (float[n] y) <int64 one = {{1}}> {{ c = CastLike(one, x)  y = Add(x, c) }}""",
        SPEC,
    )
    assert found.ops == {"Add": 1}
    assert initializers(found.model)["c"].dtype == np.float32


def test_an_unused_output_is_not_stored(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x) => (float[2] y) <float[4] w = {{1, 2, 3, 4}}> {{
            a, b = Split <axis = 0> (w)  y = Add(x, b)
        }}""",
        SPEC,
    )
    assert found.ops == {"Add": 1}
    assert initializers(found.model).keys() == {"b"}


def test_an_identity_of_a_constant_is_no_copy(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {{1, 2}}> {{
            v = Identity(w)  u = Neg(v)  y = Add(x, u)  z = Mul(x, w)
        }}""",
        SPEC,
    )
    assert found.ops == {"Add": 1, "Mul": 1}
    assert initializers(found.model).keys() == {"w", "u"}


# Where ------------------------------------------------------------------------------------------------------


def test_nested_graphs_use_constants_of_the_graphs_around_them(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) <float[2] w = {{1, 2}}> {{
            outer = Neg(w)
            y = If (c) <
                then_branch = t () => (float[2] a) {{ b = Constant <value = float[2] {{3, 4}}> ()  s = Sub(outer, b)
                    a = Add(x, s) }},
                else_branch = e () => (float[2] d) {{ d = Mul(x, outer) }}>
        }}""",
        SPEC,
    )
    assert found.ops == {"If": 1, "Add": 1, "Mul": 1}
    branch = found.nodes[0].attributes["then_branch"].as_graph()
    assert {n: v.const_value.numpy().tolist() for n, v in branch.initializers.items()} == {"s": [-4, -6]}


def test_in_functions_results_are_constant_nodes(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2] x) => (float[2] y) { y = my.F(x) }
        <domain: "my", opset_import: ["" : 17]>
        F (x) => (y) { a = Constant <value_float = 3.0> () b = Neg(a) c = Mul(b, a) y = Mul(x, c) }""",
        SPEC,
    )
    assert found.ops == {"F": 1, "Constant": 1, "Mul": 1}
    (function,) = found.model.functions.values()
    assert function[0].attributes["value"].as_tensor().numpy() == -9


def test_attributes_of_the_caller_are_not_known(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2,2] x) => (float[2,2] y) { y = my.F <a = 0> (x) }
        <domain: "my", opset_import: ["" : 17]>
        F <a> (x) => (y) { w = Constant <value = float[2,2] {1, 2, 3, 4}> () s = Softmax <axis: int = @a> (w) y = Add(x, s) }""",
        SPEC,
    )
    assert found.ops == {"F": 1, "Constant": 1, "Softmax": 1, "Add": 1}
    assert found.refusals == {"an attribute refers to the function's caller"}


def test_what_the_caller_can_override_is_not_constant(rewritten):
    proto = declare(
        f"{HEAD} g (float[2] x, float[2] w) => (float[2] y) {{ v = Neg(w)  y = Add(x, v) }}", w=np.ones(2, "f")
    )
    assert rewritten(proto, SPEC).edits == 0


def test_constants_of_strings_stay_nodes(rewritten):
    text = f"""{HEAD} g (int64[1] i) => (string[1] y) {{
        s = Constant <value_strings = ["a", "b"]> ()  y = Gather(s, i)
    }}"""
    assert rewritten(text, SPEC).edits == 0


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Neg(w)", "it computes a graph output, which must come from a node"),
        ("r = Bernoulli <seed = 1.0> (w)  y = Add(r, r)", "it draws random numbers"),
        ("a, b, c = DynamicQuantizeLinear(w)  y = Cast <to = 1> (a)", "folding would undo quantization"),
        (
            "s = SequenceConstruct(w)  i = Constant <value_int = 0> ()  y = SequenceAt(s, i)",
            "its result is not a tensor of numbers",
        ),
    ],
)
def test_refusals(body, reason):
    proto = declare(f"{HEAD.replace('17', '20')} g () => (float[2] y) {{ {body} }}", w=np.array([0.25, 0.5], "f"))
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    refused = {r for p in result.report.passes for r, _ in p.refusals}
    assert refused == {reason}
    onnx.checker.check_model(ir.to_proto(result.model))


def test_constants_that_are_graph_outputs_stay_nodes(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x) => (float y, float z, float[2] t) {{
            y = Constant <value_float = 1.0> ()  z = Identity(y)  t = Add(x, y)
        }}""",
        SPEC,
    )
    assert (found.edits, found.ops) == (0, {"Constant": 1, "Identity": 1, "Add": 1})


def test_operators_of_other_domains_are_refused(rewritten):
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { v = com.microsoft.Gelu(w)  y = Add(x, v) }"""
    found = rewritten(text, SPEC)
    assert (found.edits, found.refusals) == (0, {"it is not an operator of the standard domain"})


def test_nodes_with_bodies_are_refused(rewritten):
    text = f"""{HEAD} g (float[2] x) => (float[2] y) <bool c = {{1}}, float[2] w = {{1, 2}}> {{
        v = If (c) <then_branch = t () => (float[2] a) {{ a = Neg(w) }}, else_branch = e () => (float[2] b) {{ b = Abs(w) }}>
        y = Add(x, v)
    }}"""
    found = rewritten(text, SPEC)
    assert found.ops == {"If": 1, "Neg": 1, "Abs": 1, "Add": 1}
    assert "it carries nested graphs" in found.refusals


@pytest.mark.parametrize(
    ("divisor", "expected"),
    [("{0, 1}", {"Div": 1, "Cast": 1, "Add": 1}), ("{2, 1}", {"Add": 1})],
    ids=["zero", "valid"],
)
def test_undefined_arithmetic_is_left_alone(divisor, expected):
    proto = onnx.parser.parse_model(
        f"""{HEAD} g (float[2] x) => (float[2] y) <int64[2] a = {{1, 2}}, int64[2] b = {divisor}> {{
            c = Div(a, b)  d = Cast <to = 1> (c)  y = Add(x, d)
        }}"""
    )
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    assert {n.op_type: 1 for n in all_nodes(result.model)} == expected


# Size -------------------------------------------------------------------------------------------------------


def refusals(proto, spec=SPEC):
    result = onnxopt.optimize(proto, passes=spec, verify=False, measure=False)
    return result.model, {r for p in result.report.passes for r, _ in p.refusals}


BIGGER = "the result is bigger than what it replaces"
TIED = "its input is used elsewhere too, so the result would be stored besides it"


@pytest.mark.parametrize(
    "body",
    [
        "s = Constant <value_ints = [1000, 8]> ()  e = ConstantOfShape(s)",
        "s = Constant <value_ints = [1000, 8]> ()  e = Expand(row, s)",
        "s = Constant <value_ints = [1000, 1]> ()  e = Tile(row, s)",
    ],
    ids=["ConstantOfShape", "Expand", "Tile"],
)
def test_results_that_would_bloat_the_model_are_not_stored(body):
    proto = declare(
        f"{HEAD} g (float[1000,8] x) => (float[1000,8] y) {{ {body}  y = Add(x, e) }}", row=np.ones((1, 8), "f")
    )
    model, refused = refusals(proto)
    assert (model.graph.num_nodes(), refused) == (2, {BIGGER})
    small = declare(
        f"{HEAD} g (float[8,8] x) => (float[8,8] y) {{ {body.replace('1000', '8')}  y = Add(x, e) }}",
        row=np.ones((1, 8), "f"),
    )
    assert refusals(small)[0].graph.num_nodes() == 1


def test_int8_weights_are_not_expanded_to_float():
    w = np.arange(-128, 128, dtype=np.int8).reshape(16, 16).repeat(16, axis=0)
    proto = declare(f"{HEAD} g (float[n,256] x) => (float[n,16] y) {{ f = Cast <to = 1> (w)  y = MatMul(x, f) }}", w=w)
    assert refusals(proto)[1] == {BIGGER}


def test_a_weight_used_only_here_is_transposed_and_a_tied_one_is_not():
    w = np.random.default_rng(0).standard_normal((64, 32)).astype("f")
    text = f"{HEAD} g (float[n,32] x, float[n,64] z) => (float[n,64] y, float[n,32] t) {{"
    alone = declare(text + " v = Transpose(w)  y = MatMul(x, v)  t = MatMul(z, u) }", w=w, u=w)
    model, refused = refusals(alone)
    assert (initializers(model).keys(), refused) == ({"u", "v"}, set())
    tied = declare(text + " v = Transpose(w)  y = MatMul(x, v)  t = MatMul(z, w) }", w=w)
    model, refused = refusals(tied)
    assert (initializers(model).keys(), refused) == ({"w"}, {TIED})


def test_a_weight_is_folded_once_its_other_use_is_gone(rewritten):
    # When the sweep comes to the Transpose, the Shape still uses the weight.
    w = np.random.default_rng(0).standard_normal((64, 32)).astype("f")
    proto = declare(
        f"""{HEAD} g (float[n,32] x) => (float[n,64] y) {{
            v = Transpose(w)  u = Neg(v)  a = MatMul(x, u)  s = Shape(w)  z = Cast <to = 1> (s)
            m = ReduceMax <keepdims = 0> (z)  y = Add(a, m)
        }}""",
        w=w,
    )
    found = rewritten(proto, SPEC)
    assert found.ops == {"MatMul": 1, "Add": 1}
    assert initializers(found.model).keys() == {"u", "m"}
    assert not found.refusals


def test_max_bytes_bounds_what_is_computed():
    w = np.zeros((64, 64), "f")
    proto = declare(f"{HEAD} g (float[n,64] x) => (float[n,64] y) {{ v = Transpose(w)  y = MatMul(x, v) }}", w=w)
    assert refusals(proto, f"{SPEC}{{max_bytes=10000}}")[1] == {"the result is larger than max_bytes"}
    assert refusals(proto)[1] == set()


def test_max_growth_is_relative_to_the_constants_of_the_model():
    body = "s = Constant <value_ints = [1000]> ()  e = Expand(one, s)  a = Add(x, e)  y = Add(a, w)"
    proto = declare(
        f"{HEAD} g (float[1000] x) => (float[100,1000] y) {{ {body} }}",
        one=np.ones(1, "f"),
        w=np.zeros((100, 1000), "f"),
    )
    assert refusals(proto)[1] == {BIGGER}
    assert refusals(proto, f"{SPEC}{{max_growth=0.02}}")[1] == set()
