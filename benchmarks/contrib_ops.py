"""Are the runtime's fused operators faster than plain ones? Measures each beside the best plain form of the same thing.

    python benchmarks/contrib_ops.py [--provider cpu] [--budget 3] [--write]

Prints the time of each operator by that of the plain form, per shape and in geometric mean. `--write` puts the
means into onnxopt/analysis/kernels.py, from which the passes choose. Ends with 1 when a mean differs from the table
by more than 10%.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnxopt.analysis import kernels
from onnxopt.measure import measure
from onnxopt.runtime import RunOptions

TABLE = Path(kernels.__file__)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TOLERATED = 0.10
LOWEST = -1e30
"""What the causal mask of the measurements adds; -infinity would do as well."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: the same thing in two ways.

    Attributes:
        label: What distinguishes it.
        plain: Nodes of the plain form, as ONNX text.
        fused: Nodes with the operator that is measured.
        opset: Of the fused form.
        feed: The inputs.
        constants: The initializers of both.
    """

    label: str
    plain: str
    fused: str
    opset: int
    feed: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]

    def model(self, nodes: str, opset: int) -> onnx.ModelProto:
        """Return a model of these nodes, with the output y."""
        kinds = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
        inputs = ", ".join(f"{kinds[a.dtype]}[{','.join(map(str, a.shape))}] {n}" for n, a in self.feed.items())
        head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
        proto = onnx.parser.parse_model(f"{head} g ({inputs}) => (float[a,b,c] y) {{ {nodes} }}")
        used = set(re.findall(r"\w+", nodes))
        for name, array in self.constants.items():
            if name in used:
                proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return proto


Arrays = dict[str, np.ndarray]


def attention_parts(batch: int, length: int, heads: int, size: int, kv: int) -> tuple[Arrays, Arrays]:
    """Return inputs and constants of an attention layer with its projections and a causal mask."""
    rng = np.random.default_rng(0)
    width = heads * size

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)

    mask = np.triu(np.full((length, length), LOWEST, np.float32), 1)
    feed = {
        "x": rng.standard_normal((batch, length, width)).astype(np.float32),
        "m": np.broadcast_to(mask, (batch, 1, length, length)).copy(),
    }
    q, k, v = weight(width, width), weight(width, kv * size), weight(width, kv * size)
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    constants = {
        "wq": q,
        "wk": k,
        "wv": v,
        "w": np.concatenate([q, k, v], 1),
        "heads": np.array([0, 0, heads, size]),
        "kvheads": np.array([0, 0, kv, size]),
        "grouped": np.array([0, 0, kv, heads // kv, size]),
        "flat": np.array([0, 0, width]),
        "scale": np.array(size**-0.5, np.float32),
        "one": np.array([1]),
        "two": np.array([2]),
        "first": np.array([0]),
        "cos": cos,
        "sin": sin,
        "cosb": np.broadcast_to(cos, (batch, *cos.shape)).copy(),
        "sinb": np.broadcast_to(sin, (batch, *sin.shape)).copy(),
        "cosf": np.concatenate([cos, cos], 1)[None, None],
        "sinf": np.concatenate([-sin, sin], 1)[None, None],
        "half": np.array([size // 2, size // 2]),
        "lengths": np.full(batch, length - 1, np.int32),
        "total": np.array(length, np.int32),
    }
    return feed, constants


PROJECT = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
PLAIN = (
    "q4 = Reshape(q, heads) qt = Transpose<perm=[0,2,1,3]>(q4) qs = Mul(qt, scale) k4 = Reshape(k, heads) "
    "kt = Transpose<perm=[0,2,3,1]>(k4) v4 = Reshape(v, heads) vt = Transpose<perm=[0,2,1,3]>(v4) "
    "s = MatMul(qs, kt) sm = Add(s, m) p = Softmax<axis=-1>(sm) o = MatMul(p, vt) "
    "ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, flat)"
)
PLAIN_GROUPED = (
    "q5 = Reshape(q, grouped) qt = Transpose<perm=[0,2,3,1,4]>(q5) qs = Mul(qt, scale) k4 = Reshape(k, kvheads) "
    "kt = Transpose<perm=[0,2,1,3]>(k4) ku = Unsqueeze(kt, two) kx = Transpose<perm=[0,1,2,4,3]>(ku) "
    "v4 = Reshape(v, kvheads) vt = Transpose<perm=[0,2,1,3]>(v4) vu = Unsqueeze(vt, two) mu = Unsqueeze(m, one) "
    "s = MatMul(qs, kx) sm = Add(s, mu) p = Softmax<axis=-1>(sm) o = MatMul(p, vu) "
    "ot = Transpose<perm=[0,3,1,2,4]>(o) y = Reshape(ot, flat)"
)


def rotated(name: str, heads: str) -> str:
    """Return nodes that rotate a projection with plain operators and split it into heads."""
    return (
        f"{name}4 = Reshape({name}, {heads}) {name}t = Transpose<perm=[0,2,1,3]>({name}4) "
        f"{name}a, {name}b = Split<axis=-1>({name}t, half) {name}c = Concat<axis=-1>({name}b, {name}a) "
        f"{name}s = Mul({name}c, sinf) {name}e = Mul({name}t, cosf) {name}r = Add({name}e, {name}s) "
    )


def attention(fused: Callable[[int, int], str], opset: int = 18) -> Iterator[Case]:
    """Yield attention with as many heads in K and V as in Q."""
    for batch, length, heads, size in ((1, 16, 12, 32), (1, 128, 12, 32), (2, 64, 12, 64), (1, 256, 8, 64)):
        feed, constants = attention_parts(batch, length, heads, size, heads)
        label = f"{batch} x {length}, {heads} heads of {size}"
        yield Case(label, PROJECT + PLAIN, fused(heads, size), opset, feed, constants)


def standard() -> Iterator[Case]:
    """Yield the standard operator."""
    return attention(lambda n, _: f"{PROJECT} y = Attention<q_num_heads={n}, kv_num_heads={n}>(q, k, v, m)", 23)


def packed() -> Iterator[Case]:
    """Yield ONNX Runtime's operator with the projections inside."""
    return attention(lambda n, _: f"y = com.microsoft.Attention<num_heads={n}>(x, w, , , , m)")


