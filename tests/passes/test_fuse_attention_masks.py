"""Attention under every kind of mask, with and without a guard, a cache and shared heads: the numbers must stay.

NaN and zeros of rows that are masked in full count as numbers here.
"""

import collections
import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import onnxopt

PASSES = (
    "fold-constants,settle-shapes,remove-identities,merge-layout,remove-dead-code,simplify-masks,fuse-attention,"
    "remove-dead-code,merge-common-subexpressions"
)
HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE
CONSTANTS = {
    "heads": np.array([0, 0, HEADS, SIZE]),
    "one_head": np.array([0, 0, 1, SIZE]),
    "flat": np.array([0, 0, WIDTH]),
    "n0": np.array(0),
    "n1": np.array(1),
    "n2": np.array(2),
    "n3": np.array(3),
    "i0": np.array([0]),
    "i1": np.array([1]),
    "i2": np.array([2]),
    "i12": np.array([1, 2]),
    "i13": np.array([1, 3]),
    "heads1": np.array([HEADS]),
    "size1": np.array([SIZE]),
    "scale": np.array(SIZE**-0.5, np.float32),
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "lowest": np.array(np.finfo(np.float32).min),
    "few": np.array(-1e4, np.float32),
    "inf": np.array(-np.inf, np.float32),
}

SPLIT = (
    "q4 = Reshape(q, heads) qt = Transpose<perm=[0,2,1,3]>(q4) k4 = Reshape(k, {0}) kh = Transpose<perm=[0,2,1,3]>(k4) "
    "v4 = Reshape(v, {0}) vh = Transpose<perm=[0,2,1,3]>(v4) "
)
REPEAT = (
    "sk = Shape({0}{1}) b{0} = Gather(sk, i0) t{0} = Gather(sk, i2) e5{0} = Concat<axis=0>(b{0}, i1, heads1, t{0}, size1) "
    "e4{0} = Concat<axis=0>(b{0}, heads1, t{0}, size1) u{0} = Unsqueeze({0}{1}, i2) x{0} = Expand(u{0}, e5{0}) "
    "{0}t = Reshape(x{0}, e4{0}) "
).replace("sk", "s{0}s")
CACHE = "kp = Concat<axis=2>(past_k, kh) vp = Concat<axis=2>(past_v, vh) "
# Each makes kt and vt, batch x heads x keys x size.
KEYS = {
    "plain": SPLIT.format("heads") + "kt = Identity(kh) vt = Identity(vh) ",
    "shared heads": SPLIT.format("one_head") + REPEAT.format("k", "h") + REPEAT.format("v", "h"),
    "cache": SPLIT.format("heads") + CACHE + "kt = Identity(kp) vt = Identity(vp) ",
    "cache and shared heads": SPLIT.format("one_head") + CACHE + REPEAT.format("k", "p") + REPEAT.format("v", "p"),
}
PADDING = "kept = Cast<to=9>(tokens) cond = Unsqueeze(kept, i12) "
# The last query is at the last key.
GRID = (
    "sq = Shape(q) nq = Gather(sq, n1) st = Shape(kt) nk = Gather(st, n2) np = Sub(nk, nq) rq = Range(np, nk, n1) "
    "rk = Range(n0, nk, n1) gi = Unsqueeze(rq, i1) gj = Unsqueeze(rk, i0) "
)
CAUSAL = GRID + "causal = LessOrEqual(gj, gi) "
ADDED = "m = Where({0}, zero, {1}) sm = Add(s, m) "
MASKS = {
    "none": "sm = Identity(s) ",
    "padding": PADDING + ADDED.format("cond", "lowest"),
    "padding, infinite": PADDING + ADDED.format("cond", "inf"),
    "padding, some": PADDING + ADDED.format("cond", "few"),
    "padding, multiplied": "tf = Cast<to=1>(tokens) tu = Unsqueeze(tf, i12) tn = Sub(one, tu) m = Mul(tn, few) sm = Add(s, m) ",
    "padding, filled": PADDING + "sm = Where(cond, s, lowest) ",
    "padding, filled, infinite": PADDING + "sm = Where(cond, s, inf) ",
    "padding, inverted": PADDING + "other = Not(cond) sm = Where(other, inf, s) ",
    "queries": "kept = Cast<to=9>(rows) cond = Unsqueeze(kept, i13) " + ADDED.format("cond", "lowest"),
    "queries, infinite": "kept = Cast<to=9>(rows) cond = Unsqueeze(kept, i13) " + ADDED.format("cond", "inf"),
    "causal": CAUSAL + ADDED.format("causal", "lowest"),
    "causal, infinite": CAUSAL + ADDED.format("causal", "inf"),
    "causal, filled": CAUSAL + "sm = Where(causal, s, inf) ",
    "strictly causal": GRID + "causal = Less(gj, gi) " + ADDED.format("causal", "inf"),
    "anti-causal": GRID + "causal = GreaterOrEqual(gj, gi) " + ADDED.format("causal", "inf"),
    "window": CAUSAL + "d = Sub(gi, gj) near = Less(d, n3) both = And(causal, near) " + ADDED.format("both", "inf"),
    "causal and padding": CAUSAL + PADDING + "both = And(causal, cond) " + ADDED.format("both", "lowest"),
    "causal and padding, infinite": CAUSAL + PADDING + "both = And(causal, cond) " + ADDED.format("both", "inf"),
    "two masks": CAUSAL
    + PADDING
    + "m1 = Where(causal, zero, inf) m2 = Where(cond, zero, lowest) sa = Add(s, m1) sm = Add(sa, m2) ",
    "two infinite masks": CAUSAL
    + PADDING
    + "m1 = Where(causal, zero, inf) m2 = Where(cond, zero, inf) sa = Add(s, m1) sm = Add(sa, m2) ",
}
FOR_CACHE = ("none", "padding", "padding, infinite", "causal", "causal, infinite", "causal and padding, infinite")


