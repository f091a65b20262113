"""Takes units out of a model, and makes what the result must equal: the original with zeros in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.coupling.analysis import Coupling
from onnxopt.coupling.builder import Sink
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.rewrites import Mask, Rewrite
from onnxopt.coupling.sizes import with_elements
from onnxopt.graph import (
    Names,
    all_nodes,
    bodies,
    constant_array,
    constant_tensor,
    copied,
    drop_unused_constants,
    insert_before,
    is_op,
    make_node,
    remove_unused,
    scopes,
)


class Removal:
    """Removes units from a model, group by group.

    Attributes:
        model: The model that was analysed; it is changed.
        coupling: The analysis.
    """

    def __init__(self, model: ir.Model, coupling: Coupling, original: ir.Model | None = None) -> None:
        """Remove nothing yet.

        Args:
            model: See above.
            coupling: See above.
            original: What the result is compared with: the model as it was before what it computes from constants was
                stored. None for the model as it is.
        """
        self.model, self.coupling = model, coupling
        self._original = copied(original or model)
        self._tensors = {value: tensor for value in _constants(model) if (tensor := constant_tensor(value)) is not None}
        self._replaced: dict[ir.Value, npt.NDArray[Any]] = {}
        places = {node: index for index, node in enumerate(all_nodes(self._original))}
        self._order = {node: places[other] for node, other in _pairs(model.graph, self._original.graph)}
        self._names = Names(model)
        self._kept: Mask = np.ones(len(coupling.labels), bool)
        self._axis_of = np.repeat(np.arange(len(coupling.axes)), [axis.size for axis in coupling.axes])
        self._place = {(axis.value, axis.axis): axis for axis in coupling.axes}
        self._watching: dict[ir.Value, list[Rewrite]] = defaultdict(list)
        for rewrite in coupling.rewrites:
            for value in rewrite.watch:
                self._watching[value].append(rewrite)

    def remove(self, roots: Ints) -> None:
        """Take units out: slice the constants, and bring shapes and nodes up to date.

        Args:
            roots: The units, by their entries in `Group.roots`.

        Raises:
            ValueError: If nothing would be left of an axis.
        """
        gone = np.isin(self.coupling.labels, roots) & self._kept
        left = self._kept & ~gone
        masks: dict[ir.Value, dict[int, Mask]] = defaultdict(dict)
        for index in np.unique(self._axis_of[gone]):
            axis = self.coupling.axes[index]
            ids = slice(axis.first, axis.first + axis.size)
            if not left[ids].any():
                raise ValueError(f"nothing would be left of axis {axis.axis} of {axis.value.name}")
            masks[axis.value][axis.axis] = left[ids][self._kept[ids]]
        self._kept = left
        for value, own in masks.items():
            _shorten(value, own)
        rewrites = {id(rewrite): rewrite for value in masks for rewrite in self._watching[value]}
        for rewrite in rewrites.values():
            rewrite.apply(self)

    def replace(self, value: ir.Value, array: npt.NDArray[Any]) -> None:
        """Give a constant other numbers, in the original that the result is compared with as well.

        Args:
            value: The constant.
            array: All of its elements, also those that were removed.
        """
        self._replaced[value] = array
        for axis in range(array.ndim):
            if (value, axis) in self._place:
                array = np.compress(self.kept(value, axis), array, axis=axis)
        _set_tensor(value, array, self._tensors[value])

    def whole(self, value: ir.Value) -> npt.NDArray[Any]:
        """Return a constant with all of its elements, also those that were removed."""
        found = self._replaced.get(value)
        return self._tensors[value].numpy() if found is None else found

    @property
    def remaining(self) -> Mapping[str, Mapping[int, Ints]]:
        """Name of each value that became smaller -> its shorter axes -> their original indexes that are still there."""
        found: dict[str, dict[int, Ints]] = defaultdict(dict)
        for index in np.unique(self._axis_of[~self._kept]):
            axis = self.coupling.axes[index]
            found[axis.value.name or ""][axis.axis] = np.flatnonzero(self.kept(axis.value, axis.axis))
        return found

    def zeroed(self) -> ir.Model:
        """Return a clone of the original in which everything that was removed counts as zero; see `without`."""
        return self._zeroed(self._kept)

    def without(self, roots: Ints) -> ir.Model:
        """Return a clone of the original in which units count as zero, those that were removed among them.

        Wherever products are summed up along an axis, the slices of its weight become zero; where there is no
        constant weight, one factor is multiplied by zeros and ones.

        Args:
            roots: The units, by their entries in `Group.roots`.
        """
        return self._zeroed(self._kept & ~np.isin(self.coupling.labels, roots))

    def _zeroed(self, all_kept: Mask) -> ir.Model:
        clone = copied(self._original)
        names = Names(clone)
        nodes = list(all_nodes(clone))
        for constant, array in self._replaced.items():
            tensor = self._tensors[constant]
            for use in constant.uses():
                _exchange(clone, names, nodes[self._order[use.node]], use.idx, tensor, array)
        for sink in self.coupling.sinks:
            value = sink.node.inputs[sink.index]
            assert value is not None, "rules name inputs that are there"
            if (value, sink.axis) not in self._place:
                continue
            place = self._place[value, sink.axis]
            kept = all_kept[place.first : place.first + place.size]
            if not kept.all():
                node = nodes[self._order[sink.node]]
                _zero(clone, names, node, sink.index, self._along(value, sink.axis, kept), _zero_of(node, sink))
        return clone

    def _along(self, value: ir.Value, axis: int, kept: Mask) -> ir.TensorProtocol:
        """Return zeros and ones that a value can be multiplied by, to leave some indexes of an axis."""
        shapes = self.coupling.shapes
        rank = shapes.rank(value)
        assert rank is not None, "only axes of values of known rank are followed"
        dtype = shapes.dtype(value) or ir.DataType.FLOAT
        return ir.tensor(kept.reshape(-1, *[1] * (rank - axis - 1)).astype(dtype.numpy()), dtype=dtype)

    def sizes(self, gone: Ints | None = None) -> Ints:
        """Return how many indexes each of `coupling.axes` has left, (axes,).

        Args:
            gone: Units that are to count as removed as well, by their entries in `Group.roots`.
        """
        left = self._kept if gone is None else self._kept & ~np.isin(self.coupling.labels, gone)
        return np.bincount(self._axis_of[left], minlength=len(self.coupling.axes))

    def left(self, roots: Ints) -> Mask:
        """Return which units are still there, by their entries in `Group.roots`."""
        return self._kept[roots]

    # What rewrites ask ------------------------------------------------------------------------------------

    def kept(self, value: ir.Value, axis: int) -> Mask:
        """Return which of the original indexes of an axis are still there."""
        found = self._place[value, axis % len(value.shape) if axis < 0 and value.shape is not None else axis]
        return self._kept[found.first : found.first + found.size]

    def constant(self, base: str, array: npt.NDArray[Any]) -> ir.Value:
        """Add a constant that every node can see."""
        return _add(self.model, self._names, base, ir.tensor(array))

    def set_sizes(self, node: ir.Node, index: int, changes: dict[int, int]) -> None:
        """Give an input of a node that is a list of sizes other numbers at some places."""
        old = node.inputs[index]
        assert old is not None, "a list of sizes is there when its elements are followed"
        new = with_elements(old, changes, node, self.constant, self._names.fresh, self.coupling.shapes)
        self.set_input(node, index, new)

    def set_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Replace an input of a node."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        if old is not value:
            node.replace_input_with(index, value)
            drop_unused_constants([old])
            if old is not None and (producer := old.producer()) is not None:
                remove_unused(producer)

    def opset(self) -> int:
        """Return the version of the standard operators."""
        return self.coupling.opset


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Yield what may be a constant of a model."""
    for scope in scopes(model):
        yield from scope.graph.initializers.values()
        for node in scope.graph:
            if is_op(node, "Constant"):
                yield node.outputs[0]


