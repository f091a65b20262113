import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

SPEC = "merge-common-subexpressions"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def ends_in_sum(body, *values, head=HEAD, inputs="float[2] x"):
    return f"{head} g ({inputs}) => (float[2] y) {{ {body}  y = Sum({', '.join(values)}) }}"


def test_whole_chains_are_merged_in_one_sweep(rewritten):
    found = rewritten(ends_in_sum("a = Neg(x) b = Exp(a) c = Neg(x) d = Exp(c) e = Neg(b) f = Neg(d)", "e", "f"), SPEC)
    assert found.ops == {"Neg": 2, "Exp": 1, "Sum": 1}
    assert [(e.site.output, e.summary) for e in found.report.passes[0].applied] == [
        ("c", "merged Neg with a"),
        ("d", "merged Exp with b"),
        ("f", "merged Neg with e"),
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Add(x, k)", "Add(k, x)"),
        ("Softmax <axis = 0> (x)", "Softmax <axis = 0> (x)"),
        ("Constant <value = float[2] {1, 2}> ()", "Constant <value = float[2] {1, 2}> ()"),
        ("Clip(x, k0)", "Clip(x, k0, )"),
    ],
)
def test_what_is_equal(rewritten, first, second):
    body = f"k = Abs(x) z = Constant <value_int = 0> () k0 = Gather(k, z) a = {first} b = {second}"
    assert rewritten(ends_in_sum(body, "a", "b"), SPEC).edits == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Sub(x, k)", "Sub(k, x)"),
        ("LeakyRelu <alpha = 0.5> (x)", "LeakyRelu <alpha = 0.25> (x)"),
        ("LeakyRelu <alpha = 0.01> (x)", "LeakyRelu(x)"),
        ("Constant <value_float = 0.0> ()", "Constant <value_float = -0.0> ()"),
        ("Constant <value = float[2] {1, 2}> ()", "Constant <value = float[2] {1, 3}> ()"),
        ("RandomNormalLike <seed = 1.0> (x)", "RandomNormalLike <seed = 1.0> (x)"),
        ("Dropout(x, half, given)", "Dropout(x, half, given)"),
    ],
)
def test_what_is_not(rewritten, first, second):
    body = f"k = Abs(x) half = Constant <value_float = 0.5> () a = {first} b = {second}"
    text = ends_in_sum(body, "a", "b", inputs="float[2] x, bool given")
    assert rewritten(text, SPEC, verify="Random" not in first and "Dropout" not in first).edits == 0


def test_constants_of_the_same_number_but_other_types_differ(rewritten):
    node = [
        helper.make_node("Constant", [], [f"c{i}"], value=numpy_helper.from_array(np.zeros(2, dtype)))
        for i, dtype in enumerate(["f", np.int32])
    ]
    node += [helper.make_node("CastLike", ["c1", "x"], ["d"]), helper.make_node("Sum", ["x", "c0", "d"], ["y"])]
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(node, "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    assert rewritten(model, SPEC).edits == 0


def test_optional_outputs_must_be_there(rewritten):
    # The first computes both outputs, the second only the last state. (ONNX Runtime's own optimizations merge the
    # two and then cannot load the model, so there is nothing to verify with.)
    text = f"""{HEAD} g (float[3,1,2] x) => (float[3,1,1,1] y)
    <float[1,3,2] w = {{1,2,3,4,5,6}}, float[1,3,1] r = {{1,2,3}}> {{
        v, h = GRU <hidden_size = 1> (x, w, r)  , j = GRU <hidden_size = 1> (x, w, r)  y = Sum(v, h, j)
    }}"""
    assert rewritten(text, SPEC, verify=False).edits == 0


def test_graph_outputs_keep_their_names(rewritten):
    found = rewritten(f"{HEAD} g (float[2] x) => (float[2] y, float[2] z) {{ a = Neg(x) y = Neg(x) z = Abs(a) }}", SPEC)
    assert found.ops == {"Neg": 1, "Abs": 1}
    assert [v.name for v in found.model.graph.outputs] == ["y", "z"]
    both = rewritten(f"{HEAD} g (float[2] x) => (float[2] y, float[2] z) {{ y = Neg(x) z = Neg(x) }}", SPEC)
    assert (both.edits, both.refusals) == (0, {"both are graph outputs, whose names must stay"})


def test_nested_graphs_reuse_what_was_computed_before_them(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) {{
            before = Neg(x)
            z = If (c) <
                then_branch = t () => (float[2] a) {{ p = Neg(x)  q = Exp(x)  a = Add(p, q) }},
                else_branch = e () => (float[2] b) {{ r = Exp(x)  b = Neg(r) }}>
            after = Exp(x)
            y = Sum(z, before, after)
        }}""",
        SPEC,
    )
    # Neg is reused in the branch; Exp comes after it, or is in the other branch.
    assert found.ops == {"Neg": 2, "Exp": 3, "Add": 1, "If": 1, "Sum": 1}
    assert [str(e.site) for e in found.report.passes[0].applied] == [f"{SPEC} at p (in z.then_branch)"]


def test_an_output_of_a_branch_is_not_taken_from_outside(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) {{
            before = Neg(x)
            z = If (c) <
                then_branch = t () => (float[2] a) {{ a = Neg(x) }}, else_branch = e () => (float[2] b) {{ b = Exp(x) }}>
            y = Add(z, before)
        }}""",
        SPEC,
    )
    assert (found.edits, found.refusals) == (0, {"the graph output would come from an outer graph"})


def test_functions(rewritten):
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2] x) => (float[2] y) {
            a = my.Twice <b = 1> (x) b = my.Twice <b = 1> (x) c = my.Noise(x) d = my.Noise(x) y = Sum(a, b, c, d)
        }
        <domain: "my", opset_import: ["" : 17]>
        Twice <b> (x) => (y) { p = Cast <to: int = @b> (x) q = Cast <to: int = @b> (x) y = Add(p, q) }
        <domain: "my", opset_import: ["" : 17, "my" : 1]> Noise (x) => (y) { y = my.Noisier(x) }
        <domain: "my", opset_import: ["" : 17]> Noisier (x) => (y) { y = RandomNormalLike(x) }"""
    found = rewritten(text, SPEC, verify=False)
    assert found.ops == {
        "Twice": 1,
        "Noise": 2,
        "Sum": 1,
        "Cast": 1,
        "Add": 1,
        "Noisier": 1,
        "RandomNormalLike": 1,
    }


def test_attributes_of_the_caller_are_told_apart(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2,2] x) => (float[2,2] y) { y = my.F <a = 0, b = 1> (x) }
        <domain: "my", opset_import: ["" : 17]>
        F <a, b> (x) => (y) { p = Softmax <axis: int = @a> (x) q = Softmax <axis: int = @b> (x) y = Add(p, q) }""",
        SPEC,
    )
    assert found.edits == 0


def test_unknown_operators_are_not_taken_to_repeat_themselves(rewritten):
    text = ends_in_sum("a = lab.Sample(x) b = lab.Sample(x)", "a", "b", head=HEAD.replace("]", ', "lab" : 1]'))
    found = rewritten(text, SPEC, verify=False)
    assert found.edits == 0
    assert found.refusals == {"it is not known whether the operator returns the same for the same inputs"}
