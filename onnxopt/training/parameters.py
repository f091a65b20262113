"""Which constants of a model are its parameters, and how trained ones get back into it."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes, attribute, constant_ints, has_references, is_op, remove_unused, scopes
from onnxopt.registry import nearest
from onnxopt.training.values import HALF, tensor_to_torch

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

# fmt: off
_SETTINGS: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4), "Clip": (1, 2), "Dropout": (1, 2), "Pad": (2,), "Pow": (0, 1), "Range": (0, 1, 2),
    "Resize": (1, 2, 3), "Upsample": (1,), "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "OneHot": (2,),
    "Where": (0,), "Equal": (0, 1), "Less": (0, 1), "Greater": (0, 1), "LessOrEqual": (0, 1),
    "GreaterOrEqual": (0, 1), "Max": (0, 1), "Min": (0, 1), "Mod": (0, 1), "ConstantOfShape": (0,), "Sin": (0,),
    "Cos": (0,), "CastLike": (1,), "RotaryEmbedding": (1, 2, 3), "Loop": (0, 1), "If": (0,),
    "LSTM": (4, 5, 6), "GRU": (4, 5), "RNN": (4, 5),
}
"""Inputs that say how something is computed; what is only used there is no parameter."""

_WEIGHTED = frozenset(
    {
        "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "FusedConv", "FusedGemm", "FusedMatMul",
        "BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "PRelu",
        "SkipLayerNormalization", "Attention", "Einsum",
    }
)
"""Operators that learn even a single number."""

_POSITIONS = frozenset({"Mul", "MatMul", "Einsum", "Transpose", "Concat", "Cast", "Expand", "Reshape", "Unsqueeze"})
"""Between an angle's frequency and its sine."""
# fmt: on

_FORMS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity")
"""Between where a weight is stored and where it is used."""

_MASK = 1e4
"""A constant with larger numbers hides something, and is no weight."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """A constant that can be trained.

    Attributes:
        name: The name of the initializer, or of the output of the Constant or ConstantOfShape node that makes it.
        value: The value in the graph.
        tensor: What it holds.
        depth: How many layers lie behind its own on the longest way to an output: 0 for the last one.
    """

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol
    depth: int

    @property
    def is_made(self) -> bool:
        """Whether a ConstantOfShape makes it in every run; trained, it is stored instead."""
        return is_op(self.value.producer(), "ConstantOfShape")

    @property
    def initial(self) -> torch.Tensor:
        """A copy of what it holds, half precision as float32."""
        return tensor_to_torch(self.tensor)


def find_parameters(model: ir.Model) -> dict[str, Parameter]:
    """Return the parameters of a model by name, in the order in which the graph uses them.

    These are its floating-point constants, unless the caller can override them, or they only say how something is
    computed: bounds, exponents, statistics of BatchNorm, masks, frequencies of positions, single numbers outside of
    layers, and what only touches an input (its normalization). What a ConstantOfShape makes counts where a layer takes
    it for a weight.
    """
    names = _counts(model)
    found = {}
    depths = _depths(model)
    for value in _constants(model):
        tensor = _stored(value)
        if tensor is None or value.name is None or names[value.name] > 1:
            continue
        if tensor.dtype in _FLOATS and tensor.size and _is_learnt(value, tensor):
            found[value.name] = Parameter(value.name, value, tensor, depths.get(value, 0))
    return found


def _counts(model: ir.Model) -> dict[str, int]:
    """Return how many constants have each name: bodies may use one again."""
    counts: dict[str, int] = {}
    for value in _constants(model):
        counts[value.name or ""] = counts.get(value.name or "", 0) + 1
    return counts


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the constants in the order of their first use; functions have none that can be named."""
    seen: set[ir.Value] = set()
    for scope in scopes(model):
        if scope.function is not None:
            continue
        for node in scope.graph:
            for value in node.inputs:
                if value is None or value in seen or value.is_graph_input():
                    continue
                if _is_weight(value):
                    seen.add(value)
                    yield value


def _stored(value: ir.Value) -> ir.TensorProtocol | None:
    """Return what a constant holds."""
    node = value.producer()
    if node is None:
        return value.const_value
    if has_references(node):
        return None
    if node.op_type == "ConstantOfShape":
        shape, fill = constant_ints(node.inputs[0]), attribute(node, "value")
        number = np.zeros(1, np.float32) if fill is None else fill.numpy().reshape(-1)
        # every element is the same number in memory, until training makes a copy
        whole = None if shape is None or min(shape, default=0) < 0 else np.broadcast_to(number[0], shape)
        return None if whole is None else ir.tensor(whole, name=value.name)
    if "value" not in node.attributes:
        return None
    return node.attributes["value"].as_tensor()


