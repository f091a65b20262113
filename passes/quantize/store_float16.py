"""Store float32 weights in 16 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import Names, Scope, drop_unused_constants, is_op, scopes, use_count
from onnxopt.numeric import deferred
from onnxopt.numeric.blocks import blocks
from onnxopt.rewrite import Builder

Array = npt.NDArray[Any]

TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
ARRAYS: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
OPSETS = {"float16": 6, "bfloat16": 13}
"""From these on Cast takes the type, and names it by a number."""

WORST_LOSS = {"float16": 1e-3, "bfloat16": 8e-3}
"""The norm of the rounding errors by that of the tensor may be twice what rounding normal numbers can cause."""

WORST_LOST = 0.01
"""This share of the elements that are not zero may become zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreFloat16(GraphPass):
    """Store float32 constants in 16 bits, and compute in float32 as before.

    The file shrinks to half. A Cast restores each constant; ONNX Runtime computes it when it loads the model, so that
    what runs is the same and as fast. It works for everything that is a constant: weights, tables, and the scales of
    weights that were quantized before.

    Attributes:
        dtype: "float16" keeps 11 bits of precision, and is refused where a tensor exceeds its range of 6e-8 to 65504.
            "bfloat16" has the range of float32 and 8 bits of precision; it needs opset 13.
        min_elements: Tensors with fewer elements stay as they are.
    """

    name: ClassVar[str] = "store-float16"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE

    dtype: Literal["float16", "bfloat16"] = "float16"
    min_elements: int = 1024

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        if self.dtype not in TYPES:
            raise UsageError(f'store-float16: dtype is "{self.dtype}"; use float16 or bfloat16.')
        if self.min_elements < 1:
            raise UsageError(f"store-float16: min_elements is {self.min_elements}; use 1 or more.")

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per tensor."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for value in _constants(scope):
                tensor = _tensor(value)
                if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < self.min_elements:
                    continue
                site = Site(self.name, scope.path, value.name or "")
                reason = self._reason(value, tensor, scope)
                if reason:
                    yield Refusal(site, reason)
                    continue
                sizes = ",".join(str(size) for size in tensor.shape)
                summary = f"float32[{sizes}] stored as {self.dtype}, {tensor.nbytes:,} to {tensor.nbytes // 2:,} bytes"
                yield Edit(site, summary, functools.partial(self._apply, value, tensor, scope, names))

    def _reason(self, value: ir.Value, tensor: ir.TensorProtocol, scope: Scope) -> str:
        """Return why a tensor cannot be stored that way, or nothing."""
        if value.is_graph_input():
            return "it is also an input of the graph, so the caller can override it"
        if value.is_graph_output():
            return "it is an output of the graph"
        if scope.opset < OPSETS[self.dtype]:
            return f"Cast from {self.dtype} needs opset {OPSETS[self.dtype]}, and this graph has {scope.opset}"
        return _loss(tensor.numpy(), self.dtype)

    def _apply(self, value: ir.Value, tensor: ir.TensorProtocol, scope: Scope, names: Callable[[], Names]) -> None:
        constant = value.producer()
        first = constant if constant is not None else next(iter(scope.graph))
        builder = Builder(scope, names(), first, value.name or "constant")
        sizes = tuple(tensor.shape.numpy())
        narrow = deferred.tensor(functools.partial(_narrow, tensor, self.dtype), TYPES[self.dtype], sizes, "")
        stored = builder.tensor(self.dtype, narrow)
        restored = builder.op("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        restored.dtype, restored.shape = ir.DataType.FLOAT, ir.Shape(sizes)
        restored.doc_string = value.doc_string
        restored.metadata_props.update(value.metadata_props)
        value.replace_all_uses_with(restored)
        drop_unused_constants([value])


def _constants(scope: Scope) -> list[ir.Value]:
    """Return the initializers and the outputs of Constant nodes of a graph that something uses, in stable order."""
    inner = [node.outputs[0] for node in scope.graph if is_op(node, "Constant")]
    return [v for v in (*scope.graph.initializers.values(), *inner) if use_count(v)]


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    node = value.producer()
    if node is None:
        return value.const_value
    given = node.attributes.get("value")
    if given is None or given.is_ref():
        return None
    tensor: ir.TensorProtocol = given.as_tensor()
    return tensor


def _narrow(tensor: ir.TensorProtocol, dtype: str) -> Array:
    narrow: Array = tensor.numpy().astype(ARRAYS[dtype])
    return narrow


def _loss(array: Array, dtype: str) -> str:
    """Return why a narrower type cannot hold an array, or nothing. Reads it once, in small pieces."""
    error = total = 0.0
    lost = present = 0
    for index in blocks(array.shape):
        piece = array[index]
        with np.errstate(over="ignore"):
            narrow = piece.astype(ARRAYS[dtype]).astype(np.float32)
        if not np.isfinite(narrow).all():
            return f"a value is too large for {dtype}" if np.isfinite(piece).all() else "it holds NaN or infinity"
        error += float(np.square(narrow - piece, dtype=np.float64).sum())
        total += float(np.square(piece, dtype=np.float64).sum())
        lost += int(np.count_nonzero((narrow == 0) & (piece != 0)))
        present += int(np.count_nonzero(piece))
    if error > WORST_LOSS[dtype] ** 2 * total or lost > WORST_LOST * present:
        return f"its values are so small that {dtype} would lose their precision"
    return ""