def _pairs(graph: ir.Graph, original: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Yield the nodes of a graph and its bodies with those of the original that have the same outputs."""
    others = {tuple(value.name for value in node.outputs): node for node in original}
    for node in graph:
        other = others[tuple(value.name for value in node.outputs)]
        yield node, other
        for (_, body), (_, counterpart) in zip(bodies(node), bodies(other), strict=True):
            yield from _pairs(body, counterpart)


def _shorten(value: ir.Value, masks: Mapping[int, Mask]) -> None:
    """Leave indexes out of a constant's tensor, or of the shape that is declared for any other value."""
    tensor = constant_tensor(value)
    if tensor is not None:
        array = tensor.numpy()
        for axis, mask in masks.items():
            array = np.compress(mask, array, axis=axis)
        _set_tensor(value, array, tensor)
    if value.shape is not None:
        sizes = list(value.shape.dims)
        for axis, mask in masks.items():
            sizes[axis] = int(mask.sum())
        value.shape = ir.Shape(sizes)


def _set_tensor(value: ir.Value, array: npt.NDArray[Any], old: ir.TensorProtocol) -> None:
    new = ir.tensor(array, dtype=old.dtype, name=old.name, doc_string=old.doc_string)
    new.metadata_props.update(old.metadata_props)
    node = value.producer()
    if node is None:
        value.const_value = new
        return
    for name in list(node.attributes):
        node.attributes.pop(name)
    node.attributes["value"] = ir.AttrTensor("value", new)


def _exchange(
    model: ir.Model, names: Names, node: ir.Node, index: int, tensor: ir.TensorProtocol, array: npt.NDArray[Any]
) -> None:
    """Give a node other numbers than those of a tensor: their difference is added where they are computed."""
    value = node.inputs[index]
    assert value is not None, "a clone has the inputs of the original"
    if constant_tensor(value) is not None:
        node.replace_input_with(
            index, _add(model, names, f"{value.name}_changed", ir.tensor(array, dtype=tensor.dtype))
        )
        return
    change = ir.tensor(array - tensor.numpy(), dtype=tensor.dtype)
    total = make_node(names, "Add", [value, _add(model, names, f"{value.name}_change", change)], like=value)
    insert_before(node, total)
    node.replace_input_with(index, total.outputs[0])


def _zero_of(node: ir.Node, sink: Sink) -> npt.NDArray[Any] | None:
    """Return what stands for zero in the weight of a sink, as it is broadcast; None for zero itself."""
    given = None if sink.zero is None else constant_array(node.inputs[sink.zero[0]])
    weight = node.inputs[sink.index]
    tensor = constant_tensor(weight)
    if given is None or sink.zero is None or tensor is None:
        return None
    return np.reshape(given, [-1 if axis == sink.zero[1] else 1 for axis in range(len(tensor.shape))])


def _zero(
    model: ir.Model,
    names: Names,
    node: ir.Node,
    index: int,
    factor: ir.TensorProtocol,
    zero: npt.NDArray[Any] | None,
) -> None:
    """Multiply an input by a factor of zeros and ones, for this node alone: at once where it is constant."""
    value = node.inputs[index]
    assert value is not None, "a clone has the inputs of the original"
    tensor = constant_tensor(value)
    if tensor is not None:
        array = tensor.numpy()
        array = np.where(factor.numpy() != 0, array, (np.zeros((), array.dtype) if zero is None else zero))
        new = _add(model, names, f"{value.name}_zeroed", ir.tensor(array, dtype=tensor.dtype))
    else:
        product = make_node(names, "Mul", [value, _add(model, names, f"{value.name}_kept", factor)], like=value)
        insert_before(node, product)
        new = product.outputs[0]
    node.replace_input_with(index, new)


def _add(model: ir.Model, names: Names, base: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer to the main graph, where every body can see it."""
    name = names.fresh(base)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
    value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    model.graph.register_initializer(value)
    return value
