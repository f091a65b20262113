"""Chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten."""

import itertools
import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt
from onnxopt.graph import attribute
from onnxopt.runtime import RunOptions, open_session

SPEC = "settle-shapes,merge-layout,remove-dead-code"
HEAD = '<ir_version: 9, opset_import: ["" : 18]>'


def test_keys_flattened_and_transposed_are_one_transpose(rewritten):
    """The K of torch's scaled dot product attention: Transpose, Reshape, Transpose, Reshape."""
    done = rewritten(
        f"""{HEAD} g (float[batch, seq, 12, 32] x) => (float[batch, 12, 32, seq] y)
        <int64[1] rest = {{-1}}, int64[1] d = {{32}}, int64[1] h = {{12}}> {{
            k = Transpose <perm = [0, 2, 1, 3]> (x)
            b = Shape <start = 0, end = 1> (k)  s = Shape <start = 2, end = 3> (k)
            t = Concat <axis = 0> (rest, s, d)  f = Reshape(k, t)  r = Transpose <perm = [0, 2, 1]> (f)
            u = Concat <axis = 0> (b, h, d, s)  y = Reshape(r, u)
        }}""",
        SPEC,
    )
    assert done.ops == {"Transpose": 1}
    assert list(attribute(done.nodes[0], "perm")) == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("chain", "left"),
    [
        ("a = Transpose <perm = [1, 0, 2]> (x) y = Transpose <perm = [1, 0, 2]> (a)", {}),
        ("a = Transpose <perm = [1, 2, 0]> (x) y = Transpose <perm = [1, 2, 0]> (a)", {"Transpose": 1}),
        ("a = Reshape(x, t) y = Reshape(a, same)", {}),
        ("a = Unsqueeze(x, zero) y = Squeeze(a, zero)", {}),
        ("a = Flatten(x) y = Reshape(a, same)", {}),
        ("a = Unsqueeze(x, zero) b = Transpose <perm = [0, 2, 1, 3]> (a) y = Squeeze(b, zero)", {"Transpose": 1}),
    ],
)
def test_chains_become_the_fewest_nodes(rewritten, chain, left):
    done = rewritten(
        f"""{HEAD} g (float[2, 3, 4] v) => (float[a, b, c] w)
        <int64[2] t = {{6, 4}}, int64[3] same = {{2, 3, 4}}, int64[1] zero = {{0}}> {{ x = Exp(v) {chain} w = Neg(y) }}""",
        "merge-layout,remove-dead-code",
    )
    assert {op: n for op, n in done.ops.items() if op not in ("Exp", "Neg")} == left


def test_a_value_that_is_used_elsewhere_is_not_looked_through(rewritten):
    done = rewritten(
        f"""{HEAD} g (float[2, 3] x) => (float[3, 2] a, float[2, 3] z) {{
            e = Exp(x)  t = Transpose(e)  a = Neg(t)  y = Transpose(t)  z = Neg(y)
        }}""",
        "merge-layout,remove-dead-code",
    )
    assert done.ops["Transpose"] == 2


def test_the_name_of_an_output_is_not_lost(rewritten):
    done = rewritten(
        f"{HEAD} g (float[2, 3] x) => (float[2, 3] y) {{ a = Transpose(x)  y = Transpose(a) }}",
        "merge-layout,remove-dead-code",
    )
    assert done.ops["Transpose"] == 2
    assert done.refusals == {"a graph input or initializer cannot take the name of a graph output"}


def test_old_opsets_get_axes_as_attributes(rewritten):
    done = rewritten(
        """<ir_version: 7, opset_import: ["" : 11]> g (float[2, 3] x) => (float[1, 2, 3] y) <int64[1] n = {6}, int64[3] t = {1, 2, 3}> {
            e = Exp(x)  a = Reshape(e, n)  y = Reshape(a, t)
        }""",
        "merge-layout,remove-dead-code",
    )
    assert done.ops == {"Exp": 1, "Unsqueeze": 1}


def test_functions_and_branches_are_merged_too(rewritten):
    done = rewritten(
        f"""{HEAD} g (float[2, 3] x, bool c) => (float[p, q] y) {{
            y = If (c) <
                then_branch = t () => (float[p, q] a) {{ e = Exp(x)  u = Transpose(e)  v = Transpose(u)  a = Neg(v) }},
                else_branch = f () => (float[p, q] b) {{ b = Neg(x) }}>
        }}""",
        "merge-layout",
    )
    assert "Transpose" not in done.ops


PRIMES = {1: [], 2: [2], 3: [3], 4: [2, 2], 6: [2, 3]}


