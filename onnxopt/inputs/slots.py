"""What a model's inputs take: whether an array fits, and how it becomes the input's element type."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError
from onnxopt.inputs.axes import Axes, Axis, Kind
from onnxopt.registry import nearest


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """An input that data has to fill.

    Attributes:
        name: Its name.
        dtype: Element type.
        shape: A size or an axis per axis; None when the rank is not known.
        kind: "tensor", "sequence" or "other".
        required: Whether every sample needs a value for it.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int | Axis, ...] | None
    kind: str
    required: bool

    @property
    def text(self) -> str:
        """Its element type and shape, for messages."""
        dims = ["..."] if self.shape is None else [str(axis) for axis in self.shape]
        return f"{self.dtype.name.lower()} [{', '.join(dims)}]"

    @property
    def rows(self) -> int | None:
        """How many rows one sample takes along the first axis; None when that axis does not count samples."""
        if not self.shape:
            return None
        first = self.shape[0]
        if isinstance(first, int):
            return first
        counts = first.kind is Kind.BATCH or (first.kind is Kind.COUNT and len(self.shape) > 1)
        return 1 if counts else None


def slots_of(model: ir.Model) -> dict[str, Slot]:
    """Return what each input of a model takes."""
    axes = Axes(list(model.graph.inputs))
    slots = {}
    for value in model.graph.inputs:
        name = value.name or ""
        kind: Any = value.type
        optional = isinstance(kind, ir.OptionalType)
        kind = kind.elem_type if isinstance(kind, ir.OptionalType) else kind
        form = (
            "tensor"
            if isinstance(kind, ir.TensorType)
            else "sequence"
            if isinstance(kind, ir.SequenceType)
            else "other"
        )
        slots[name] = Slot(
            name,
            value.dtype or ir.DataType.UNDEFINED,
            axes.shapes[name] if value.shape is not None else None,
            form,
            not optional and not value.is_initializer(),
        )
    return slots


def check_names(where: str, names: Iterable[Any], slots: Mapping[str, Slot]) -> None:
    """Raise where a name is no input of the model."""
    for name in names:
        if name not in slots:
            raise DataError(
                f'{where}: the model has no input "{name}".{nearest(str(name), list(slots))} Its inputs are '
                f"{', '.join(slots) or 'none'}."
            )


def fits(shape: Sequence[int], expected: Sequence[int | Axis] | None) -> bool:
    """Return whether an array of this shape can be the input; one of unknown rank takes any."""
    if expected is None:
        return True
    return len(shape) == len(expected) and all(
        isinstance(want, Axis) or want == got for got, want in zip(shape, expected, strict=True)
    )


def stored_dtype(dtype: np.dtype[Any], slot: Slot) -> np.dtype[Any] | None:
    """Return what the elements of an array are, None when they cannot become the input's.

    Floats may lose precision; integers may get narrower when their values allow it, which reading checks.
    """
    if slot.dtype == ir.DataType.STRING:
        return dtype if dtype.kind in "US" else None
    target = slot.dtype.numpy()
    if dtype.kind == "V" and not dtype.names and dtype.itemsize == target.itemsize and target.kind == "V":
        # numpy stores the types of ml_dtypes as raw bytes.
        return target
    floats = _is_float(dtype) and slot.dtype.is_floating_point()
    integers = dtype.kind in "iu" and slot.dtype.is_integer()
    return dtype if floats or integers or np.can_cast(dtype, target, "safe") else None


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def converted(array: np.ndarray, slot: Slot, where: object) -> np.ndarray:
    """Return an array with the element type of its input.

    Raises:
        DataError: If an integer does not fit the type.
    """
    if slot.dtype == ir.DataType.STRING:
        return np.char.decode(array, "utf-8").astype(object) if array.dtype.kind == "S" else array.astype(object)
    target = slot.dtype.numpy()
    if array.dtype == target:
        return array
    if array.dtype.kind == "V":
        return array.view(target)
    if array.dtype.kind in "iu" and slot.dtype.is_integer() and array.size:
        low, high = int(slot.dtype.min), int(slot.dtype.max)
        if int(array.min()) < low or int(array.max()) > high:
            raise DataError(f"{where}: values outside {low} to {high} do not fit {slot.text}.")
    # Too large a number becomes infinite; numpy would warn.
    with np.errstate(over="ignore"):
        return array.astype(target)
