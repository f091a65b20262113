"""Which constants are weights, and along which axes channels and sums run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.analysis.weights import weights

CASES = [
    ("y = Conv(x, w)", (4, 3, 1, 1), (0, 1)),
    ('y = com.microsoft.FusedConv<activation="Relu">(x, w)', (4, 3, 1, 1), (0, 1)),
    ("y = ConvTranspose(x, w)", (3, 4, 1, 1), (1, 0)),
    ("y = MatMul(x, w)", (3, 4), (1, 0)),
    ("y = MatMul(w, x)", (4, 3), (0, 1)),
    ("y = Gemm(x, w)", (3, 4), (1, 0)),
    ("y = Gemm<transB=1>(x, w)", (4, 3), (0, 1)),
    ('y = com.microsoft.FusedGemm<transB=1, activation="Relu">(x, w)', (4, 3), (0, 1)),
    ("y = com.microsoft.Attention<num_heads=2>(x, w)", (3, 12), (1, 0)),
    ("y = Gather(w, i)", (9, 4), (0, None)),
]


def roles(body: str, shape: tuple[int, ...]) -> list[tuple[int, int | None]]:
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g (x, int64[2] i) => (y) {{ {body} }}'
    )
    node = next(iter(model.graph))
    value = ir.Value(name="w", const_value=ir.tensor(np.ones(shape, np.float32), name="w"))
    for index, given in enumerate(node.inputs):
        if given is not None and given.name == "w":
            node.replace_input_with(index, value)
    model.graph.register_initializer(value)
    return [(r.channel_axis, r.contraction_axis) for w in weights(model) for r in w.roles]


@pytest.mark.parametrize(("body", "shape", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_axes(body: str, shape: tuple[int, ...], expected: tuple[int, int | None]) -> None:
    assert roles(body, shape) == [expected]


@pytest.mark.parametrize(
    "body", ["y = Add(x, w)", "y = Attention<q_num_heads=2>(x, w, x)", "y = com.example.Conv(x, w)"]
)
def test_what_only_looks_like_a_weight(body: str) -> None:
    assert roles(body, (3, 12)) == []
