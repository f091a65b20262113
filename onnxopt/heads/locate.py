"""Finds the head of a classifier: the last linear layer, what it takes, and what comes after it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.task import main_output
from onnxopt.graph import attribute, constant_array, constant_tensor, has_references, is_op, only_use

KEPT = frozenset(
    {"Softmax", "LogSoftmax", "Identity", "Cast", "Dropout", "Flatten", "Reshape", "Squeeze", "Exp", "ReduceSum",
     "ReduceMax", "Max", "Expand", "Sub", "Div", "ArgMax"}
)  # fmt: skip
"""What may follow a head and works with any number of classes."""

POOLS = frozenset({"GlobalAveragePool", "ReduceMean"})
"""Means over positions, which commute with a linear layer per position."""

BYPASSED = frozenset({"Relu", "QuantizeLinear", "DequantizeLinear"})
"""What fitted the scores of the old classes, and would clip those of the new ones."""

_LINEAR = ("Gemm", "MatMul", "Conv")
_MOST_TAIL = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """The last linear layer of a classifier.

    Attributes:
        node: Gemm, MatMul or Conv.
        bias: The Add behind a MatMul; None where there is none.
        features: What the layer takes.
        scores: What it gives, bias included.
        classes: How many classes it tells apart.
        tail: Everything that depends on the scores, in graph order.
        between: The operators between the scores and the main output.
        outputs: The graph outputs that depend on the scores.
    """

    node: ir.Node
    bias: ir.Node | None
    features: ir.Value
    scores: ir.Value
    classes: int
    tail: tuple[ir.Node, ...]
    between: frozenset[str]
    outputs: tuple[ir.Value, ...]

    @property
    def pooled(self) -> bool:
        """Whether a mean over positions follows."""
        return bool(self.between & POOLS)

    @property
    def activation(self) -> str:
        """What the main output holds: "Softmax", "LogSoftmax", "Sigmoid", or "" for scores as they are."""
        for name in ("LogSoftmax", "Softmax", "Sigmoid"):
            if name in self.between:
                return name
        return "Softmax" if self.between >= {"Exp", "Div"} else ""


def find_head(model: ir.Model) -> Head | str:
    """Return the head that makes the main output, or why there is none that could be replaced."""
    output = main_output(model)
    if output is None:
        return "the model has no floating-point output"
    found = _linear_before(output)
    if isinstance(found, str):
        return found
    node, bias, between = found
    features, scores = node.inputs[0], (bias or node).outputs[0]
    assert features is not None
    tail = _tail(scores, model.graph)
    if isinstance(tail, str):
        return tail
    ends = [v for n in tail for v in n.outputs if v.is_graph_output()]
    outputs = ([scores] if scores.is_graph_output() else []) + ends
    return Head(node, bias, features, scores, _classes(node), tail, between, tuple(outputs))


def _linear_before(output: ir.Value) -> tuple[ir.Node, ir.Node | None, frozenset[str]] | str:
    """Return the one linear layer that all paths to an output come through, the Add behind it, and what follows."""
    pending, seen = [output], set[ir.Node]()
    found: dict[ir.Node, ir.Node | None] = {}
    while pending:
        node = pending.pop().producer()
        if node is None or len(seen) > _MOST_TAIL:
            return f'no linear layer of its own makes the output "{output.name}"'
        if node in seen or node in found:
            continue
        product = _bias(node)
        linear = node if product is None else product
        if is_layer(linear):
            found[linear] = None if product is None else node
            continue
        if not (is_op(node, *KEPT, *POOLS, *BYPASSED, "Sigmoid")):
            return f'the output "{output.name}" comes from {node.op_type}, not from a linear layer'
        seen.add(node)
        inputs = node.inputs if is_op(node, "Sub", "Div", "Max") else node.inputs[:1]
        pending.extend(v for v in inputs if v is not None and not (is_op(node, "Max") and _is_fixed(v)))
    if len(found) != 1:
        return f'the output "{output.name}" comes from {len(found)} linear layers'
    layer, bias = next(iter(found.items()))
    return layer, bias, frozenset(n.op_type for n in seen)


def _bias(node: ir.Node) -> ir.Node | None:
    """Return the MatMul to which a node adds a constant per class, or None."""
    if not is_op(node, "Add") or len(node.inputs) != 2:
        return None
    for value, constant in (node.inputs, tuple(reversed(node.inputs))):
        product = value.producer() if value is not None else None
        if product is None or not is_op(product, "MatMul") or only_use(product.outputs[0]) is not node:
            continue
        array = constant_array(constant)
        if array is not None and array.size == (array.shape[-1] if array.ndim else 1):
            return product
    return None


def is_layer(node: ir.Node) -> bool:
    """Return whether a node is a linear layer whose weight does not depend on the inputs of the model."""
    if not is_op(node, *_LINEAR) or has_references(node) or len(node.inputs) < 2 or node.inputs[0] is None:
        return False
    if not all(_is_fixed(v) for v in node.inputs[1:] if v is not None) or _is_fixed(node.inputs[0]):
        return False
    if is_op(node, "Gemm"):
        return not attribute(node, "transA", 0)
    return attribute(node, "group", 1) == 1 if is_op(node, "Conv") else _classes(node) > 0


def _is_fixed(value: ir.Value | None, depth: int = 8) -> bool:
    """Return whether a value comes from constants alone, as the weight of a quantized layer does."""
    if value is None or constant_tensor(value) is not None:
        return True
    node = value.producer()
    return node is not None and depth > 0 and all(_is_fixed(v, depth - 1) for v in node.inputs) and bool(node.inputs)


def _classes(node: ir.Node) -> int:
    """Return how many classes a layer has; 0 where its weight does not tell."""
    sizes = weight_shape(node)
    if not sizes or (is_op(node, "MatMul") and len(sizes) != 2):
        return 0
    first = is_op(node, "Conv") or (is_op(node, "Gemm") and attribute(node, "transB", 0))
    return sizes[0] if first else sizes[-1]


def weight_shape(node: ir.Node) -> tuple[int, ...]:
    """Return the sizes of a layer's weight, 0 for those that are not known; empty when none is."""
    weight = node.inputs[1]
    source, order = weight, None
    if weight is not None and weight.shape is None and is_op(weight.producer(), "Transpose"):
        transpose = weight.producer()
        assert transpose is not None
        source, order = transpose.inputs[0], attribute(transpose, "perm")
    tensor = constant_tensor(source)
    shape = tensor.shape if tensor is not None else source.shape if source is not None else None
    sizes = tuple(d if isinstance(d, int) else 0 for d in shape or ())
    if source is weight:
        return sizes
    return tuple(sizes[i] for i in order or reversed(range(len(sizes))))


def _tail(scores: ir.Value, graph: ir.Graph) -> tuple[ir.Node, ...] | str:
    """Return everything that depends on the scores, in graph order, or what of it does not work with other classes."""
    pending, found = [scores], set[ir.Node]()
    while pending:
        for node, index in pending.pop().uses():
            if node.graph is not graph:
                return f'the scores "{scores.name}" are used within a branch or loop'
            if not is_op(node, *KEPT, *POOLS, *BYPASSED, "Sigmoid") or (index and not is_op(node, "Sub", "Div", "Max")):
                return f'the scores "{scores.name}" also go into {node.op_type}'
            if node not in found:
                found.add(node)
                pending.extend(node.outputs)
    return tuple(n for n in graph if n in found)


def reshaped(node: ir.Node, old: int, new: int) -> np.ndarray | None:
    """Return the target of a Reshape or Expand for another number of classes; None when it may stay.

    Raises:
        ValueError: If the old number of classes is in it in a way that cannot be told.
    """
    target = constant_array(node.inputs[1])
    if target is None or old not in target:
        return None
    if int((target == old).sum()) != 1:
        raise ValueError(f"the {node.op_type} {node.name} has the number of classes more than once")
    return np.where(target == old, new, target).astype(np.int64)
