"""Where files refer to values by their names, outside of the graph itself."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from onnxopt.proto.keys import ANNOTATIONS
from onnxopt.proto.tensors import SparseTensor

OF_VALUE = "quant_parameter_tensor_names"
"""Where onnx_ir keeps the quantization annotation of a value when it reads a model by itself."""


def has_quantization_annotations(graph: ir.Graph) -> bool:
    """Whether a graph notes of a value which others are its scale and its zero point; it names them."""
    made = itertools.chain.from_iterable(node.outputs for node in graph)
    values = itertools.chain(graph.inputs, graph.initializers.values(), made)
    return bool(graph.meta.get(ANNOTATIONS)) or any(OF_VALUE in value.meta for value in values)


def is_sparse(value: ir.Value) -> bool:
    """Whether a weight is stored by its elements that are not 0, under a name of their own."""
    return isinstance(value.const_value, SparseTensor)
