"""Telling tensors, attributes and graphs of equal content apart from others, reading no more than needed."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

_SAMPLE = 64
"""Bytes read at the front, in the middle and at the end before anything is hashed."""

_CHUNK = 1 << 20


class Content:
    """A tensor's element type, shape and bytes as a dictionary key.

    Equal means equal to the bit: NaN payloads and the sign of zero count. All bytes are read only when two
    tensors of one type and shape agree in a few samples, and then in chunks; those of external data are read from
    the file, so that they do not stay in memory as mapped pages.
    """

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        """Read the samples."""
        self.tensor = tensor
        sample, self._whole = _sample(tensor)
        self._key = (tensor.dtype, tensor.shape.numpy(), sample)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Content):
            return NotImplemented
        if self.tensor is other.tensor:
            return True
        if self._key != other._key:
            return False
        return self._whole or self._digest == other._digest

    @functools.cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        if isinstance(self.tensor, ir.ExternalTensor):
            self.tensor.tofile(_Writer(digest))
        elif self.tensor.dtype == ir.DataType.STRING:
            for text in self.tensor.numpy().reshape(-1).tolist():
                digest.update(len(text).to_bytes(8, "little"))
                digest.update(text)
        else:
            data = _bytes_of(self.tensor)
            for start in range(0, data.size, _CHUNK):
                digest.update(data[start : start + _CHUNK].tobytes())
        return digest.digest()


class _Writer:
    """A file-like object that hashes what is written."""

    def __init__(self, digest: Any) -> None:
        self.write = digest.update


def _bytes_of(tensor: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the elements as bytes; without a copy where they are contiguous."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _sample(tensor: ir.TensorProtocol) -> tuple[bytes, bool]:
    """Return some of the tensor's bytes, and whether they are all of them."""
    if tensor.dtype == ir.DataType.STRING:
        return b"", False
    data = _bytes_of(tensor)
    if data.size <= _SAMPLE:
        return data.tobytes(), True
    middle = data.size // 2
    return b"".join(data[i : i + _SAMPLE].tobytes() for i in (0, middle, data.size - _SAMPLE)), False


def attribute_key(attr: ir.Attr) -> Hashable:
    """Return what equal attributes have in common; graphs, types and sparse tensors are equal to themselves only."""
    kind = attr.type
    if attr.is_ref():
        return kind, "reference", attr.ref_attr_name
    if kind == ir.AttributeType.TENSOR:
        return Content(attr.value)
    if kind == ir.AttributeType.TENSORS:
        return tuple(Content(t) for t in attr.value)
    if kind == ir.AttributeType.FLOAT:
        # The bits, because 0.0 equals -0.0 and NaN does not equal itself.
        return struct.pack("<d", attr.value)
    if kind == ir.AttributeType.FLOATS:
        return struct.pack(f"<{len(attr.value)}d", *attr.value)
    if kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        plain: Hashable = attr.value
        return plain
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return tuple(attr.value)
    return kind, id(attr)


def equal_graphs(one: ir.Graph, other: ir.Graph) -> bool:
    """Whether two graphs compute the same: equal nodes in the same order, from the same values around them."""
    return _equal_graphs(one, other, {})


_Pairs = dict[ir.Value, ir.Value]


def _equal_graphs(one: ir.Graph, other: ir.Graph, pairs: _Pairs) -> bool:
    """Compare two graphs; the pairs hold the values around them that stand for each other."""
    if len(one) != len(other) or not _pair(list(one.inputs), list(other.inputs), pairs):
        return False
    weights, others = list(one.initializers.values()), list(other.initializers.values())
    if not _pair(weights, others, pairs) or not all(map(_equal_weights, weights, others)):
        return False
    if not all(_equal_nodes(a, b, pairs) for a, b in zip(one, other, strict=True)):
        return False
    return len(one.outputs) == len(other.outputs) and all(
        pairs.get(a, a) is b for a, b in zip(one.outputs, other.outputs, strict=True)
    )


def _pair(ones: Sequence[ir.Value], others: Sequence[ir.Value], pairs: _Pairs) -> bool:
    if len(ones) != len(others):
        return False
    pairs.update(zip(ones, others, strict=True))
    return True


def _equal_weights(one: ir.Value, other: ir.Value) -> bool:
    if one.const_value is None or other.const_value is None:
        return False
    return Content(one.const_value) == Content(other.const_value)


def _equal_nodes(one: ir.Node, other: ir.Node, pairs: _Pairs) -> bool:
    if one.op_identifier() != other.op_identifier() or len(one.inputs) != len(other.inputs):
        return False
    if any((a if a is None else pairs.get(a, a)) is not b for a, b in zip(one.inputs, other.inputs, strict=True)):
        return False
    # An output that is left out is not computed.
    if [bool(v.name) for v in one.outputs] != [bool(v.name) for v in other.outputs]:
        return False
    first, second = one.attributes.data, other.attributes.data
    if first.keys() != second.keys() or not all(_equal_attributes(a, second[n], pairs) for n, a in first.items()):
        return False
    return _pair(one.outputs, other.outputs, pairs)


def _equal_attributes(one: ir.Attr, other: ir.Attr, pairs: _Pairs) -> bool:
    if one.type != other.type or one.is_ref() != other.is_ref():
        return False
    if one.type == ir.AttributeType.GRAPH and not one.is_ref():
        return _equal_graphs(one.as_graph(), other.as_graph(), pairs)
    return attribute_key(one) == attribute_key(other)
