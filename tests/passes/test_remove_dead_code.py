import numpy as np
import onnx
from onnx import numpy_helper

SPEC = "remove-dead-code"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def test_nodes_and_what_fed_only_them_go(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x) => (float[2] y) <float[2] w = {{1, 2}}, float[2] v = {{1, 2}}, float[2] u = {{0, 0}}> {{
            a = Add(x, w)  b = Mul(a, w)  c = Neg(b)  y = Add(x, v)
        }}""",
        SPEC,
    )
    assert found.ops == {"Add": 1}
    assert list(found.model.graph.initializers) == ["v"]
    assert [e.summary for p in found.report.passes for e in p.applied] == [
        "removed unused Neg",
        "removed unused Mul",
        "removed unused Add",
        "removed an initializer that nothing uses",
        "removed an initializer that nothing uses",
    ]


def test_random_operators_are_dead_like_others(rewritten):
    text = f"{HEAD} g (float[2] x) => (float[2] y) {{ r = RandomNormalLike(x)  y = Neg(x) }}"
    assert rewritten(text, SPEC).ops == {"Neg": 1}


def test_inputs_stay_and_the_defaults_they_have(rewritten):
    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[2] x, float[2] unused, float[2] w) => (float[2] y) {{ y = Neg(x) }}"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(2, "f"), "w"))
    found = rewritten(proto, SPEC)
    assert found.edits == 0
    assert [v.name for v in found.model.graph.inputs] == ["x", "unused", "w"]
    assert list(found.model.graph.initializers) == ["w"]


def test_unused_outputs_of_used_nodes_stay(rewritten):
    text = f"{HEAD} g (float[4] x) => (float[a] y) {{ y, z = Split <axis = 0> (x) }}"
    found = rewritten(text, SPEC)
    assert found.edits == 0
    assert len(found.nodes[0].outputs) == 2


def test_nested_graphs(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) <float[2] w = {{1, 2}}> {{
            only_for_a_dead_node = Exp(x)
            for_a_live_one = Abs(x)
            y = If (c) <
                then_branch = t () => (float[2] a) <float[2] u = {{1, 2}}>
                    {{ d = Add(only_for_a_dead_node, u)  e = Mul(d, w)  a = Neg(for_a_live_one) }},
                else_branch = e () => (float[2] b) {{ b = Neg(x) }}>
        }}""",
        SPEC,
    )
    assert found.ops == {"Abs": 1, "If": 1, "Neg": 2}
    assert not found.model.graph.initializers
    assert not found.nodes[1].attributes["then_branch"].as_graph().initializers


def test_a_dead_node_takes_the_captures_of_its_bodies_along(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) <float[2] w = {{1, 2}}> {{
            k = Add(x, w)
            z = If (c) <
                then_branch = t () => (float[2] a) {{ a = Neg(k) }},
                else_branch = e () => (float[2] b) {{ b = If (c) <
                    then_branch = t2 () => (float[2] p) {{ p = Mul(k, w) }},
                    else_branch = e2 () => (float[2] q) {{ q = Abs(k) }}> }}>
            y = Neg(x)
        }}""",
        SPEC,
    )
    assert found.ops == {"Neg": 1}
    assert not found.model.graph.initializers


def test_functions(rewritten):
    found = rewritten(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2] x, bool c) => (float[2] y) {
            dead = my.OnlyDead(x)
            y = If (c) <
                then_branch = t () => (float[2] a) { a = my.Used(x) },
                else_branch = e () => (float[2] b) { b = Neg(x) }>
        }
        <domain: "my", opset_import: ["" : 17]> OnlyDead (x) => (y) { y = Exp(x) }
        <domain: "my", opset_import: ["" : 17, "my" : 1]> Used (x) => (y) { d = my.DeadInUsed(x) y = my.Inner(x) }
        <domain: "my", opset_import: ["" : 17]> DeadInUsed (x) => (y) { y = Sin(x) }
        <domain: "my", opset_import: ["" : 17]> Inner (x) => (y) { d = Cos(x) y = Abs(x) }
        <domain: "my", opset_import: ["" : 17]> NeverCalled (x) => (y) { y = Tan(x) }""",
        SPEC,
    )
    assert sorted(f.name for f in found.model.functions.values()) == ["Inner", "Used"]
    assert found.ops == {"If": 1, "Used": 1, "Neg": 1, "Inner": 1, "Abs": 1}


def test_a_site_is_named_by_the_first_output_that_has_a_name(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[3,1,2] x) => (float[3,1,2] y)
        <float[1,4,2] w = {{1,1,1,1,1,1,1,1}}, float[1,4,1] r = {{1,1,1,1}}> {{
            "", h = LSTM <hidden_size = 1> (x, w, r)  y = Neg(x)
        }}""".replace('"", h', ", h"),
        SPEC,
    )
    assert found.report.passes[0].applied[0].site.output == "h"
