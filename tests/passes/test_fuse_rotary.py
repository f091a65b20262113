import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from onnxopt.passes.fuse import rotary

PASSES = "fold-constants,merge-layout,fuse-rotary,remove-dead-code,merge-common-subexpressions"
HEADS, SIZE = 3, 8
WIDTH = HEADS * SIZE
POSITIONS = 16


def angles(positions):
    return np.outer(np.arange(positions), 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


COS, SIN = np.cos(angles(POSITIONS)), np.sin(angles(POSITIONS))
CONSTANTS = {
    "freq": (10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)).astype(np.float32),
    "freq4": (10000.0 ** (-np.arange(0, 4, 2) / SIZE)).astype(np.float32),
    "table_cos": np.concatenate([COS, COS], 1),
    "table_sin": np.concatenate([SIN, SIN], 1),
    "uneven": np.concatenate([COS, 2 * COS], 1),
    "heads": ints(0, 0, HEADS, SIZE),
    "pairs": ints(0, 0, HEADS, SIZE // 2, 2),
    "flat4": ints(0, 0, 0, -1),
    "flat": ints(0, 0, WIDTH),
    "i0": ints(0),
    "i1": ints(1),
    "i2": ints(2),
    "i3": ints(3),
    "i4": ints(4),
    "i8": ints(8),
    "i01": ints(0, 1),
    "i112": ints(1, 1, 2),
    "wide": ints(-1, SIZE),
    "step2": ints(2),
    "end": ints(2**62),
    "halves": ints(4, 4),
    "n0": np.array(0, np.int64),
    "n1": np.array(1, np.int64),
    "twice": np.array(2, np.float32),
}

# Each computes cos and sin, to be multiplied with batch x heads x positions x features.
FREQUENCIES = (
    "sx = Shape(x) t = Gather(sx, n1) r = Range(n0, t, n1) ru = Unsqueeze(r, i1) rf = Cast<to=1>(ru) f = Mul(rf, freq) "
)
BOTH = "c0 = Cos(ff) s0 = Sin(ff) cos = Unsqueeze(c0, i01) sin = Unsqueeze(s0, i01) "
ANGLES = {
    "computed": FREQUENCIES + "ff = Concat<axis=-1>(f, f) " + BOTH,
    "scaled": FREQUENCIES
    + "ff = Concat<axis=-1>(f, f) c0 = Cos(ff) c1 = Mul(c0, twice) s0 = Sin(ff) s1 = Mul(s0, twice) "
    "cos = Unsqueeze(c1, i01) sin = Unsqueeze(s1, i01) ",
    "gathered": "c0 = Gather(table_cos, ids) s0 = Gather(table_sin, ids) cos = Unsqueeze(c0, i1) sin = Unsqueeze(s0, i1) ",
    "one": FREQUENCIES + "c0 = Cos(f) s0 = Sin(f) cos = Unsqueeze(c0, i01) sin = Unsqueeze(s0, i01) ",
}
SPLIT = "h4 = Reshape(x, heads) h = Transpose<perm=[0,2,1,3]>(h4) "
MERGE = " zt = Transpose<perm=[0,2,1,3]>(z) y = Reshape(zt, flat)"
SLICES = "h1 = Slice(h, i0, i4, i3) h2 = Slice(h, i4, end, i3) "
TURN = "hn = Neg(h2) hr = Concat<axis=-1>(hn, h1) "
FORMS = {
    "sliced": SPLIT + SLICES + TURN + "p = Mul(h, cos) q = Mul(hr, sin) z = Add(p, q)" + MERGE,
    "split": SPLIT
    + "h1, h2 = Split<axis=3>(h, halves) "
    + TURN
    + "p = Mul(cos, h) q = Mul(sin, hr) z = Add(q, p)"
    + MERGE,
    "before the heads are moved": "h = Reshape(x, heads) "
    + SLICES
    + TURN
    + "ct = Transpose<perm=[0,2,1,3]>(cos) st = Transpose<perm=[0,2,1,3]>(sin) "
    "p = Mul(h, ct) q = Mul(hr, st) z = Add(p, q) y = Reshape(z, flat)",
}
# With one cosine and sine per pair.
PAIRS = {
    "halves": SPLIT
    + SLICES
    + "a = Mul(h1, cos) b = Mul(h2, sin) z1 = Sub(a, b) c = Mul(h2, cos) d = Mul(h1, sin) z2 = Add(c, d) "
    "z = Concat<axis=-1>(z1, z2)" + MERGE,
    "interleaved": SPLIT + "h1 = Slice(h, i0, end, i3, step2) h2 = Slice(h, i1, end, i3, step2) "
    "a = Mul(h1, cos) b = Mul(h2, sin) z1 = Sub(a, b) c = Mul(cos, h2) d = Mul(sin, h1) z2 = Add(d, c) "
    "u1 = Unsqueeze(z1, i4) u2 = Unsqueeze(z2, i4) zz = Concat<axis=-1>(u1, u2) zs = Shape(h) z = Reshape(zz, zs)"
    + MERGE,
}
CASES = [(f, a) for f in FORMS for a in ("computed", "scaled", "gathered")] + [(f, "one") for f in PAIRS]


def model(form, kind, opset=18):
    nodes = ANGLES[kind] + {**FORMS, **PAIRS}[form]
    inputs = f"float[B,S,{WIDTH}] x" + (", int64[B,S] ids" if kind == "gathered" else "")
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => (float[B,S,{WIDTH}] y) {{ {nodes} }}'
    )
    return complete(proto)


