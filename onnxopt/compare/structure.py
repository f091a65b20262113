"""Is a model well formed, and can it take the place of another: names, types and order of inputs and outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from onnxopt.proto.encode import encode

Level = Literal["full", "basic", "none"]
"""What of the ONNX checker a model passes: everything with type and shape inference, the rules alone, nothing."""

_INLINE_BYTES = 1024
"""Tensors up to this size stay in the proto that is checked: shapes, axes and the like decide other shapes."""

_INLINE_INTEGER_BYTES = 1 << 16
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_WEIGHTS = "weights"

_OLDEST_IR_VERSION = 4
"""From this IR version on initializers need not be graph inputs as well, and loading takes them out."""


def checker_level(model: ir.Model) -> Level:
    """Return what of the ONNX checker the model passes."""
    proto = weightless(model)
    if not _check(proto, full=True):
        return "full"
    return "none" if _check(proto, full=False) else "basic"


def checker_complaint(model: ir.Model, level: Level = "full") -> str:
    """Return what the ONNX checker says against a model, empty when nothing; weights are not looked at."""
    return "" if level == "none" else _check(weightless(model), full=level == "full")


def weightless(model: ir.Model) -> onnx.ModelProto:
    """Return the model as a proto in which large tensors point to a file called "weights" that need not exist.

    No weight is read, so models of any size can be checked.
    """
    return encode(model, _leave_out, oldest_ir_version=_OLDEST_IR_VERSION)


def signature_change(reference: ir.Model, candidate: ir.Model) -> str:
    """Return how inputs, outputs or overridable initializers differ, in words; empty when they do not."""
    before, after = reference.graph, candidate.graph
    return (
        _values_change("input", before.inputs, after.inputs)
        or _values_change("output", before.outputs, after.outputs)
        or _overridable_change(before, after)
    )


def same_inputs(reference: ir.Model, candidate: ir.Model) -> bool:
    """Whether what was fed to one model can be fed to the other."""
    return not _values_change("input", reference.graph.inputs, candidate.graph.inputs)


def _values_change(what: str, before: Sequence[ir.Value], after: Sequence[ir.Value]) -> str:
    names, new_names = [v.name for v in before], [v.name for v in after]
    if names != new_names:
        missing = [n for n in names if n not in new_names]
        added = [n for n in new_names if n not in names]
        if missing:
            return f'the {what} "{missing[0]}" is missing'
        if added:
            return f'there is a new {what}, "{added[0]}"'
        return f"the {what}s are in another order: {', '.join(map(str, new_names))}"
    for one, two in zip(before, after, strict=True):
        if one.type != two.type:
            return f'the {what} "{one.name}" is declared as {_type(two)} instead of {_type(one)}'
        if not _same_shape(one.shape, two.shape):
            return (
                f'the {what} "{one.name}" is declared with the shape {_shape(two.shape)} instead of {_shape(one.shape)}'
            )
    return ""


def _overridable_change(before: ir.Graph, after: ir.Graph) -> str:
    for value in before.inputs:
        if value.name in before.initializers and value.name not in after.initializers:
            return f'the input "{value.name}" has lost its default value'
        if value.name not in before.initializers and value.name in after.initializers:
            return f'the input "{value.name}" has become optional'
    return ""


def _type(value: ir.Value) -> str:
    return str(value.type).lower()


def _same_shape(one: ir.Shape | None, two: ir.Shape | None) -> bool:
    if one is None or two is None:
        return one is two
    return _dims(one) == _dims(two)


def _dims(shape: ir.Shape) -> list[int | str | None]:
    return [d if isinstance(d, int) else d.value for d in shape]


def _shape(shape: ir.Shape | None) -> str:
    if shape is None:
        return "(none)"
    return "[" + ", ".join("?" if d is None else str(d) for d in _dims(shape)) + "]"


def _check(proto: onnx.ModelProto, *, full: bool) -> str:
    """Return the checker's complaint in one line, or an empty string."""
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
        # the checker asks whether external files exist, and looks for them next to the model
        path = Path(folder) / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        (Path(folder) / _WEIGHTS).touch()
        try:
            onnx.checker.check_model(str(path), full_check=full)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return " ".join(str(error).split())
    return ""


def _is_large(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype == ir.DataType.STRING:
        return False
    return tensor.nbytes > (_INLINE_INTEGER_BYTES if tensor.dtype in _INTEGERS else _INLINE_BYTES)


def _leave_out(target: onnx.TensorProto, tensor: ir.TensorProtocol, initializer: bool) -> bool:
    """Put a reference to a file in the place of large data (an `encode.Place`)."""
    if not _is_large(tensor):
        return False
    target.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", _WEIGHTS), ("offset", "0"), ("length", str(tensor.nbytes))):
        target.external_data.add(key=key, value=value)
    return True