def multi_head() -> Iterator[Case]:
    """Yield ONNX Runtime's operator without the projections."""
    return attention(lambda n, _: f"{PROJECT} y = com.microsoft.MultiHeadAttention<num_heads={n}>(q, k, v, , , m)")


def grouped() -> Iterator[Case]:
    """Yield grouped-query attention, with rotary embedding (which the plain form does by its operator) or without."""
    op = "com.microsoft.RotaryEmbedding"
    for batch, length, heads, size, kv, turn in (
        (1, 16, 8, 64, 2, True),
        (1, 128, 8, 64, 2, True),
        (2, 64, 16, 64, 4, True),
        (1, 16, 8, 64, 2, False),
        (1, 128, 8, 64, 2, False),
    ):
        feed, constants = attention_parts(batch, length, heads, size, kv)
        rotation = (
            f"qr = {op}<num_heads={heads}, rotary_embedding_dim={size}>(q, first, cos, sin) "
            f"kr = {op}<num_heads={kv}, rotary_embedding_dim={size}>(k, first, cos, sin) "
        )
        rest = PLAIN_GROUPED
        if turn:
            rest = rotation + rest.replace("Reshape(q,", "Reshape(qr,").replace("Reshape(k,", "Reshape(kr,")
        given = f"num_heads={heads}, kv_num_heads={kv}, causal=0, do_rotary={int(turn)}"
        angles = "cos, sin" if turn else ", "
        fused = (
            f"qkv = MatMul(x, w) "
            f"y = com.microsoft.GroupQueryAttention<{given}>(qkv, , , , , lengths, total, {angles}, , m)"
        )
        label = f"{batch} x {length}, {heads} heads of {size}, {kv} of K and V" + (", rotary" if turn else "")
        yield Case(label, PROJECT + rest, fused, 18, feed, constants)


def rotary(nodes: str, opset: int) -> Iterator[Case]:
    """Yield a rotary embedding of a projection that is then split into heads."""
    for batch, length, heads, size in ((1, 16, 8, 64), (1, 128, 8, 64), (2, 64, 32, 64)):
        feed, constants = attention_parts(batch, length, heads, size, heads)
        q = {"q": feed["x"]}
        back = "z = Transpose<perm=[0,2,1,3]>(qr) y = Reshape(z, flat)"
        split = "r4 = Reshape(r, heads) qr = Transpose<perm=[0,2,1,3]>(r4) "
        fused = nodes.format(heads=heads, size=size) + split + back
        label = f"{batch} x {length}, {heads} heads of {size}"
        yield Case(label, rotated("q", "heads") + back, fused, opset, q, constants)


def standard_rotary() -> Iterator[Case]:
    """Yield the standard operator."""
    return rotary("r = RotaryEmbedding<num_heads={heads}>(q, cosb, sinb) ", 23)


