"""Rules for Reshape and its kin: which factor of an axis the removable indexes belong to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.coupling.builder import Builder, Opaque, Way, label
from onnxopt.coupling.chains import follow_chain, parted_again
from onnxopt.coupling.partition import Ints, as_ints
from onnxopt.coupling.rewrites import SetSizes
from onnxopt.coupling.sizes import Place, element
from onnxopt.graph import constant_ints


class Block(NamedTuple):
    """Axes of a shape before and after that hold the same elements in the same order; axes of size 1 left out."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def align(before: Sequence[Dim], after: Sequence[Dim]) -> tuple[list[Block], Block]:
    """Divide two shapes into the smallest blocks of equal size.

    Axes are taken from the left while they are equal, symbols included, and from the right as long as their sizes are
    numbers.

    Returns:
        The blocks, and the axes in the middle about which nothing can be said.
    """
    left, right = ([i for i, dim in enumerate(dims) if dim != 1] for dims in (before, after))
    blocks = []
    while left and right and before[left[0]] == after[right[0]]:
        blocks.append(Block((left.pop(0),), (right.pop(0),)))
    while left and right:
        block = _last_block(before, after, left, right)
        if block is None:
            break
        blocks.append(block)
        del left[-len(block.before) :], right[-len(block.after) :]
    return blocks, Block(tuple(left), tuple(right))


def _last_block(before: Sequence[Dim], after: Sequence[Dim], left: list[int], right: list[int]) -> Block | None:
    if before[left[-1]] == after[right[-1]]:
        return Block((left[-1],), (right[-1],))
    sizes, counts = [1, 1], [0, 0]
    while 0 in counts or sizes[0] != sizes[1]:
        side = 0 if sizes[0] <= sizes[1] else 1
        axes, dims = ((left, before), (right, after))[side]
        dim = dims[axes[-1 - counts[side]]] if counts[side] < len(axes) else None
        if not isinstance(dim, int) or dim == 0:
            return None
        sizes[side] *= dim
        counts[side] += 1
    return Block(tuple(left[-counts[0] :]), tuple(right[-counts[1] :]))


def reshape(builder: Builder, node: ir.Node) -> None:
    """Follow indexes through Reshape, Flatten, Squeeze and Unsqueeze."""
    data, output = node.inputs[0], node.outputs[0]
    assert data is not None
    before, after = builder.shape(data), builder.shape(output)
    blocks, middle = align(before, after)
    chain = parted_again(builder, node) if middle.before or middle.after else None
    if chain is not None:
        follow_chain(builder, chain)
        return
    for block in blocks:
        if len(block.before) == len(block.after) == 1:
            builder.tie(data, block.before[0], output, block.after[0])
        else:
            builder.choose(node, _ways(builder, data, output, block))
    last = _follow_last(builder, node, middle)
    for value, axes in ((data, middle.before), (output, middle.after)):
        for axis in axes[:-1] if last else axes:
            builder.freeze(value, axis, f"{label(node)} merges it with axes of unknown size")
    if node.op_type == "Reshape":
        merged = {block.after[0]: [(data, axis) for axis in block.before] for block in blocks if len(block.after) == 1}
        follow_sizes(builder, node, 1, merged)


def _follow_last(builder: Builder, node: ir.Node, middle: Block) -> bool:
    """Follow the last axes of what is not known where one is a multiple of the other; return whether they are.

    Counted from the end of a row, elements stay where they are: a ConvTranspose whose windows do not overlap is written
    with a Reshape of (x, width * channels) to (x * width, channels), in which x is not known.
    """
    sizes = constant_ints(node.inputs[1]) if node.op_type == "Reshape" else None
    # The runtime has to work the other size out.
    if sizes is None or not middle.before or [sizes[axis] for axis in middle.after[:-1]] != [-1]:
        return False
    data, output = node.inputs[0], node.outputs[0]
    assert data is not None
    ids = [builder.ids(v, axes[-1]) for v, axes in ((data, middle.before), (output, middle.after))]
    if ids[0] is None or ids[1] is None:
        return False
    few, many = sorted((ids[0], ids[1]), key=len)
    if not len(few) or len(many) % len(few):
        return False
    builder.link(many.reshape(-1, len(few)), few[None])
    return True


def follow_sizes(
    builder: Builder, node: ir.Node, index: int, merged: Mapping[int, Sequence[Place]] | None = None
) -> None:
    """Make the sizes that a node is given for its output follow its axes; freeze those that cannot.

    Args:
        builder: Where to.
        node: The node.
        index: Which of its inputs lists the sizes.
        merged: Axis of the output -> the axes of the input that it consists of, for those that are known.
    """
    output = node.outputs[0]
    written = []
    for axis, dim in enumerate(builder.shape(output)):
        if dim == 1:
            continue
        found = element(node.inputs[index], axis, builder.known)
        if isinstance(found, int):
            if isinstance(dim, int):
                written.append(axis)
        elif found is None or not _tie_factors(builder, found, (merged or {}).get(axis, [(output, axis)])):
            for place in ((output, axis), *(found or ())):
                builder.freeze(*place, f"its size is computed in front of {label(node)}")
    builder.rewrites.append(SetSizes(node, (output,), index, tuple(written), tuple(written)))


def _tie_factors(builder: Builder, factors: Sequence[Place], axes: Sequence[Place]) -> bool:
    """Tie the axes whose sizes are multiplied to those that are merged, one by one; return whether they match."""
    left = [place for place in axes if builder.shape(place[0])[place[1]] != 1]
    pairs = []
    for value, axis in factors:
        size = builder.shape(value)[axis]
        if size == 1:
            continue
        equal = [place for place in left if builder.shape(place[0])[place[1]] == size]
        if not equal:
            return False
        chosen = (value, axis) if (value, axis) in equal else equal[0]
        left.remove(chosen)
        pairs.append(((value, axis), chosen))
    if left:
        return False
    for (value, axis), (other, place) in pairs:
        builder.tie(value, axis, other, place)
    return True


def _ways(builder: Builder, data: ir.Value, output: ir.Value, block: Block) -> list[Way]:
    """Return one way per common factor of the axes before and after, outermost first: heads before their parts."""
    pairs = ((data, block.before), (output, block.after))
    sides = [(builder.sizes(value, *axes), axes, value) for value, axes in pairs]
    strides = [_strides(sizes) for sizes, _, _ in sides]
    cuts = sorted({*strides[0], *strides[1], int(np.prod(sides[0][0]))})
    if any(b % a for a, b in itertools.pairwise(cuts)):
        raise Opaque(f"{builder.shape(data)} to {builder.shape(output)} has no common factors")
    ways = []
    for stride, above in reversed(list(itertools.pairwise(cuts))):
        factor = above // stride
        places: Ints = np.full(factor, -1, np.int64)
        left, right, frozen, followed = [], [], [], []
        for (sizes, axes, value), own in zip(sides, strides, strict=True):
            for size, axis, unit in zip(sizes, axes, own, strict=True):
                ids = builder.known_ids(value, axis)
                if unit > stride or unit * size < above:
                    frozen.append(ids)
                    continue
                part = np.arange(size) // (stride // unit) % factor
                if places[0] < 0:
                    places = ids[np.arange(factor) * (stride // unit)]
                left.append(ids)
                right.append(places[part])
                followed.append(ids)
        joined = [np.concatenate(x) if x else as_ints([]) for x in (left, right, frozen, followed)]
        ways.append(Way(*joined))
    return ways


def _strides(sizes: Sequence[int]) -> list[int]:
    return [int(np.prod(sizes[i + 1 :], dtype=np.int64)) for i in range(len(sizes))]
