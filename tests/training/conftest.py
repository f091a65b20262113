from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 4] x) => (float[batch, 3] y)
{ h = Gemm (x, w1, b1)  r = Relu (h)  s = Gemm (r, w2, b2)  y = Softmax (s) }"""


@pytest.fixture
def network() -> onnx.ModelProto:
    """Return an untrained classifier of four numbers into three classes."""
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (4, 16), "b1": (16,), "w2": (16, 3), "b2": (3,)}.items():
        array = 0.4 * rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.fixture
def blobs() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return samples of three overlapping classes, and their labels."""
    rng = np.random.default_rng(1)
    labels = np.arange(180) % 3
    centres = rng.standard_normal((3, 4)) * 1.5
    x = centres[labels] + rng.standard_normal((180, 4))
    return {"x": x.astype(np.float32)}, labels
