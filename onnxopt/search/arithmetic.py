"""How the processor at hand adds up products of 8-bit integers."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Evaluate
from onnxopt.runtime import evaluate_node

DEPTH = 64
"""Length of the sums, enough for every kernel to take its usual way."""
ROWS = COLUMNS = 16


def overflows(evaluate: Evaluate) -> bool:
    """Return whether sums of 8-bit products come out too small, because pairs of them are added in 16 bits.

    x86-64 processors without VNNI instructions do that.

    Args:
        evaluate: Computes a node with the runtime that models are run in.
    """
    a = np.full((ROWS, DEPTH), 255, np.uint8)
    b = np.full((DEPTH, COLUMNS), 127, np.int8)
    values = [ir.val(name, type=ir.TensorType(dtype)) for name, dtype in (("a", _U8), ("b", _S8))]
    node = ir.node("MatMulInteger", values, outputs=[ir.val("y", type=ir.TensorType(ir.DataType.INT32))])
    found = evaluate(node, [a, b], 13)
    return found is not None and not bool((found[0] == 255 * 127 * DEPTH).all())


_U8, _S8 = ir.DataType.UINT8, ir.DataType.INT8


@functools.cache
def overflows_here() -> bool:
    """Return whether it is so on this machine.

    Raises:
        RuntimeFailure: If ONNX Runtime is missing.
    """
    return overflows(evaluate_node)