def _is_learnt(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    uses = [use for use in value.uses() if not _is_setting(use.node, use.idx)]
    if not uses or value.is_graph_output():
        return False
    if not value.is_initializer() and is_op(value.producer(), "ConstantOfShape") and not _is_layers(value):
        return False
    if tensor.size == 1 and not any(use.node.op_type in _WEIGHTED or _follows_product(use.node) for use in uses):
        return False
    if tensor.size == 1 and len(tensor.shape) == 0:
        return False
    if all(_touches_only_inputs(use.node, value) or _leads_to_angles(use.node) for use in uses):
        return False
    array = np.asarray(tensor.numpy())
    return bool(np.isfinite(array).all() and np.abs(array.astype(np.float32)).max() < _MASK)


def _is_layers(value: ir.Value) -> bool:
    """Whether a layer takes a value for one of its weights, as it is or in another shape."""
    for use in value.uses():
        if use.node.op_type in _WEIGHTED and not _is_setting(use.node, use.idx):
            return True
        if use.node.op_type in _FORMS and use.idx == 0 and _is_layers(use.node.outputs[0]):
            return True
        if _follows_product(use.node):
            return True
    return False


def _is_setting(node: ir.Node, index: int) -> bool:
    return index in _SETTINGS.get(node.op_type, ())


def _follows_product(node: ir.Node) -> bool:
    """Whether a node adds a bias to a product."""
    return is_op(node, "Add") and any(v is not None and is_op(v.producer(), "MatMul", "Conv") for v in node.inputs)


def _touches_only_inputs(node: ir.Node, value: ir.Value) -> bool:
    others = [v for v in node.inputs if v is not None and v is not value]
    return is_op(node, "Add", "Sub", "Mul", "Div") and all(v.is_graph_input() for v in others)


def _leads_to_angles(node: ir.Node) -> bool:
    """Whether all that is computed from a node's output are sines and cosines."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if current in seen or is_op(current, "Sin", "Cos"):
            continue
        seen.add(current)
        users = [use.node for value in current.outputs for use in value.uses()]
        if current.op_type not in _POSITIONS or not users or len(seen) > 20:
            return False
        waiting += users
    return True


def _depths(model: ir.Model) -> dict[ir.Value, int]:
    """Return for each constant how many layers lie behind the one it belongs to, at most.

    A layer is a node at which something made of a constant with two axes or more meets what depends on the inputs.
    """
    fixed = _made_of_constants(model)
    behind: dict[ir.Value, int] = {}
    for scope in scopes(model):
        for node in reversed(scope.graph):
            after = max((behind.get(v, 0) for v in node.outputs), default=0)
            layer = not all(v in fixed for v in node.outputs) and any(
                fixed.get(v, False) and not _is_setting(node, i) for i, v in enumerate(node.inputs) if v is not None
            )
            for value in node.inputs:
                if value is not None:
                    mine = after if value in fixed else after + layer
                    behind[value] = max(behind.get(value, 0), mine)
    return behind


def _made_of_constants(model: ir.Model) -> dict[ir.Value, bool]:
    """Return the values that depend on no input, and whether a floating-point matrix is in them."""
    fixed: dict[ir.Value, bool] = {}
    for scope in scopes(model):
        for node in scope.graph:
            for value in node.inputs:
                if value is not None and _is_weight(value) and not value.is_graph_input():
                    fixed[value] = _is_matrix(value)
            inputs = [v for v in node.inputs if v is not None]
            if inputs and all(v in fixed for v in inputs):
                fixed |= dict.fromkeys(node.outputs, any(fixed[v] for v in inputs))
    return fixed


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is stored, or made from stored numbers alone by one node."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return is_op(node, "Constant") or (is_op(node, "ConstantOfShape") and constant_ints(node.inputs[0]) is not None)


def _is_matrix(value: ir.Value) -> bool:
    tensor = _stored(value)
    return tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) >= 2 and tensor.size > 1


def choose(names: Iterable[str], train: Sequence[str], freeze: Sequence[str]) -> list[str]:
    """Return the names that fit a pattern of `train` (all, when there is none) and none of `freeze`.

    Raises:
        UsageError: If a pattern fits nothing, or nothing is left to be trained.
    """
    names = list(names)
    for option, patterns in (("train", train), ("freeze", freeze)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                plain = re.sub(r"[*?\[\]]", "", pattern)
                raise UsageError(f'{option} "{pattern}" fits no parameter of the model.{nearest(plain, names)}', option)
    chosen = [n for n in names if not train or any(fnmatch.fnmatchcase(n, p) for p in train)]
    chosen = [n for n in chosen if not any(fnmatch.fnmatchcase(n, p) for p in freeze)]
    if not chosen:
        raise UsageError("No parameter is left to be trained; freeze fewer of them.", "freeze", "train")
    return chosen


def with_parameters(model: ir.Model, trained: Mapping[str, torch.Tensor | np.ndarray]) -> ir.Model:
    """Return a copy of a model with other contents of some constants, in their own types; all else is as it was.

    Args:
        model: The model; it is not changed.
        trained: Name -> contents, of the same shape.
    """
    copy = model.clone()
    copy.meta.update(model.meta)
    copy.graph.meta.update(model.graph.meta)
    for value in list(_constants(copy)):
        old = _stored(value) if value.name in trained else None
        if old is None:
            continue
        tensor, node = _filled(old, trained[value.name or ""]), value.producer()
        if node is None:
            value.const_value = tensor
        elif node.op_type == "Constant":
            node.attributes["value"] = ir.AttrTensor("value", tensor)
        else:
            _store(value, node, tensor)
    return copy


def _store(value: ir.Value, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    """Put an initializer of the same name in the place of what a node makes."""
    graph, name = value.graph, value.name
    assert graph is not None and not value.is_graph_output()
    value.name = f"{name}/made"
    stored = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(stored)
    value.replace_all_uses_with(stored)
    remove_unused(node)


def _filled(old: ir.TensorProtocol, new: torch.Tensor | np.ndarray) -> ir.TensorProtocol:
    """Return a tensor with other contents."""
    array = new.detach().cpu().numpy() if isinstance(new, torch.Tensor) else new
    tensor = ir.Tensor(
        np.ascontiguousarray(array.astype(old.dtype.numpy())),
        dtype=old.dtype,
        shape=ir.Shape(old.shape.numpy()),
        name=old.name,
        doc_string=old.doc_string,
    )
    tensor.metadata_props.update(old.metadata_props)
    return tensor


def computes_in_half(model: ir.Model) -> bool:
    """Whether any value of the model has half precision."""
    values = (v for node in all_nodes(model) for v in (*node.inputs, *node.outputs))
    return any(v is not None and v.dtype in HALF for v in values)