def contrib_rotary() -> Iterator[Case]:
    """Yield ONNX Runtime's operator."""
    given = "num_heads={heads}, rotary_embedding_dim={size}"
    return rotary(f"r = com.microsoft.RotaryEmbedding<{given}>(q, first, cos, sin) ", 18)


def skip_normalization() -> Iterator[Case]:
    """Yield the normalization of a sum, beside Sum and LayerNormalization."""
    rng = np.random.default_rng(0)
    for batch, length, width in ((1, 16, 384), (1, 128, 384), (2, 64, 768)):
        feed = {n: rng.standard_normal((batch, length, width)).astype(np.float32) for n in ("x", "r")}
        constants = {n: rng.standard_normal(width).astype(np.float32) for n in ("g", "b")}
        plain = "s = Sum(x, r) y = LayerNormalization<axis=-1>(s, g, b)"
        fused = "y = com.microsoft.SkipLayerNormalization(x, r, g, b)"
        yield Case(f"{batch} x {length} x {width}", plain, fused, 18, feed, constants)


def group_normalization() -> Iterator[Case]:
    """Yield group normalization, beside what the passes write instead."""
    rng = np.random.default_rng(0)
    for batch, channels, length, groups in ((1, 32, 64, 8), (2, 64, 784, 8), (1, 320, 1024, 32), (1, 128, 4096, 4)):
        feed = {"x": rng.standard_normal((batch, channels, length)).astype(np.float32)}
        constants = {n: rng.standard_normal(channels).astype(np.float32) for n in ("w", "b")} | {
            "ones": np.ones(groups, np.float32),
            "zeros": np.zeros(groups, np.float32),
            "mean": np.zeros(channels, np.float32),
            "variance": np.ones(channels, np.float32),
            "grouped": np.array([0, groups, -1]),
            "back": np.array([0, channels, length]),
        }
        plain = (
            "r = Reshape(x, grouped) i = InstanceNormalization(r, ones, zeros) q = Reshape(i, back) "
            "y = BatchNormalization<epsilon = 0.0>(q, w, b, mean, variance)"
        )
        fused = f"y = GroupNormalization<num_groups={groups}>(x, w, b)"
        yield Case(f"{batch} x {channels} x {length}, {groups} groups", plain, fused, 21, feed, constants)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "Attention": standard,
    "GroupNormalization": group_normalization,
    "RotaryEmbedding": standard_rotary,
    "com.microsoft.Attention": packed,
    "com.microsoft.GroupQueryAttention": grouped,
    "com.microsoft.MultiHeadAttention": multi_head,
    "com.microsoft.RotaryEmbedding": contrib_rotary,
    "com.microsoft.SkipLayerNormalization": skip_normalization,
}


def compare(name: str, provider: str, budget_seconds: float) -> float:
    """Measure one operator in all its shapes and return the geometric mean of its ratios."""
    ratios = []
    for case in CASES[name]():
        plain, fused = case.model(case.plain, 18), case.model(case.fused, case.opset)
        options = RunOptions(provider=provider)
        found = measure(plain, fused, feed=case.feed, options=options, budget_seconds=budget_seconds, memory=False)
        ratios.append(found.ratio)
        print(f"  {name:38} {case.label:50} {found.ratio:.3f} ({found.low:.3f}-{found.high:.3f})", flush=True)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"{name:40} {mean:.2f}", flush=True)
    return round(mean, 2)


def written(text: str, provider: str, means: dict[str, float]) -> str:
    """Return the text of the table's module with these means."""
    kept = {key: ratio for key, ratio in kernels.RATIOS.items() if key[1] != PROVIDERS[provider]}
    table = {**kept, **{(name, PROVIDERS[provider]): mean for name, mean in means.items()}}
    lines = "".join(f'    ("{op}", "{where}"): {ratio},\n' for (op, where), ratio in sorted(table.items()))
    start = text.index("RATIOS")
    return text[: text.index("{", start) + 1] + "\n" + lines + text[text.index("}", start) :]


def main() -> int:
    """Measure every operator and compare with the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="cpu", choices=PROVIDERS)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds per shape")
    parser.add_argument("--write", action="store_true", help="put the means into the table")
    args = parser.parse_args()
    means = {name: compare(name, args.provider, args.budget) for name in CASES}
    if args.write:
        TABLE.write_text(written(TABLE.read_text(), args.provider, means))
        return 0
    away = [
        name
        for name, mean in means.items()
        if abs(mean / (kernels.ratio(name, PROVIDERS[args.provider]) or math.inf) - 1) > TOLERATED
    ]
    print(f"away from the table by more than {TOLERATED:.0%}: {', '.join(away) or 'none'}")
    return int(bool(away))


if __name__ == "__main__":
    sys.exit(main())
