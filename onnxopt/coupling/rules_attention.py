"""How heads go through operators that hold a whole attention: they go out whole, with the keys they share."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxopt.coupling.builder import Builder, Opaque, label
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.rewrites import SetCount, SetCounts
from onnxopt.coupling.rules import Rule, operand
from onnxopt.graph import attribute


def _heads(builder: Builder, value: ir.Value, axis: int, heads: int) -> Ints:
    """Return the indexes of an axis as (heads, indexes per head), after making each row go as one."""
    ids = builder.known_ids(value, axis)
    if heads < 1 or len(ids) % heads:
        raise Opaque(f"{len(ids)} columns do not divide into {heads} heads")
    rows = ids.reshape(heads, -1)
    builder.link(rows, rows[:, :1])
    return rows[:, 0]


def _bare(builder: Builder, node: ir.Node, plain: int, *free: tuple[ir.Value, int]) -> None:
    """Freeze all but the given axes, and all of the inputs behind the first `plain` ones.

    Raises:
        Opaque: If one of those has something for each head.
    """
    for value in node.inputs[plain:]:
        shape = () if value is None else builder.shape(value)
        if len(shape) > 4 or (len(shape) == 4 and shape[1] != 1):
            raise Opaque(f"{value.name if value else ''} has something for each head")
    open_axes = set(free)
    for place, value in enumerate((*node.outputs, *node.inputs)):
        if value is None or not value.name:
            continue
        follows = place < len(node.outputs) + plain
        for axis in range(len(builder.shape(value))):
            if not (follows and (value, axis) in open_axes):
                builder.freeze(value, axis, f"{label(node)} attends along it or keeps it fixed")


def _share(builder: Builder, queries: Ints, keys: Ints) -> None:
    """Make the query heads that share a key head go with it."""
    if len(queries) % len(keys):
        raise Opaque(f"{len(queries)} query heads do not divide over {len(keys)} key heads")
    builder.link(queries.reshape(len(keys), -1), keys[:, None])


def multi_head_attention(builder: Builder, node: ir.Node) -> None:
    """MultiHeadAttention of separate (batch, length, hidden) query, key and value, without a bias or a past."""
    output = node.outputs[0]
    values = [operand(node, index) for index in range(3)]
    if any(len(builder.shape(value)) != 3 for value in values):
        raise Opaque("its inputs are packed or have heads of their own")
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raise Opaque("it adds a bias to its projections")
    count = attribute(node, "num_heads", 0)
    heads = [_heads(builder, value, 2, count) for value in (*values, output)]
    for own in heads[1:]:
        builder.link(own, heads[0])
    _bare(builder, node, 3, *((value, 2) for value in (*values, output)))
    width = builder.sizes(values[0], 2)[0] // count
    builder.rewrites.append(SetCount(node, (values[0],), "num_heads", 2, width))


def grouped_query_attention(builder: Builder, node: ir.Node) -> None:
    """GroupQueryAttention of separate query, key and value."""
    query, key, value, output = operand(node, 0), operand(node, 1), operand(node, 2), node.outputs[0]
    if len([v for v in node.inputs[11:] if v is not None]):
        raise Opaque("it has a sink for each head")
    counts = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    queries, keys = _heads(builder, query, 2, counts[0]), _heads(builder, key, 2, counts[1])
    _share(builder, queries, keys)
    builder.link(_heads(builder, value, 2, counts[1]), keys)
    builder.link(_heads(builder, output, 2, counts[0]), queries)
    free = [(query, 2), (key, 2), (value, 2), (output, 2)]
    for cache in (*node.inputs[3:5], *node.outputs[1:3]):
        if cache is not None and cache.name:
            builder.link(builder.known_ids(cache, 1), keys)
            free.append((cache, 1))
    _bare(builder, node, 5, *free)
    width = builder.sizes(query, 2)[0] // counts[0]
    builder.rewrites.append(SetCount(node, (query,), "num_heads", 2, width))
    builder.rewrites.append(SetCount(node, (key,), "kv_num_heads", 2, width))


def projected_attention(builder: Builder, node: ir.Node) -> None:
    """Attention of com.microsoft, which holds the projections of query, key and value in one weight."""
    data, weight, output = operand(node, 0), operand(node, 1), node.outputs[0]
    if len([o for o in node.outputs if o.name]) > 1:
        raise Opaque("it keeps a past")
    count = attribute(node, "num_heads", 0)
    columns = builder.known_ids(weight, 1)
    sizes = attribute(node, "qkv_hidden_sizes") or (len(columns) // 3,) * 3
    free = [(data, 2), (weight, 0), (weight, 1), (output, 2)]
    shared = _heads(builder, output, 2, count)
    for value, axis in ((weight, 1), (node.inputs[2] if len(node.inputs) > 2 else None, 0)):
        if value is None:
            continue
        free.append((value, axis))
        start, ids = 0, builder.known_ids(value, axis)
        for size in sizes:
            rows = ids[start : start + size].reshape(count, -1)
            builder.link(rows, shared[:, None])
            start += size
    builder.tie(data, 2, weight, 0)
    builder.sink(node, 1, 0, (0, 2))
    _bare(builder, node, 3, *free)
    builder.rewrites.append(SetCount(node, (output,), "num_heads", 2, builder.sizes(output, 2)[0] // count))
    builder.rewrites.append(SetCounts(node, (weight,), "qkv_hidden_sizes", 1, tuple(sizes)))


def standard_attention(builder: Builder, node: ir.Node) -> None:
    """Attention of opset 23: heads on an axis of their own, or as counts in attributes."""
    query, key, value, output = operand(node, 0), operand(node, 1), operand(node, 2), node.outputs[0]
    if len([o for o in node.outputs if o.name]) > 1:
        raise Opaque("it has several outputs")
    rank = len(builder.shape(query))
    axis = 1 if rank == 4 else 2
    if rank == 4:
        counts = builder.sizes(query, 1)[0], builder.sizes(key, 1)[0]
    else:
        counts = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    queries, keys = _heads(builder, query, axis, counts[0]), _heads(builder, key, axis, counts[1])
    _share(builder, queries, keys)
    builder.link(_heads(builder, value, axis, counts[1]), keys)
    builder.link(_heads(builder, output, axis, counts[0]), queries)
    _bare(builder, node, 3, *((operand_, axis) for operand_ in (query, key, value, output)))
    if rank == 3:
        for source, name, heads in ((query, "q_num_heads", counts[0]), (key, "kv_num_heads", counts[1])):
            width = builder.sizes(source, 2)[0] // heads
            builder.rewrites.append(SetCount(node, (source,), name, 2, width))


STANDARD: Mapping[str, Rule] = {"Attention": standard_attention}
MICROSOFT: Mapping[str, Rule] = {
    "Attention": projected_attention,
    "GroupQueryAttention": grouped_query_attention,
    "MultiHeadAttention": multi_head_attention,
}