def model(keys, mask, guard, opset):
    after = "nan = IsNaN(p) pg = Where(nan, zero, p) o = MatMul(pg, vt) " if guard else "o = MatMul(p, vt) "
    nodes = (
        KEYS[keys] + "kx = Transpose<perm=[0,1,3,2]>(kt) s0 = MatMul(qt, kx) s = Mul(s0, scale) " + MASKS[mask]
    ) + f"p = Softmax<axis=-1>(sm) {after} ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, flat)"
    heads = 1 if "shared" in keys else HEADS
    width = heads * SIZE
    inputs = f"float[B,S,{WIDTH}] q, float[B,S,{width}] k, float[B,S,{width}] v, int64[B,T] tokens, int64[B,S] rows"
    if "cache" in keys:
        inputs += f", float[B,{heads},P,{SIZE}] past_k, float[B,{heads},P,{SIZE}] past_v"
    else:
        inputs = inputs.replace("B,T", "B,S")
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => (float[B,S,{WIDTH}] y) {{ {nodes} }}'
    )
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in used)
    return proto


def feeds(keys):
    """Padding on either side, a row of padding alone, one position, and an empty cache."""
    heads = 1 if "shared" in keys else HEADS
    for (batch, length), past in itertools.product(((2, 4), (3, 1)), (0, 3) if "cache" in keys else (0,)):
        rng = np.random.default_rng(length + past)
        total = length + past

        def normal(*shape, rng=rng):
            return rng.standard_normal(shape).astype(np.float32)

        tokens, rows = np.ones((batch, total), np.int64), np.ones((batch, length), np.int64)
        tokens[0, : total // 2], tokens[1, total // 2 :], rows[-1, -1] = 0, 0, 0
        yield {
            "q": normal(batch, length, WIDTH),
            "k": normal(batch, length, heads * SIZE),
            "v": normal(batch, length, heads * SIZE),
            "tokens": tokens,
            "rows": rows,
            "past_k": normal(batch, heads, past, SIZE),
            "past_v": normal(batch, heads, past, SIZE),
        }


def outputs(proto, feed):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})[0]


CASES = [
    (k, m) for k in KEYS for m in (FOR_CACHE if "cache" in k else MASKS if k == "plain" else (*FOR_CACHE, "two masks"))
]
WAYS = [(18, "portable"), (18, "cpu"), (23, "portable")]


@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
@pytest.mark.parametrize(("opset", "target"), WAYS)
@pytest.mark.parametrize(("keys", "mask"), CASES)
def test_the_numbers_stay(keys, mask, opset, target, guard):
    proto = model(keys, mask, guard, opset)
    result = onnxopt.optimize(proto, passes=PASSES, target=target, verify=False, measure=False)
    after = ir.to_proto(result.model)
    for feed in feeds(keys):
        expected, found = outputs(proto, feed), outputs(after, feed)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6, equal_nan=True)


def fused(keys, mask, guard, opset, target):
    result = onnxopt.optimize(
        model(keys, mask, guard, opset), passes=PASSES, target=target, verify=False, measure=False
    )
    ops = collections.Counter(n.op_type for n in result.model.graph)
    return next((op for op in ("Attention", "MultiHeadAttention", "GroupQueryAttention") if ops[op]), "plain")


@pytest.mark.parametrize(
    ("keys", "mask", "guard", "expected"),
    [
        ("plain", "padding", False, ("plain", "GroupQueryAttention", "Attention")),
        ("plain", "padding, infinite", False, ("plain", "GroupQueryAttention", "plain")),
        ("plain", "padding, infinite", True, ("plain", "MultiHeadAttention", "Attention")),
        ("plain", "causal, infinite", True, ("plain", "GroupQueryAttention", "Attention")),
        ("plain", "strictly causal", False, ("plain", "GroupQueryAttention", "plain")),
        ("shared heads", "causal", False, ("plain", "GroupQueryAttention", "Attention")),
        ("cache", "causal", False, ("plain", "MultiHeadAttention", "Attention")),
        ("cache and shared heads", "causal", False, ("plain", "plain", "Attention")),
    ],
)
def test_what_is_fused(keys, mask, guard, expected):
    assert tuple(fused(keys, mask, guard, *way) for way in WAYS) == expected