@st.composite
def chains(draw):
    """A shape and a few layout nodes that fit one another, and whether they only move whole prime factors."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    shape, nodes, constants = list(sizes), [], []
    axes, whole = [PRIMES[size] for size in sizes], True
    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["Transpose", "Reshape", "Unsqueeze"]))
        before, after = f"v{i}", f"v{i + 1}"
        if kind == "Transpose":
            perm = draw(st.permutations(range(len(shape))))
            nodes.append(onnx.helper.make_node("Transpose", [before], [after], perm=perm))
            shape, axes = [shape[p] for p in perm], [axes[p] for p in perm]
            continue
        if kind == "Unsqueeze":
            axis = draw(st.integers(0, len(shape)))
            values, shape, axes = [axis], [*shape[:axis], 1, *shape[axis:]], [*axes[:axis], [], *axes[axis:]]
        else:
            shape = draw(regrouped(shape))
            values, axes = shape, cut([f for axis in axes for f in axis], shape)
            whole &= all(math.prod(axis) == size for axis, size in zip(axes, shape, strict=True))
        constants.append(onnx.numpy_helper.from_array(np.array(values, np.int64), f"c{i}"))
        nodes.append(onnx.helper.make_node(kind, [before, f"c{i}"], [after]))
    return sizes, nodes, constants, shape, whole


def cut(factors, shape):
    """Divide factors, in order, into axes of these sizes; an axis whose end lies within a factor gets too many."""
    axes, rest = [], list(factors)
    for size in shape:
        axes.append([])
        while math.prod(axes[-1]) < size and rest:
            axes[-1].append(rest.pop(0))
    return axes


MISALIGNED = f"""{HEAD} g (float[1, 1, 6, 4] x) => (float[1, 1, 2, 6, 2] y)
        <int64[5] s = {{1, 1, 2, 6, 2}}, int64[5] t = {{1, 1, 2, 2, 6}}> {{
    e = Exp(x) a = Transpose<perm = [0, 1, 2, 3]>(e) b = Reshape(a, s) c = Reshape(b, t)
    d = Transpose<perm = [0, 1, 2, 4, 3]>(c) y = Neg(d)
}}"""


def test_reshapes_that_cut_across_factors_are_one_reshape(rewritten):
    """24 numbers as 6 x 4 and as 2 x 2 x 6 have no factors in common from which both could be made."""
    done = rewritten(MISALIGNED, "merge-layout")
    assert [node.op_type for node in done.nodes] == ["Exp", "Reshape", "Transpose", "Neg"]


def test_a_reshape_to_the_same_shape_keeps_nothing_apart(rewritten):
    done = rewritten(
        f"""{HEAD} g (float[6, 4] x) => (float[2, 6, 2] y) <int64[2] s = {{4, 6}}, int64[3] t = {{2, 2, 6}}> {{
            e = Exp(x) a = Transpose<perm = [1, 0]>(e) b = Reshape(a, s) c = Transpose<perm = [1, 0]>(b)
            d = Reshape(c, t) f = Transpose<perm = [0, 2, 1]>(d) y = Neg(f)
        }}""",
        "merge-layout",
    )
    assert [node.op_type for node in done.nodes] == ["Exp", "Reshape", "Transpose", "Neg"]


@st.composite
def regrouped(draw, shape):
    """Another shape of as many elements: factors joined or split at random."""
    factors = [f for size in shape for f in {4: [2, 2], 6: [2, 3]}.get(size, [size])]
    groups = []
    for factor in factors:
        if groups and draw(st.booleans()):
            groups[-1] *= factor
        else:
            groups.append(factor)
    return groups


@settings(max_examples=150, deadline=None)
@given(chains(), st.booleans())
def test_any_chain_computes_the_same_with_no_more_nodes(chain, dynamic):
    sizes, nodes, constants, shape, whole = chain
    declared = [f"d{i}" if dynamic and i == 0 else size for i, size in enumerate(sizes)]
    first = onnx.helper.make_node("Exp", ["x"], ["v0"])
    last = onnx.helper.make_node("Neg", [f"v{len(nodes)}"], ["y"])
    graph = onnx.helper.make_graph(
        [first, *nodes, last],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, declared)],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        constants,
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    result = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False).model
    assert len(result.graph) <= len(nodes) + 2
    if not dynamic:  # a Reshape of an unknown size to numbers says nothing about its factors
        turns = [node.op_type == "Transpose" for node in list(result.graph)[1:-1]]
        assert all(one != next_ for one, next_ in itertools.pairwise(turns)), "neighbours of a kind are made one"
        if whole:  # a Reshape that cuts across a factor can lie between two Transposes that nothing replaces
            assert len(turns) <= 3, "never more than Reshape, Transpose, Reshape"
    feed = {"x": np.random.default_rng(0).standard_normal(sizes).astype(np.float32)}
    outputs = []
    for model in (onnxopt.load(proto), result):
        with open_session(model, RunOptions(), optimized=False) as session:
            outputs.append(session.run(feed)["y"])
    assert list(outputs[1].shape) == shape
    np.testing.assert_array_equal(*outputs)
    assert isinstance(result, ir.Model)
