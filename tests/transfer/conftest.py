from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from onnxopt import model as models
from onnxopt.runtime import open_session


def build(text: str, weights: Mapping[str, tuple[int, ...] | np.ndarray], seed: int = 0) -> onnx.ModelProto:
    """Return a model from text, with random initializers of the given shapes, or the given arrays."""
    proto = onnx.parser.parse_model(text if text.lstrip().startswith("<") else f"{HEADER}{text}")
    random = np.random.default_rng(seed)
    for name, given in weights.items():
        array = given if isinstance(given, np.ndarray) else random.normal(0, 0.5, given).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


HEADER = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>\n'


def outputs(model: ir.Model | onnx.ModelProto, seed: int = 7) -> list[np.ndarray]:
    """Run a model on random inputs, which depend on the seed and on their place alone."""
    loaded = models.load(model)
    random = np.random.default_rng(seed)
    feed = {}
    for value in loaded.graph.inputs:
        shape = [n if isinstance(n, int) else 3 for n in (value.shape or ())]
        if value.dtype == ir.DataType.INT64:
            feed[value.name] = random.integers(0, 4, shape)
        else:
            feed[value.name] = random.normal(0, 1, shape).astype(np.float32)
    with open_session(loaded, optimized=False) as session:
        return list(session.run(feed).values())


@pytest.fixture
def agree() -> Callable[..., None]:
    """Assert that two models compute the same."""

    def check(first: ir.Model | onnx.ModelProto, second: ir.Model | onnx.ModelProto, tolerance: float = 1e-5) -> None:
        for a, b in zip(outputs(first), outputs(second), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(a).max()))

    return check
