"""Weights that nodes compute from constants alone, in ways that channels are not followed through.

A convolution with standardized weights, exported as it is trained, divides each filter by its deviation: whatever is
summed up to get there would freeze the input channels. Once the result is stored, they are as free as any.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxopt.analysis.evaluation import NotComputableError, compute
from onnxopt.contract import Evaluate
from onnxopt.graph import (
    RANDOM_OPS,
    STANDARD_DOMAINS,
    bodies,
    constant_tensor,
    drop_unused_constants,
    has_references,
    is_op,
    named,
    remove_node,
    scopes,
    use_count,
)
from onnxopt.numeric.kernels import TooLargeError

_LARGEST = 1 << 28
"""Bytes of a weight that is computed."""
_PLAIN = (
    *("Cast", "Constant", "ConstantOfShape", "Expand", "Flatten", "Identity"),
    *("Reshape", "Squeeze", "Transpose", "Unsqueeze"),
)
"""What channels are followed through, or what makes a weight larger than what it is made of."""
_QUANTIZATION = ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")


def computed_weights(model: ir.Model) -> list[ir.Value]:
    """Return the floating-point values that are computed from constants alone and used with others, in order."""
    found = []
    for scope in scopes(model):
        if scope.function is not None:
            continue
        settled: dict[ir.Value, bool] = {}  # whether more than plain nodes make it
        for node in scope.graph:
            if not _computable(node) or not all(v is None or v in settled or constant_tensor(v) for v in node.inputs):
                continue
            more = not is_op(node, *_PLAIN) or any(settled.get(v, False) for v in node.inputs if v is not None)
            settled.update((output, more) for output in node.outputs)
        for value, more in settled.items():
            inside = all(set(use.node.outputs) <= settled.keys() for use in value.uses())
            if more and not inside and not value.is_graph_output():
                found.append(value)
    return found


def _computable(node: ir.Node) -> bool:
    if node.domain not in STANDARD_DOMAINS or has_references(node) or any(bodies(node)):
        return False
    return node.op_type not in RANDOM_OPS and not is_op(node, *_QUANTIZATION)


def store_computed(model: ir.Model, values: list[ir.Value], evaluate: Evaluate) -> None:
    """Put constants of the same names in the place of values that are computed from constants alone.

    A value that cannot be computed, or is larger than a weight, stays.
    """
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    for value in values:
        for node in _makers(value):
            try:
                arrays = compute(node, opset, evaluate, _LARGEST)
            except (NotComputableError, TooLargeError):
                break
            _store(node, [ir.tensor(array) for array in arrays])


def _makers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that a value is computed by, what they need first."""
    found: dict[ir.Node, None] = {}
    pending = [(value.producer(), False)]
    while pending:
        node, ready = pending.pop()
        if node is None or node in found or is_op(node, "Constant"):
            continue
        if ready:
            found[node] = None
            continue
        pending.append((node, True))
        pending += [(v.producer(), False) for v in node.inputs if v is not None]
    yield from found


def _store(node: ir.Node, tensors: list[ir.TensorProtocol]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph), "functions were left out"
    inputs = [v for v in dict.fromkeys(node.inputs) if v is not None]
    stored = []
    for old, tensor in zip(node.outputs, tensors, strict=True):
        if use_count(old):
            new = ir.Value(const_value=named(tensor, old.name or ""))
            new.name, new.type, new.shape = old.name, ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())

            old.replace_all_uses_with(new)
            stored.append(new)
    remove_node(node)
    for new in stored:
        graph.register_initializer(new)
    drop_unused_constants(inputs)
