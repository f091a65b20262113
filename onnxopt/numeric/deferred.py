"""Tensors computed when they are read, so that new weights of a large model never lie in memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

EAGER_BYTES = 1 << 18
"""Tensors up to this size are computed at once: keeping them costs less than computing them again."""


def tensor(compute: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int], name: str) -> ir.TensorProtocol:
    """Return a tensor whose elements are computed each time they are asked for.

    Args:
        compute: Returns the elements; called again for each reader, so it must always return the same.
        dtype: Their type.
        shape: The tensor's shape.
        name: The tensor's name.
    """

    def made() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(compute()), dtype=dtype, shape=ir.Shape(shape), name=name)

    lazy = ir.LazyTensor(made, dtype, ir.Shape(shape), name=name)
    return made() if lazy.nbytes <= EAGER_BYTES else lazy
