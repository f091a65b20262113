"""A model in real numbers whose parameters are stored in floating point: what it computes, whatever it is stored in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.graph import Names, Scope, add_constant, copied, first_output, remove_node, replace_value, scopes
from onnxopt.rewrite import Builder
from onnxopt.transfer.fit import is_lossy, is_narrow
from onnxopt.transfer.layers import read_layer
from onnxopt.transfer.skeleton import Operand, Skeleton
from onnxopt.transfer.tensors import Store
from onnxopt.transfer.trace import Tracer
from onnxopt.transfer.view import Viewer

_OF_BLOCKS = ("MatMulNBits", "GatherBlockQuantized")


def widened(skeleton: Skeleton) -> ir.Model:
    """Return the real model with parameters of layers stored as wide as they are computed with.

    Where the runtime finds integers it multiplies integers, or rounds what they are multiplied by. Names of values are
    those of the real model, which is returned itself where nothing is stored in fewer bits.
    """
    if not is_lossy(skeleton):
        return skeleton.model
    viewer = Viewer(copied(skeleton.real.original), skeleton.real.limits)
    layers = viewer.view().layers
    model = viewer.real.model
    names, owners = Names(model), {s.graph: s for s in scopes(model)}
    for operand in dict.fromkeys(o for g in layers for o in g.operands):
        node = operand[0]
        assert isinstance(node.graph, ir.Graph), "it is used"
        if node.op_type not in _OF_BLOCKS:
            _widen(operand, owners[node.graph], names, viewer.tracer)
    for node in dict.fromkeys(o[0] for g in layers for o in g.operands):
        if node.op_type in _OF_BLOCKS:
            assert isinstance(node.graph, ir.Graph), "it is used"
            _unpack(node, Builder(owners[node.graph], names, node, first_output(node)), viewer.tracer)
    return model


def _widen(operand: Operand, scope: Scope, names: Names, tracer: Tracer) -> None:
    node, index = operand
    value = node.inputs[index]
    tensor = tracer.tensor(value)
    if value is None or tensor is None or not is_narrow(tensor):
        return
    dtype = tracer.shapes.dtype(value) or ir.DataType.FLOAT
    array = np.ascontiguousarray(tensor.read(Store()), dtype.numpy())
    node.replace_input_with(index, add_constant(scope, names, f"{value.name}/wide", array, node))


def _unpack(node: ir.Node, builder: Builder, tracer: Tracer) -> None:
    layer = read_layer(node, tracer, ())
    assert layer is not None
    assert layer.weight is not None
    weight = builder.constant("wide", np.ascontiguousarray(layer.weight.read(Store()), np.float32))
    if node.op_type == "MatMulNBits":
        new = builder.op("MatMul", [node.inputs[0], weight])
        if layer.members:
            new = builder.op("Add", [new, node.inputs[5]])
    else:
        new = builder.op("Gather", [weight, node.inputs[1]])
    old = node.outputs[0]
    name = old.name
    replace_value(old, new)
    old.name, new.name = f"{name}/narrow", name
    remove_node(node)
