from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

import onnxopt
from onnxopt.cli import cli

CAPTURES = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1, "ai.onnx.ml" : 3]>
    g (float[n, 4] x, bool choose) => (float[n, 4] y) <float[4] bias = {1, 2, 3, 4}, float[4] unused = {0, 0, 0, 0}> {
        a = Relu(x)
        b = local.twice(a)
        c = If(choose) <
            then_branch = t () => (float[n, 4] u) { v = Mul(b, a)  u = Add(v, bias) },
            else_branch = e () => (float[n, 4] w) { w = Sub(b, bias) }
        >
        d = Tanh(c)
        y = Neg(d)
    }
    <domain: "local", opset_import: ["" : 17]>
    twice (p) => (q) { q = Add(p, p) }
    <domain: "local", opset_import: ["" : 17]>
    idle (p) => (q) { q = Neg(p) }
"""
"""Two bodies that read values and a constant from around them, and a function."""

RESIDUAL = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 32] x) => (float[n, 8] y) {
        s = MatMul(x, w_stem)
        a1 = MatMul(s, w0)
        r1 = Relu(a1)
        h1 = Add(s, r1)
        a2 = MatMul(h1, w1)
        r2 = Relu(a2)
        h2 = Add(h1, r2)
        a3 = MatMul(h2, w2)
        r3 = Relu(a3)
        h3 = Add(h2, r3)
        y = MatMul(h3, w_head)
    }
"""


def with_weights(text: str, seed: int = 0, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Return a parsed model with drawn weights."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 6, name)
        )
    return proto


def residual(seed: int = 0) -> onnx.ModelProto:
    """Return a network of a stem, three residual blocks and a head."""
    blocks = {f"w{i}": (32, 32) for i in range(3)}
    return with_weights(RESIDUAL, seed, w_stem=(32, 32), w_head=(32, 8), **blocks)


@pytest.fixture
def capturing() -> ir.Model:
    return onnxopt.load(onnx.parser.parse_model(CAPTURES))


@pytest.fixture
def capturing_text() -> str:
    return CAPTURES


@pytest.fixture
def weighted() -> Callable[..., onnx.ModelProto]:
    return with_weights


@pytest.fixture
def network() -> Callable[[int], ir.Model]:
    return lambda seed=0: onnxopt.load(residual(seed))


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Return a way to call the command line in this process."""

    def call(*args: object) -> Result:
        words = [os.fspath(a) if isinstance(a, Path) else str(a) for a in args]
        return CliRunner(env={"COLUMNS": "100"}).invoke(cli, words, prog_name="onnxopt")

    return call
