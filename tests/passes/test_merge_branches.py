"""Convs on the same input that are added up become one."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxopt

PASSES = "merge-branches"
CHANNELS = 4


def model(body, *, opset=17, outputs="float[N,C,H,W] y", **weights):
    """Return a model of `body`, whose constants are drawn by shape or given."""
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N,{CHANNELS},9,9] x) => ({outputs}) {{ {body} }}'
    )
    for name, value in weights.items():
        array = value if isinstance(value, np.ndarray) else random.normal(size=value)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return proto


THREE = "a = Conv<pads=[1,1,1,1]>(x, w3, b3) b = Conv(x, w1) ab = Add(a, b)"
NORM = {"s": (4,), "t": (4,), "m": (4,), "v": np.array([1.0, 2.0, 0.5, 0.1])}


def test_kernels_of_all_sizes_and_the_normalized_input_are_one_conv(rewritten):
    proto = model(
        THREE + "n = BatchNormalization(x, s, t, m, v) sum = Add(ab, n) y = Relu(sum)",
        w3=(4, 4, 3, 3), b3=(4,), w1=(4, 4, 1, 1), **NORM,
    )  # fmt: skip
    found = rewritten(proto, PASSES)
    assert found.ops == {"Conv": 1, "Relu": 1}
    conv = found.nodes[0]
    assert list(conv.attributes["pads"].value) == [1, 1, 1, 1]
    assert list(conv.inputs[1].shape) == [4, 4, 3, 3]


def test_the_input_itself_is_a_branch(rewritten):
    found = rewritten(model("a = Conv<pads=[1,1,1,1]>(x, w3) y = Add(x, a)", w3=(4, 4, 3, 3)), PASSES)
    assert found.ops == {"Conv": 1}


def test_what_reads_something_else_is_added_behind(rewritten):
    proto = model("r = Relu(x)" + THREE + "y = Add(ab, r)", w3=(4, 4, 3, 3), b3=(4,), w1=(4, 4, 1, 1))
    found = rewritten(proto, PASSES)
    assert found.ops == {"Relu": 1, "Conv": 1, "Add": 1}


def test_depthwise_branches(rewritten):
    proto = model(
        "a = Conv<pads=[1,1,1,1], group=4>(x, w3) b = Conv<group=4>(x, w1) ab = Add(a, b) y = Add(ab, x)",
        w3=(4, 1, 3, 3), w1=(4, 1, 1, 1),
    )  # fmt: skip
    assert rewritten(proto, PASSES).ops == {"Conv": 1}


def test_branches_with_strides_but_not_the_input(rewritten):
    proto = model(
        "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w3) b = Conv<strides=[2,2]>(x, w1) y = Add(a, b)",
        w3=(4, 4, 3, 3), w1=(4, 4, 1, 1),
    )  # fmt: skip
    assert rewritten(proto, PASSES).ops == {"Conv": 1}


def test_two_sums_of_two_inputs(rewritten):
    proto = model(
        THREE + "r = Relu(x) c = Conv(r, u1) d = Conv(r, u2) cd = Add(c, d) y = Add(ab, cd)",
        w3=(4, 4, 3, 3), b3=(4,), w1=(4, 4, 1, 1), u1=(4, 4, 1, 1), u2=(4, 4, 1, 1),
    )  # fmt: skip
    assert rewritten(proto, PASSES).ops == {"Conv": 2, "Relu": 1, "Add": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (THREE + "y = Identity(ab) z = Identity(a)", "a branch is used elsewhere, too"),
        (THREE + "y = Identity(ab) c = Relu(x) z = Conv(c, w1)", "the weight of a branch is used elsewhere, too"),
        ("w = Abs(w1) a = Conv(x, w) b = Conv(x, w1) y = Add(a, b)", "the weight or bias of a branch is not constant"),
        (
            "a = Conv<auto_pad=\"SAME_UPPER\">(x, w3) b = Conv(x, w1) y = Add(a, b)",
            "the padding of a branch depends on the size of the image",
        ),
        (
            "a = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, w3) b = Conv<pads=[1,1,1,1]>(x, v3) y = Add(a, b)",
            "the branches differ in groups, strides, dilations, channels or type",
        ),
        (
            "a = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, w3) b = Conv<dilations=[2,2]>(x, w1) y = Add(a, b)",
            "the branches differ in groups, strides, dilations, channels or type",
        ),
        (
            "a = Conv<pads=[0,1,0,1]>(x, w13) b = Conv<pads=[1,0,1,0]>(x, w31) y = Add(a, b)",
            "the joint kernel would be larger than each",
        ),
        (
            "a = Conv(x, wide) b = Conv<pads=[0,0,0,0]>(x, w1) y = Add(a, b)",
            "the results of the branches are not of the same shape",
        ),
    ],
)  # fmt: skip
def test_what_is_left_alone(rewritten, body, reason):
    shapes = {"w3": (4, 4, 3, 3), "b3": (4,), "w1": (4, 4, 1, 1), "v3": (4, 4, 3, 3), "w13": (4, 4, 1, 3),
              "w31": (4, 4, 3, 1), "wide": (1, 4, 1, 1)}  # fmt: skip
    used = {name: shape for name, shape in shapes.items() if re.search(rf"\b{name}\b", body)}
    outputs = "float[N,C,H,W] y" + (", float[N,C,P,Q] z" if "z =" in body else "")
    found = rewritten(model(body, outputs=outputs, **used), PASSES)
    assert reason in found.refusals
    assert found.edits == 0


@settings(max_examples=40, deadline=None)
@given(
    kernels=st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])), min_size=2, max_size=4),
    shift=st.integers(-1, 1),
    strides=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    groups=st.sampled_from([1, 2, 4]),
)
def test_the_sum_is_the_same(kernels, shift, strides, groups):
    """Kernels of any size, the first one off its centre, are merged into what they add up to, or left alone."""
    shapes = {}
    body = "s0 = Constant<value_float=0.0>() "
    for i, (height, width) in enumerate(kernels):
        off = shift if i == 0 and min(height, width) > 1 else 0
        pads = [height // 2 + off, width // 2, height // 2 - off, width // 2]
        shapes[f"w{i}"] = (4, 4 // groups, height, width)
        body += (
            f"c{i} = Conv<pads={pads}, strides={list(strides)}, group={groups}>(x, w{i}) s{i + 1} = Add(s{i}, c{i}) "
        )
    proto = model(f"{body} y = Relu(s{len(kernels)})", **shapes)
    result = onnxopt.optimize(proto, passes=PASSES, measure=False)
    assert result.report.verification is not None
    assert result.report.verification.ok, result.report.verification.reason
    assert not [d.reason for p in result.report.passes for d in p.dropped]
