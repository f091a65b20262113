"""How a model is handed to ONNX Runtime without its weights passing through a proto twice.

The runtime gets a proto that holds the structure and the small tensors. Large weights that lie in one folder
stay there and are read by the runtime itself; other large weights are given to it as arrays. So a model of any
size can be run, which bytes alone allow up to 2 GB only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from onnxopt.errors import ModelError, RuntimeFailure
from onnxopt.graph import bodies, has_references, scopes
from onnxopt.proto.datafile import DataFile
from onnxopt.proto.encode import encode, encode_node
from onnxopt.proto.tensors import EmbeddedTensor, ExternalTensor
from onnxopt.session.ortvalues import NATIVE, REINTERPRETED

EMBED_BELOW = 4096
"""Tensors of fewer bytes go into the proto, where the runtime's shape inference reads shapes and axes."""

_OLDEST_IR_VERSION = 4
"""From this IR version on initializers need not be graph inputs as well."""

_ANY_IR_VERSION = 10
"""For models made here; the runtime does not tie element types or opsets to it."""

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)

_ALL_OUTPUTS = ("If", "Loop", "Scan", "Split")
"""Operators whose outputs cannot be left out one by one: kernels crash on a missing one."""

_CONTRIB = "com.microsoft"

_DOMAINS = ("", "ai.onnx", _CONTRIB)
"""Domains whose nodes can stand alone: what they compute is known without the model's functions."""


@dataclasses.dataclass(frozen=True)
class Handover:
    """What a session is made from.

    Attributes:
        proto: The serialized model without its large weights.
        folder: Where the external data that the proto still refers to lies; None when it refers to none.
        injected: Large initializers to be given as arrays, by name.
    """

    proto: bytes
    folder: str | None
    injected: dict[str, ir.TensorProtocol]


def prepare(model: ir.Model) -> Handover:
    """Split a model into a small proto and the weights it refers to. The model is not changed.

    Raises:
        RuntimeFailure: If what has to be in the proto exceeds the 2 GB that it can hold, or cannot be expressed.
    """
    split = _Split(model)
    try:
        proto = encode(model, split.place)
        proto.ir_version = max(proto.ir_version, _OLDEST_IR_VERSION)
        _keep(proto.graph.input, {value.name for value in model.graph.inputs})
        _keep(proto.graph.initializer, set(model.graph.initializers) - split.unused)
        return Handover(proto.SerializeToString(), split.folder, split.injected)
    except EncodeError as error:
        raise RuntimeFailure(
            "The model cannot be handed to ONNX Runtime: tensors inside nested graphs, functions and attributes "
            "exceed 2 GB; save the model with external data and load it again."
        ) from error
    except (ModelError, ValueError, OSError) as error:
        raise RuntimeFailure(f"The model cannot be handed to ONNX Runtime: {error}") from error


def _keep(entries: Any, names: Collection[str | None]) -> None:
    """Delete the entries of a repeated field whose name is not among these."""
    for index in reversed(range(len(entries))):
        if entries[index].name not in names:
            del entries[index]


class _Split:
    """Where each tensor of a model goes.

    Attributes:
        folder: The folder the runtime reads external data from; it can read from one only.
        injected: Large initializers to be given as arrays, by name.
        unused: Initializers that nothing uses. The runtime drops them while loading and refuses arrays for them.
    """

    def __init__(self, model: ir.Model) -> None:
        initializers = model.graph.initializers
        tensors = list(_tensors(model))
        self.folder = _common_folder(tensors)
        self.unused = {
            name
            for name, value in initializers.items()
            if not (value.uses() or value.is_graph_output() or value.is_graph_input())
        }
        self._left = {id(t): place for t in tensors if (place := _place_of(t)) and place.folder == self.folder}
        # The runtime takes arrays for initializers of the main graph only.
        inner = {id(tensor) for tensor in tensors[len(initializers) :]}
        self.injected = {
            name: value.const_value
            for name, value in initializers.items()
            if value.const_value is not None
            and name not in self.unused
            and id(value.const_value) not in inner
            and id(value.const_value) not in self._left
            and value.const_value.dtype in NATIVE | REINTERPRETED
            and _is_large(value.const_value)
        }
        self._injected = {id(tensor) for tensor in self.injected.values()}

    def place(self, target: onnx.TensorProto, tensor: ir.TensorProtocol, initializer: bool) -> bool:
        """Leave the data of a large tensor out; return False for a tensor whose data goes into the proto."""
        if id(tensor) in self._injected:
            _refer(target, location="given as an array")
        elif place := self._left.get(id(tensor)):
            _refer(target, location=place.location, offset=str(place.offset), length=str(tensor.nbytes))
        else:
            return False
        return True


