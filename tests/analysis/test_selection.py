from __future__ import annotations

import onnx
import onnx.parser

from onnxopt.analysis.selection import Selection
from onnxopt.model import load

TEXT = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,4] x, bool c) => (float[n,4] y) {
        [first] a = MatMul(x, w)  [second] b = MatMul(a, w)  [third] d = MatMul(b, u)
        [choice] e = If (c) <
            then_branch = t () => (float[n,4] p) { [inner] p = MatMul(d, head) },
            else_branch = f () => (float[n,4] q) { q = Identity(d) }>
        y = Relu(e)
    }
"""


def model() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(TEXT)
    for name in ("w", "u", "head"):
        proto.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [4, 4], [1.0] * 16))
    return proto


def spared(only: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
    loaded = load(model())
    return {name for _, name in Selection(only, exclude).spared(loaded, loaded)}


def test_nothing_said_nothing_spared() -> None:
    assert spared() == set()


def test_nodes_are_meant_by_name_output_or_weight() -> None:
    assert spared(exclude=("third",)) == {"d", "u"}
    assert spared(exclude=("d",)) == {"d", "u"}
    assert spared(exclude=("u",)) == {"d", "u"}


def test_a_weight_that_an_excluded_node_shares_is_left_alone() -> None:
    assert spared(exclude=("second",)) == {"b", "w"}


def test_a_weight_that_one_of_the_wanted_nodes_uses_is_wanted() -> None:
    assert {"b", "d", "u", "e", "y", "head"} <= spared(only=("first",))
    assert not {"a", "w"} & spared(only=("first",))


def test_exclude_takes_away_from_only() -> None:
    assert {"a", "b", "w"} & spared(only=("first", "third"), exclude=("w",)) == {"a", "b", "w"}


def test_nodes_of_nested_graphs_have_their_path() -> None:
    loaded = load(model())
    found = Selection((), ("inn*",)).spared(loaded, loaded)
    assert found.keys() == {("choice.then_branch", "p"), ("", "head")}
    assert set(found.values()) == {"it was to be left alone (exclude)"}


def test_a_name_is_meant_by_itself_even_when_it_looks_like_a_pattern() -> None:
    proto = model()
    proto.graph.node[0].name = "layer[0]"
    loaded = load(proto)
    assert Selection((), ("layer[0]",)).unmatched([loaded]) is None


def test_unmatched_patterns_get_near_names() -> None:
    pattern, near = Selection(("first",), ("secnd*",)).unmatched([load(model())]) or ("", [])
    assert pattern == "secnd*"
    assert near[0] == "second"


def test_a_layer_that_was_fused_is_found_where_it_went() -> None:
    head = '<ir_version: 10, opset_import: ["" : 18]> g (float[n,1,4,4] x) => (float[n,2,4,4] y)'
    constants = "<float[2,1,1,1] w = {1, 2}, float[2] s = {1, 2}, float[2] m = {3, 4}>"
    original, fused = (
        load(onnx.parser.parse_model(f"{head} {constants} {{ {nodes} y = Relu(b) }}"))
        for nodes in (
            "[conv] c = Conv(x, w)  [scale] i = Identity(c)  b = BatchNormalization(i, s, m, m, s)",
            "b = Conv(x, w)",
        )
    )
    for pattern in ("c", "conv"):
        assert Selection((), (pattern,)).spared(original, fused).keys() == {("", "b"), ("", "w")}
    assert not Selection((), ("scale",)).spared(original, fused), "what is no layer has no heir"
