"""Changes of the target: parameters replaced, and the little that its graph may lack to hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graph import Names, Scope, add_constant, constant_tensor, is_op, make_node, scopes
from onnxopt.transfer.real import Real
from onnxopt.transfer.skeleton import Group, Operand
from onnxopt.transfer.tensors import Sliced, Store, Unwritable
from onnxopt.transfer.trace import Tracer

_BIAS_INPUT = {
    ("", "Gemm"): 2,
    ("", "Conv"): 2,
    ("", "ConvTranspose"): 2,
    ("", "LayerNormalization"): 2,
    ("com.microsoft", "FusedConv"): 2,
    ("com.microsoft", "Attention"): 2,
    ("com.microsoft", "DynamicQuantizeMatMul"): 4,
    ("com.microsoft", "MatMulIntegerToFloat"): 6,
    ("com.microsoft", "MatMulNBits"): 5,
    ("com.microsoft", "SkipLayerNormalization"): 3,
}
"""Where operators take a bias that may be left out."""


class Editor:
    """Changes one model, as what is known of its real model asks for."""

    def __init__(self, real: Real) -> None:
        """Take the model and its real model; the former will be changed."""
        self._real = real
        model = real.original
        self._names = Names(model)
        self._scopes: dict[ir.Graph, Scope] = {s.graph: s for s in scopes(model)}
        self._given: set[ir.Node] = set()

    def add_bias(self, group: Group) -> None:
        """Give a layer a bias of zeros; all parts of one operator share it.

        Raises:
            Unwritable: If there is no place for it.
        """
        node, index = group.operands[0]
        if node in self._given:
            return
        own = self._real.operand(node, index)
        width = _width(node, group)
        if own is not None and is_op(own[0], "Conv") and is_op(node, "ConvTranspose") and group.weight is not None:
            # A Conv makes the windows, one place after another.
            width *= int(np.prod(group.weight.shape[2:]))
        bias = np.zeros(width, _float_type(node, group))
        self._given.add(node)
        if own is None:
            # What scales the sums of integers is the last node of the layer, and no other may come in between.
            self._add_after(self._real.value(node.outputs[0]), bias, group)
            return
        node = own[0]
        place = _BIAS_INPUT.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        if place is not None:
            value = add_constant(self._scope(node), self._names, f"{group.name}/bias", bias, node)
            if place >= len(node.inputs):
                node.resize_inputs(place + 1)
            node.replace_input_with(place, value)
            return
        if not is_op(node, "MatMul") and node.op_type != "FusedMatMul":
            raise Unwritable(f"it has no bias to hold that of the source, and {node.op_type} takes none")
        self._add_after(node.outputs[0], bias, group)

    def _add_after(self, output: ir.Value, bias: np.ndarray, group: Group) -> None:
        node = output.producer()
        assert node is not None, "a layer computes it"
        if output.is_graph_output():
            raise Unwritable("it has no bias to hold that of the source, and computes an output of the model")
        scope = self._scope(node)
        value = add_constant(scope, self._names, f"{group.name}/bias", bias, node)
        users = [(use.node, use.idx) for use in output.uses()]
        added = make_node(self._names, "Add", [output, value], like=output)
        scope.graph.insert_after(node, added)
        for user, index in users:
            user.replace_input_with(index, added.outputs[0])

    def unshare(self, operand: Operand, tracer: Tracer) -> None:
        """Give an operand a stored tensor of its own.

        Raises:
            Unwritable: If it is computed from integers.
        """
        node, index = operand
        value = node.inputs[index]
        tensor = tracer.tensor(value)
        if value is None or tensor is None:
            return
        own = self._real.operand(node, index)
        array = tensor.read(Store())
        if own is None or array.dtype.kind not in "fV" or len(list(tensor.leaves())) != 1:
            raise Unwritable("its stored integers are shared with a layer that gets others")
        name = next(tensor.leaves()).name or value.name or "weight"
        node, index = own
        node.replace_input_with(index, add_constant(self._scope(node), self._names, name, np.array(array), node))

    def commit(self, store: Store) -> None:
        """Put what was written into the model."""
        for written, array in store.written.items():
            self._put(self._real.value(written), array)
        for sums in self._real.sums:
            if any(leaf in store.written for factor in sums.product.factors for leaf in factor.leaves()):
                tensor = constant_tensor(sums.scale)
                assert tensor is not None, "it was read before"
                scale = sums.product.read(store).astype(tensor.dtype.numpy())
                self._put(sums.scale, scale.reshape(tuple(tensor.shape.numpy())))

    def _put(self, value: ir.Value, array: np.ndarray) -> None:
        old = value.const_value
        dtype = old.dtype if old is not None else None
        if value.is_initializer():
            value.const_value = ir.tensor(array, dtype=dtype, name=value.name)
            return
        node = value.producer()
        assert node is not None, f"{value.name} is neither an initializer nor computed"
        for name in [n for n in node.attributes if n.startswith("value")]:
            del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, name=value.name))

    def drop_unused(self) -> None:
        """Remove initializers that nothing uses any more."""
        for graph in self._scopes:
            for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
                if not graph.initializers[name].is_graph_input():
                    del graph.initializers[name]

    def _scope(self, node: ir.Node) -> Scope:
        assert isinstance(node.graph, ir.Graph), f"{node.name} is in no graph"
        return self._scopes[node.graph]


def _width(node: ir.Node, group: Group) -> int:
    """Return how many channels the operator has, of which the layer may be a part."""
    if group.weight is None:
        return group.members[0].parts[0].shape[0]
    tensor = group.weight
    while isinstance(tensor, Sliced):
        tensor = tensor.source
    width = tensor.shape[group.channels]
    return width * int(str(group.key[3])) if group.kind == "conv" and group.channels == 1 else width


def _float_type(node: ir.Node, group: Group) -> np.dtype:
    data = node.inputs[0]
    known = data.dtype if data is not None and data.dtype is not None else None
    if known is None and group.weight is not None:
        return group.weight.read(Store()).dtype
    return np.dtype(np.float32) if known is None else np.dtype(known.numpy())


def shared_operands(groups: Sequence[Group], tracer: Tracer) -> list[Operand]:
    """Return the operands of layers that come from a stored tensor which another layer uses too."""
    users: dict[ir.Value, set[Operand]] = {}
    for group in groups:
        for node, index in group.operands:
            tensor = tracer.tensor(node.inputs[index]) if index < len(node.inputs) else None
            for leaf in tensor.leaves() if tensor is not None else ():
                users.setdefault(leaf, set()).add((node, index))
    return [operand for sharing in users.values() if len(sharing) > 1 for operand in sharing]
