"""Which constants of a model are weights, and along which of their axes channels and sums run."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxopt.graph import Scope, attribute, has_references, is_op, scopes

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """How one node uses a weight. Axes are those of the weight as it is stored, counted from the front.

    Attributes:
        node: The node.
        channel_axis: Each index along it makes its own output channel, row or column; for a lookup table the rows.
        contraction_axis: Products are summed up along it; None for a lookup table.
    """

    node: ir.Node
    channel_axis: int
    contraction_axis: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """A floating-point constant of rank two or more.

    Attributes:
        scope: The graph that holds it.
        value: The initializer, or the output of a Constant node.
        tensor: Its data.
        roles: The nodes that use it as a weight, in graph order. Empty when none does.
    """

    scope: Scope
    value: ir.Value
    tensor: ir.TensorProtocol
    roles: tuple[Role, ...]

    @property
    def locked(self) -> str | None:
        """Why its data must stay as it is, or None."""
        if self.value.is_graph_input():
            return "it is also an input of the graph, so the caller can override it"
        if self.value.is_graph_output():
            return "it is an output of the graph"
        return None

    @property
    def description(self) -> str:
        """Its type and shape, e.g. `float32[64,32,3,3]`."""
        sizes = ",".join(str(size) for size in self.tensor.shape)
        return f"{dtype_name(self.tensor.dtype)}[{sizes}]"


def dtype_name(dtype: ir.DataType) -> str:
    """Return the everyday name of an element type, e.g. `float32`."""
    return {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}.get(dtype, dtype.name.lower())


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """A value that holds the elements of a constant in another order: its axis i is axis `axes[i]` of `root`."""

    root: ir.Value
    axes: tuple[int, ...]


def weights(model: ir.Model) -> list[Weight]:
    """Return the floating-point constants of rank two or more, in the order in which nodes first use them.

    Reads no data. Constants that reach their node through Identity, Cast or Transpose are followed. Nested graphs
    and functions are included, and so are initializers that the caller can override: see `Weight.locked`.
    """
    views: dict[ir.Value, _View] = {}
    found: dict[ir.Value, list[Role]] = {}
    owners: dict[ir.Graph, Scope] = {}
    for scope in scopes(model):
        owners[scope.graph] = scope
        for node in scope.graph:
            for index, value in enumerate(node.inputs):
                view = _view(value, views)
                if view is None:
                    continue
                roles = found.setdefault(view.root, [])
                role = _role(node, index, view)
                if role is not None:
                    roles.append(role)
                elif index == 0:
                    _follow(node, view, views)
    return [
        Weight(owners[value.graph], value, tensor, tuple(roles))
        for value, roles in found.items()
        if (tensor := _tensor(value)) is not None and value.graph in owners
    ]


def _view(value: ir.Value | None, views: dict[ir.Value, _View]) -> _View | None:
    if value is None:
        return None
    known = views.get(value)
    if known is not None:
        return known
    tensor = _tensor(value)
    if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) < 2:
        return None
    view = views[value] = _View(value, tuple(range(len(tensor.shape))))
    return view


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or not is_op(node, "Constant") or has_references(node) or "value" not in node.attributes:
        return None
    tensor: ir.TensorProtocol = node.attributes["value"].as_tensor()
    return tensor


def _follow(node: ir.Node, view: _View, views: dict[ir.Value, _View]) -> None:
    if is_op(node, "Identity", "Cast"):
        views[node.outputs[0]] = view
    elif is_op(node, "Transpose") and not has_references(node):
        order = attribute(node, "perm", tuple(reversed(range(len(view.axes)))))
        if sorted(order) == list(range(len(view.axes))):
            views[node.outputs[0]] = _View(view.root, tuple(view.axes[i] for i in order))


def _role(node: ir.Node, index: int, view: _View) -> Role | None:
    axes = _axes(node, index, len(view.axes))
    if axes is None:
        return None
    channel, contraction = axes
    return Role(node, view.axes[channel], None if contraction is None else view.axes[contraction])


_KINDS = {
    ("com.microsoft", "FusedConv"): "Conv",
    ("com.microsoft", "FusedGemm"): "Gemm",
    ("com.microsoft", "Attention"): "projections",
}
"""Operators of ONNX Runtime that hold weights like others do."""


def _axes(node: ir.Node, index: int, rank: int) -> tuple[int, int | None] | None:
    """Return the channel axis and the contraction axis of an input that is a weight, or None where it is none."""
    if has_references(node):
        return None
    match _KINDS.get((node.domain, node.op_type), node.op_type if node.domain in ("", "ai.onnx") else ""), index:
        case "Conv", 1:
            return 0, 1
        case "ConvTranspose", 1:
            return 1, 0
        case "MatMul", 0:
            return rank - 2, rank - 1
        case "MatMul", 1:
            return rank - 1, rank - 2
        case "Gemm", 0:
            return (1, 0) if attribute(node, "transA", 0) else (0, 1)
        case "Gemm", 1:
            return (0, 1) if attribute(node, "transB", 0) else (1, 0)
        case "projections", 1:
            return (1, 0) if rank == 2 else None
        case (("LSTM" | "GRU" | "RNN"), (1 | 2)):
            return (1, 2) if rank == 3 else None
        case "Gather", 0:
            return attribute(node, "axis", 0) % rank, None
    return None
