import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import onnxopt

SPEC = "deduplicate-initializers"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def declare(text, **arrays):
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


def names(model):
    return list(model.graph.initializers)


BIG = np.random.default_rng(0).standard_normal((100, 100)).astype("f")
OTHER = BIG.copy()
OTHER[50, 3] += 1


def test_equal_ones_are_stored_once(rewritten):
    proto = declare(
        f"{HEAD} g (float[n,100] x) => (float[n,100] y) {{ p = MatMul(x, a) q = MatMul(p, b) y = MatMul(q, c) }}",
        a=BIG,
        b=OTHER,
        c=BIG,
    )
    found = rewritten(proto, SPEC)
    assert names(found.model) == ["a", "b"]
    assert [(e.site.output, e.summary) for e in found.report.passes[0].applied] == [
        ("c", "merged with a, saving 40,000 bytes")
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.float32([0.0, 1]), np.float32([-0.0, 1])),
        (np.uint32([0x7FC00000, 0]).view("f"), np.uint32([0x7FC00001, 0]).view("f")),
        (np.float32([1, 2]), np.float32([[1, 2]])),
    ],
    ids=["sign of zero", "NaN payload", "shape"],
)
def test_equal_means_equal_to_the_bit(first, second):
    proto = declare(f"{HEAD} g (float[2] x) => (float[n,m] y) {{ p = Add(x, a) y = Add(p, b) }}", a=first, b=second)
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    assert names(result.model) == ["a", "b"]


def test_types_count(rewritten):
    proto = declare(
        f"{HEAD} g (float[2] x) => (float[2] y) {{ p = Cast <to = 1> (a) q = Add(x, b) y = Add(p, q) }}",
        a=np.zeros(2, np.int32),
        b=np.zeros(2, "f"),
    )
    assert rewritten(proto, SPEC).edits == 0


def test_what_the_caller_can_override_is_neither_merged_nor_kept_for_others(rewritten):
    proto = declare(
        f"{HEAD} g (float[2] x, float[2] a) => (float[2] y) {{ p = Add(x, a) q = Add(p, b) y = Add(q, c) }}",
        a=np.ones(2, "f"),
        b=np.ones(2, "f"),
        c=np.ones(2, "f"),
    )
    found = rewritten(proto, SPEC)
    assert names(found.model) == ["a", "b"]
    assert [v.name for n in found.nodes for v in n.inputs] == ["x", "a", "p", "b", "q", "b"]


def test_a_graph_output_keeps_its_name():
    proto = declare(
        f"{HEAD} g (float[2] x) => (float[2] y, float[2] b) {{ y = Sum(x, a, b) }}",
        a=np.ones(2, "f"),
        b=np.ones(2, "f"),
    )
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False)
    assert names(result.model) == ["a", "b"]
    assert result.report.passes[0].refusals == (("it is a graph output, whose name must stay", 1),)


def test_nested_graphs_share_with_the_graphs_around_them_but_not_with_each_other(rewritten):
    found = rewritten(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) <float[2] w = {{1, 2}}> {{
            z = Add(x, w)
            y = If (c) <
                then_branch = t () => (float[2] a) <float[2] u = {{1, 2}}, float[2] p = {{3, 4}}, float[2] q = {{3, 4}}>
                    {{ a = Sum(z, u, p, q) }},
                else_branch = e () => (float[2] b) <float[2] v = {{1, 2}}, float[2] r = {{3, 4}}>
                    {{ b = Sum(z, v, r) }}>
        }}""",
        SPEC,
    )
    branches = [found.nodes[1].attributes[f"{b}_branch"].as_graph() for b in ("then", "else")]
    assert names(found.model) == ["w"]
    assert [list(b.initializers) for b in branches] == [["p"], ["r"]]
    assert [[v.name for v in b[0].inputs] for b in branches] == [["z", "w", "p", "p"], ["z", "w", "r"]]


def test_external_weights_are_compared_without_mapping_them(tmp_path):
    proto = declare(
        f"{HEAD} g (float[n,1000] x) => (float[n,1000] y) {{ p = MatMul(x, a) y = MatMul(p, b) }}",
        a=np.eye(1000, dtype="f"),
        b=np.eye(1000, dtype="f"),
    )
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.data")
    result = onnxopt.optimize(path, passes=SPEC, verify=False, measure=False)
    assert names(result.model) == ["a"]
    assert isinstance(result.model.graph.initializers["a"].const_value, ir.ExternalTensor)
