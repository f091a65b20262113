"""Stretches of a network that can be left out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.analysis.blocks import residual_blocks
from onnxopt.analysis.shapes import Shapes

SQUARE = np.eye(16, dtype=np.float32)


def blocks(body: str, head: str = "(float[n,16] x) => (float[n,16] y)") -> list[tuple[str, str, int]]:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> agraph {head} {{ {body} }}')
    for name in ("u", "v", "w"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(SQUARE, name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(SQUARE[0], "g"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return [(b.start.name or "", b.end.name or "", len(b.layers)) for b in residual_blocks(model, Shapes(model))]


def test_a_residual_block_is_found() -> None:
    assert blocks("a = MatMul(x, u) t = Transpose(v) h = MatMul(a, t) r = Relu(h) b = Add(a, r) y = MatMul(b, w)") == [
        ("a", "b", 1)
    ]


def test_layers_without_a_way_around_are_none() -> None:
    assert blocks("a = MatMul(x, u) b = MatMul(a, v) y = MatMul(b, w)") == []


def test_a_normalization_belongs_to_either_neighbour() -> None:
    body = """
      a = MatMul(x, u) n = LayerNormalization(a, g)
      h = MatMul(n, v) b = Add(n, h) m = LayerNormalization(b, g)
      y = MatMul(m, w)
    """
    assert blocks(body) == [("a", "b", 1), ("n", "m", 1)]


def test_blocks_of_another_width_cannot_go() -> None:
    body = "a = MatMul(x, u) h = MatMul(a, v) c = Concat<axis = 1>(a, h) t = Transpose(c) y = Relu(t)"
    assert blocks(body, "(float[n,16] x) => (float[m,n] y)") == []


def test_a_value_that_goes_on_past_the_block_keeps_it() -> None:
    body = "a = MatMul(x, u) h = MatMul(a, v) b = Add(a, h) c = MatMul(b, w) y = Add(c, a)"
    assert blocks(body) == []


def test_masks_and_sizes_do_not_count_as_ways() -> None:
    body = """
      a = MatMul(x, u) h = MatMul(a, v) k = Mul(h, m) b = Add(a, k)
      i = MatMul(b, w) j = Mul(i, m) c = Add(b, j)
      s = Shape(a) z = Reshape(c, s) y = Relu(z)
    """
    assert blocks(body, "(float[n,16] x, float[n,1] m) => (float[n,16] y)") == [
        ("a", "b", 1),
        ("b", "c", 1),
        ("b", "z", 1),
    ]


def test_what_a_model_gives_away_on_its_way_stays() -> None:
    body = "a = MatMul(x, u) h = MatMul(a, v) b = Add(a, h) y = MatMul(b, w)"
    assert blocks(body, "(float[n,16] x) => (float[n,16] h, float[n,16] y)") == []
    assert blocks(body, "(float[n,16] x) => (float[n,16] b, float[n,16] y)") == []


def test_blocks_with_branches_are_followed_into_them() -> None:
    body = """
      a = MatMul(x, u) p = Relu(a)
      h = If (c) <
        then_branch = t () => (float[n,16] r) { r = MatMul(p, v) },
        else_branch = e () => (float[n,16] r) { r = Identity(p) }
      >
      b = Add(a, h) y = MatMul(b, w)
    """
    assert blocks(body, "(float[n,16] x, bool c) => (float[n,16] y)") == [("a", "b", 1)]
