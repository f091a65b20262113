"""What a model is for, as far as its last operators tell."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.analysis.weights import FLOATS
from onnxopt.graph import attribute, is_op

_PASSED = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Dropout")
"""Operators that leave the classes where they are."""

_LINEAR = ("Gemm", "MatMul")

_SOFTMAX = ("Softmax", "LogSoftmax")

_FEWEST_SYMBOLS = 10
"""Scores of fewer classes are hardly those of digits or letters."""


def class_scores(model: ir.Model) -> str | None:
    """Return the operator that makes the main output scores of classes, or None where it holds something else.

    The main output is the first floating-point one. It holds scores when a Softmax along the last axis or a linear
    layer makes it, and its last axis, as far as that is known, has two elements or more.
    """
    value = main_output(model)
    if value is None or not _wide(value):
        return None
    node = _behind(value, *_PASSED)
    if node is None:
        return None
    if is_op(node, *_SOFTMAX):
        return node.op_type if _along_the_last(node) else None
    if _spelled_out(node):
        return "Softmax"
    if is_op(node, "Add"):
        node = next((v.producer() for v in node.inputs if v is not None and is_op(v.producer(), "MatMul")), None)
    return node.op_type if node is not None and is_op(node, *_LINEAR) else None


def reads_sequences(model: ir.Model) -> bool:
    """Return whether the model looks like a reader of text or speech, trained by connectionist temporal classification.

    Such a one makes a Softmax over many classes, step by step, out of pictures or sound, and nothing else: detectors
    have boxes besides, language models start from words.
    """
    value = main_output(model)
    if class_scores(model) not in _SOFTMAX or value is None or len(model.graph.outputs) > 1:
        return False
    if value.shape is None or len(value.shape) != 3:
        return False
    symbols = value.shape[-1]
    fed = [v for v in model.graph.inputs if not v.is_initializer()]
    seen = all(v.dtype in FLOATS and v.shape is not None and len(v.shape) > 2 for v in fed)
    return seen and isinstance(symbols, int) and symbols >= _FEWEST_SYMBOLS


def main_output(model: ir.Model) -> ir.Value | None:
    """Return the first floating-point output."""
    return next((v for v in model.graph.outputs if v.dtype in FLOATS), None)


def _wide(value: ir.Value) -> bool:
    if value.shape is None:
        return True
    if len(value.shape) == 0:
        return False
    last = value.shape[-1]
    return not isinstance(last, int) or last >= 2


def _spelled_out(node: ir.Node) -> bool:
    """Return whether a node ends exp(x) / sum(exp(x))."""
    if not is_op(node, "Div") or None in node.inputs:
        return False
    numerator, denominator = node.inputs
    assert numerator is not None and denominator is not None
    total = _behind(denominator, *_PASSED, "Expand")
    if total is None or not is_op(total, "ReduceSum"):
        return False
    return is_op(numerator.producer(), "Exp") and total.inputs[0] is numerator


def _behind(value: ir.Value, *passed: str) -> ir.Node | None:
    """Return the node that makes a value, before operators of these types."""
    node = value.producer()
    while node is not None and is_op(node, *passed):
        inner = node.inputs[0]
        node = None if inner is None else inner.producer()
    return node


def _along_the_last(node: ir.Node) -> bool:
    axis = attribute(node, "axis", -1)
    shape = node.outputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)