def complete(proto):
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in used)
    return proto


def outputs(proto, feed):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})[0]


def fused(rewritten, proto, target="portable"):
    """Run the passes, and compare with what the model gave."""
    found = rewritten(proto, PASSES, target=target)
    for batch, length in ((2, 5), (1, 1), (3, 2), (1, 9), (2, 1)):
        rng = np.random.default_rng(length)
        feed = {"x": rng.standard_normal((batch, length, WIDTH)).astype(np.float32)}
        feed["ids"] = rng.integers(0, POSITIONS, (batch, length))
        expected, after = outputs(proto, feed), outputs(ir.to_proto(found.model), feed)
        np.testing.assert_allclose(after, expected, rtol=2e-5, atol=2e-6)
    return found


@pytest.mark.parametrize(("form", "kind"), CASES)
@pytest.mark.parametrize(("opset", "target"), [(23, "portable"), (18, "cpu")])
def test_one_operator(rewritten, form, kind, opset, target):
    found = fused(rewritten, model(form, kind, opset), target)
    assert found.ops["RotaryEmbedding"] == 1
    assert not {"Neg", "Slice", "Split", "Add", "Sub", "Transpose"} & set(found.ops)
    node = next(n for n in found.nodes if n.op_type == "RotaryEmbedding")
    assert node.domain == ("" if opset == 23 else "com.microsoft")
    assert node.attributes["interleaved"].value == (form == "interleaved")
    assert node.inputs[0].name == "x"  # before it is split into heads
    if kind == "gathered":  # from tables of half the size
        tables = [n.inputs[0].const_value.nbytes for n in found.nodes if n.op_type == "Gather"]
        assert tables == [COS.nbytes, COS.nbytes]


@pytest.mark.parametrize(("opset", "target"), [(23, "portable"), (18, "cpu")])
def test_neighbours_turned_by_repeated_angles(rewritten, opset, target):
    repeat = "{0}u = Unsqueeze({0}0, i2) {0}e = Expand({0}u, i112) {0}r = Reshape({0}e, wide) "
    nodes = (
        FREQUENCIES
        + "c0 = Cos(f) s0 = Sin(f) "
        + repeat.format("c")
        + repeat.format("s")
        + SPLIT
        + "h1 = Slice(h, i0, end, i3, step2) h2 = Slice(h, i1, end, i3, step2) hn = Neg(h2) "
        "u1 = Unsqueeze(hn, i4) u2 = Unsqueeze(h1, i4) uu = Concat<axis=-1>(u1, u2) hr = Reshape(uu, flat4) "
        "p = Mul(h, cr) q = Mul(hr, sr) z = Add(p, q)" + MERGE
    )
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{ {nodes} }}'
    found = fused(rewritten, complete(onnx.parser.parse_model(text)), target)
    node = next(n for n in found.nodes if n.op_type == "RotaryEmbedding")
    assert node.attributes["interleaved"].value == 1
    assert not {"Slice", "Neg", "Expand", "Concat"} & (
        set(found.ops) - ({"Expand", "Concat"} if opset == 23 else set())
    )


@pytest.mark.parametrize("form", list(FORMS))
def test_the_minus_moves_into_the_sines(rewritten, form):
    found = fused(rewritten, model(form, "computed"))
    assert "Neg" not in found.ops
    assert "the standard RotaryEmbedding needs opset 23; raise it with --opset" in found.refusals
    assert "RotaryEmbedding" not in found.ops


