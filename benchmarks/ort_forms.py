"""The forms in integers that ONNX Runtime's own quantization tools make of a model, with their defaults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

from onnxopt.feeds import Feed


class _Reader(CalibrationDataReader):
    """Samples, one at a time."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._left: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        """Return the next sample; None at the end."""
        return next(self._left, None)


def dynamic(source: Path, target: Path, feeds: Iterable[Feed]) -> None:
    """Write the form of `quantize_dynamic`."""
    quantize_dynamic(source, target)


def qdq(source: Path, target: Path, feeds: Iterable[Feed]) -> None:
    """Write the form of `quantize_static` with pairs of QuantizeLinear and DequantizeLinear, which is its default."""
    quantize_static(source, target, _Reader(feeds))


def qoperator(source: Path, target: Path, feeds: Iterable[Feed]) -> None:
    """Write the form of `quantize_static` with operators on integers."""
    quantize_static(source, target, _Reader(feeds), quant_format=QuantFormat.QOperator)


Make = Callable[[Path, Path, Iterable[Feed]], None]

FORMS: dict[str, Make] = {"ort dynamic": dynamic, "ort QDQ": qdq, "ort QOperator": qoperator}


def made(name: str, source: Path, target: Path, feeds: Iterable[Feed]) -> str:
    """Write a form of a model, and return why it cannot be had; empty when it can."""
    logging.getLogger().setLevel(logging.ERROR)  # each says that the model was not prepared, which is its default too
    try:
        FORMS[name](source, target, feeds)
    except Exception as error:  # the tools raise whatever went wrong in them, which is printed
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    return ""
