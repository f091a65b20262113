"""Samples out of a function of the user's, which yields dicts."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError
from onnxopt.inputs.data import Data, Feed
from onnxopt.inputs.slots import Slot, check_names, converted, fits, stored_dtype


def from_function(text: str, slots: Mapping[str, Slot]) -> Data:
    """Take samples from a function of the user's.

    Raises:
        DataError: If it cannot be imported, or its first sample does not fit.
    """
    module_name, _, name = text.partition(":")
    with _current_folder_importable(), _users_errors(f"{text}: importing the module"):
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{text}: the module {module_name} has no function {name}.")

    def samples() -> Iterator[Feed]:
        found = _called(text, function)
        for number in itertools.count():
            sample = _next(text, found)
            if sample is None:
                return
            yield _checked(f"{text}, sample {number}", sample, slots)

    if next(samples(), None) is None:
        raise DataError(f"{text} yields no samples.")
    return Data(text, samples, lambda: sum(1 for _ in samples()))


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Let imports find modules of the current folder, as `python -m` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _called(text: str, function: Callable[[], Any]) -> Iterator[Any]:
    with _current_folder_importable(), _users_errors(text):
        return iter(function())


def _next(text: str, samples: Iterator[Any]) -> Any:
    with _current_folder_importable(), _users_errors(text):
        return next(samples, None)


@contextlib.contextmanager
def _users_errors(text: str) -> Iterator[None]:
    """Name the user's function when it raises; the cause keeps the traceback."""
    try:
        yield
    except Exception as error:  # it is the user's own code, which may raise anything
        raise DataError(f"{text} raised {type(error).__name__}: {error}") from error


def _checked(where: str, sample: Any, slots: Mapping[str, Slot]) -> Feed:
    """Return a sample of the user's function as a feed.

    Raises:
        DataError: If it is no dict, lacks an input, has an unknown one, or a value does not fit.
    """
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: a dict of input names and arrays is expected, not {type(sample).__name__}.")
    check_names(where, sample, slots)
    missing = [s for s in slots.values() if s.required and sample.get(s.name) is None]
    if missing:
        raise DataError(f'{where}: there is no value for the input "{missing[0].name}" ({missing[0].text}).')
    return {key: _checked_value(f'{where}, input "{key}"', value, slots[key]) for key, value in sample.items()}


def _checked_value(where: str, value: Any, slot: Slot) -> Any:
    if value is None or slot.kind == "other":
        return value
    if slot.kind == "sequence":
        if not isinstance(value, (list, tuple)):
            raise DataError(f"{where}: a list of arrays is expected.")
        return [_checked_array(where, np.asarray(element), slot) for element in value]
    return _checked_array(where, np.asarray(value), slot)


def _checked_array(where: str, array: np.ndarray, slot: Slot) -> np.ndarray:
    if array.dtype == object and slot.dtype == ir.DataType.STRING:
        return array
    if stored_dtype(array.dtype, slot) is None:
        raise DataError(f"{where}: {array.dtype} cannot be converted to {slot.dtype.name.lower()} safely.")
    if not fits(array.shape, slot.shape):
        raise DataError(f"{where}: an array of shape {list(array.shape)} does not fit {slot.text}.")
    return converted(array, slot, where)
