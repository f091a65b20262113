"""Shape arithmetic with a known result."""

import numpy as np
import pytest

from onnxopt.graph import constant_ints

SPEC = "settle-shapes,remove-dead-code"
HEAD = '<ir_version: 9, opset_import: ["" : 18]>'


def test_heads_are_split_by_a_constant(rewritten):
    done = rewritten(
        f"""{HEAD} g (float[batch, seq, 384] x) => (float[b, s, h, d] y)
        <int64[1] heads = {{12}}, int64[1] rest = {{-1}}> {{
            b = Shape <start = 0, end = 1> (x)  s = Shape <start = 1, end = 2> (x)
            t = Concat <axis = 0> (b, s, heads, rest)  y = Reshape(x, t)
        }}""",
        SPEC,
    )
    assert done.ops == {"Reshape": 1}
    assert constant_ints(done.nodes[0].inputs[1]) == (0, 0, 12, 32)


def test_what_is_known_entirely_is_a_constant(rewritten):
    done = rewritten(
        f"""{HEAD} g (float[batch, 6] x) => (float[batch, 6] y) <int64 one = {{1}}, int64 half = {{2}}> {{
            s = Shape(x)  n = Gather(s, one)  m = Div(n, half)  f = Cast <to = 1> (m)  y = Add(x, f)
        }}""",
        SPEC,
    )
    assert done.ops == {"Cast": 1, "Add": 1}


def test_equal_sizes_are_computed_once(rewritten):
    done = rewritten(
        f"""{HEAD} g (float[n, m] x) => (float[p] y, float[q] z) <float[1] v = {{1}}> {{
            e = Exp(x)  s = Shape(x)  t = Shape(e)  a = Expand(v, s)  b = Expand(v, t)
            y = Add(a, e)  z = Add(b, x)
        }}""",
        SPEC,
    )
    assert done.ops["Shape"] == 1


def test_different_axes_stay_apart(rewritten):
    done = rewritten(
        f"""{HEAD} g (float[n, m] x) => (int64[1] a, int64[1] b, float[1, 2] y) <int64[2] two = {{1, 2}}> {{
            i = Shape <start = 0, end = 1> (x)  j = Shape <start = 1, end = 2> (x)
            a = Identity(i)  b = Identity(j)  k = Add(i, j)  l = Cast <to = 1> (k)  y = Expand(l, two)
        }}""",
        SPEC,
    )
    assert done.ops["Shape"] == 2
    assert done.edits == 0


def test_two_sizes_that_move_cannot_be_written_as_constants(rewritten):
    source = f"""{HEAD} g (float[a, b, 4] x) => (float[p, q, 4] y) {{
        i = Shape <start = 0, end = 1> (x)  j = Shape <start = 1, end = 2> (x)  k = Shape <start = 2> (x)
        t = Concat <axis = 0> (j, i, k)  y = Reshape(x, t)
    }}"""
    done = rewritten(source, SPEC)
    assert done.ops["Concat"] == 1


def test_a_size_that_may_be_zero_is_not_inferred(rewritten):
    """Reshape to [-1, n] fails on an empty batch, where the computed shape works."""
    done = rewritten(
        f"""{HEAD} g (float[n, 2, m] x) => (float[q, m] y) <int64 two = {{2}}, int64[1] one = {{1}}> {{
            i = Shape <start = 0, end = 1> (x)  j = Shape <start = 2> (x)
            d = Add(i, i)  t = Concat <axis = 0> (d, j)  y = Reshape(x, t)
        }}""",
        SPEC,
    )
    assert done.ops["Concat"] == 1


@pytest.mark.parametrize("captured", [True, False])
def test_bodies_of_branches_are_settled_too(rewritten, captured):
    shape = "Shape(x)" if captured else "Shape(e)"
    done = rewritten(
        f"""{HEAD} g (float[n, 6] x, bool c) => (float[p, q] y) <int64[2] flat = {{0, -1}}> {{
            y = If (c) <
                then_branch = t () => (float[p, q] a) {{ e = Exp(x)  s = {shape}  a = Reshape(e, s) }},
                else_branch = f () => (float[p, q] b) {{ b = Neg(x) }}>
        }}""",
        SPEC,
    )
    assert "Shape" not in done.ops


def test_an_overridable_initializer_is_not_known(rewritten):
    import onnx

    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[n, 6] x, int64[2] t) => (float[p, q] y) {{ d = Add(t, t)  h = Sub(d, t)  y = Reshape(x, h) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 3]), "t"))
    assert rewritten(proto, SPEC).edits == 0