def test_moved_minus_is_still_recognized(rewritten):
    once = rewritten(model("sliced", "computed"), PASSES)
    proto = ir.to_proto(once.model)
    found = fused(rewritten, proto, "cpu")
    assert found.ops["RotaryEmbedding"] == 1
    assert "Concat" not in found.ops


@pytest.mark.parametrize(("opset", "target"), [(23, "portable"), (18, "cpu")])
def test_some_of_the_features(rewritten, opset, target):
    nodes = (
        FREQUENCIES.replace("freq)", "freq4)")
        + "ff = Concat<axis=-1>(f, f) "
        + BOTH
        + SPLIT
        + "part = Slice(h, i0, i4, i3) rest = Slice(h, i4, end, i3) h1 = Slice(part, i0, i2, i3) "
        "h2 = Slice(part, i2, end, i3) "
        + TURN
        + "p = Mul(part, cos) q = Mul(hr, sin) zr = Add(p, q) z = Concat<axis=3>(zr, rest)"
        + MERGE
    )
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{ {nodes} }}'
    found = fused(rewritten, complete(onnx.parser.parse_model(text)), target)
    node = next(n for n in found.nodes if n.op_type == "RotaryEmbedding")
    assert node.attributes["rotary_embedding_dim"].value == 4
    assert "Slice" not in found.ops


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            "ff = Concat<axis=-1>(f, f)",
            "g = Mul(f, twice) ff = Concat<axis=-1>(f, g)",
            "it is not known that both features of a pair are rotated by the same angle",
        ),
        (
            "c0 = Cos(ff)",
            "c0 = Gather(uneven, r)",
            "it is not known that both features of a pair are rotated by the same angle",
        ),
        (
            "p = Mul(h, cos)",
            "whole = Shape(h) ce = Expand(cos, whole) p = Mul(h, ce)",
            "it is not clear which axis counts positions and which heads",
        ),
    ],
)
def test_near_misses_say_why(rewritten, before, after, reason):
    nodes = (ANGLES["computed"] + FORMS["sliced"]).replace(before, after, 1)
    text = f'<ir_version: 9, opset_import: ["" : 23]> g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{ {nodes} }}'
    found = fused(rewritten, complete(onnx.parser.parse_model(text)))
    assert "RotaryEmbedding" not in found.ops
    assert reason in found.refusals


@pytest.mark.parametrize(
    ("before", "after"),
    [("hn = Neg(h2)", "hn = Abs(h2)"), ("Concat<axis=-1>(hn, h1)", "Concat<axis=-1>(h1, hn)"), ("z = Add", "z = Sub")],
)
def test_other_sums_are_left_alone(rewritten, before, after):
    nodes = ANGLES["computed"] + FORMS["sliced"]
    text = (
        f'<ir_version: 9, opset_import: ["" : 23]> g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) '
        f"{{ {nodes.replace(before, after, 1)} }}"
    )
    found = fused(rewritten, complete(onnx.parser.parse_model(text)))
    assert "RotaryEmbedding" not in found.ops


def test_operators_that_were_not_measured_are_not_used(rewritten, monkeypatch):
    monkeypatch.setattr(rotary.kernels, "RATIOS", {})
    found = rewritten(model("sliced", "computed", 23), PASSES, target="cpu")
    assert "RotaryEmbedding" not in found.ops
    assert "the operator was not measured to be as fast as plain operators" in found.refusals


def test_layers_share_the_angles(rewritten):
    nodes = ANGLES["computed"] + FORMS["sliced"].replace(MERGE, "")
    second = SLICES + TURN + "p = Mul(h, cos) q = Mul(hr, sin) z = Add(p, q)"
    for name in ("h1", "h2", "hn", "hr", "p", "q"):
        second = second.replace(name, f"{name}x")
    second = second.replace("(h,", "(z,").replace("z = Add", "w = Add")
    merged = " zt = Transpose<perm=[0,2,1,3]>(w) y = Reshape(zt, flat)"
    text = (
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) '
        f"{{ {nodes} {second} {merged} }}"
    )
    found = fused(rewritten, complete(onnx.parser.parse_model(text)), "cpu")
    assert found.ops["RotaryEmbedding"] == 2
    assert found.ops["Cos"] == found.ops["Sin"] == 1