def _refer(target: onnx.TensorProto, **entries: str) -> None:
    target.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        target.external_data.add(key=key, value=value)


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= EMBED_BELOW


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every tensor of the model: the initializers of the main graph first, then all others."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value
    for scope in scopes(model):
        if scope.graph is not model.graph:
            yield from (v.const_value for v in scope.graph.initializers.values() if v.const_value is not None)
        for node in scope.graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def _common_folder(tensors: list[ir.TensorProtocol]) -> str | None:
    """Return the folder that holds most of the bytes that lie in files."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if place := _place_of(tensor):
            sizes[place.folder] = sizes.get(place.folder, 0) + tensor.nbytes
    return max(sizes, key=lambda f: sizes[f]) if sizes else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where in a file the runtime finds a tensor: in external data, or within the model's own file."""

    folder: str
    location: str
    offset: int


def _place_of(tensor: ir.TensorProtocol) -> _Place | None:
    """Return where a large tensor lies.

    None when it lies in no file, or the runtime could not read it there: the file was replaced or cut, or a link
    leads out of the folder.
    """
    if not _is_large(tensor):
        return None
    file: DataFile | None = None
    if isinstance(tensor, EmbeddedTensor):
        file, offset = tensor.region.file, tensor.region.offset
        folder, location = tensor.region.file.path.parent.resolve(), tensor.region.file.path.name
    elif isinstance(tensor, ir.ExternalTensor):
        file = tensor.region.file if isinstance(tensor, ExternalTensor) else None
        folder, location, offset = Path(tensor.base_dir or ".").resolve(), str(tensor.location), tensor.offset or 0
    else:
        return None
    path = folder / location
    try:
        enough = path.stat().st_size >= offset + tensor.nbytes
    except OSError:
        return None
    readable = enough and (file is None or file.is_at(path)) and path.resolve().is_relative_to(folder)
    return _Place(str(folder), location, offset) if readable else None


def is_self_contained(node: ir.Node) -> bool:
    """Whether a node and the bodies it carries are deterministic and use nothing but the node's inputs."""
    inside: set[ir.Value] = set()

    def visit(current: ir.Node, outermost: bool) -> bool:
        if current.domain not in _DOMAINS or current.op_type in _RANDOM or has_references(current):
            return False
        if not outermost and any(v is not None and v not in inside for v in current.inputs):
            return False
        inside.update(current.outputs)
        for _, body in bodies(current):
            inside.update(body.inputs)
            inside.update(body.initializers.values())
            if not all(visit(inner, outermost=False) for inner in body):
                return False
            if any(v not in inside for v in body.outputs):
                return False
        return True

    return visit(node, outermost=True)


def single_node(
    node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model of this node alone and the feed for it.

    Small inputs become initializers, because some kernels want shapes, axes and scales that way.

    Raises:
        TypeError: If an input has an element type that ONNX lacks.
    """
    proto = onnx.ModelProto(ir_version=_ANY_IR_VERSION)
    proto.opset_import.add(domain="", version=opset)
    proto.opset_import.add(domain=_CONTRIB, version=1)
    graph = proto.graph
    graph.name = "evaluate"
    target = graph.node.add()
    target.CopyFrom(encode_node(node))
    del target.input[:], target.output[:]
    feed: dict[str, np.ndarray] = {}
    for index, array in enumerate(inputs):
        name = "" if array is None else f"in{index}"
        target.input.append(name)
        if array is None:
            continue
        dtype = ir.DataType.STRING if array.dtype.kind in "OU" else ir.DataType.from_numpy(array.dtype)
        if dtype != ir.DataType.STRING and array.nbytes < EMBED_BELOW:
            graph.initializer.append(ir.serde.serialize_tensor(ir.tensor(array, dtype=dtype, name=name)))
            continue
        info = graph.input.add(name=name).type.tensor_type
        info.elem_type = dtype.value
        info.shape.SetInParent()
        for size in array.shape:
            info.shape.dim.add(dim_value=size)
        feed[name] = array
    for index, value in enumerate(node.outputs):
        if value.name or node.op_type in _ALL_OUTPUTS:
            graph.output.add(name=f"out{index}")
        target.output.append(f"out{index}" if value.name or node.op_type in _ALL_OUTPUTS else "")
    return proto, feed
