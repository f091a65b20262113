"""Inputs that steer an operator: shapes, axes, repeats, scales, indices, trip counts.

Random numbers would make most of these nodes fail. What fits follows from the node: from the declared shape of
its output where there is one, else from what leaves the data as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute, constant_ints
from onnxopt.inputs.consumers import shape_of

Number = int | float | bool
Answer = Sequence[Number] | Number | None
Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """The place where an input enters a node.

    Attributes:
        node: The node.
        length: Number of elements the input has.
        sizes: Sizes of the named axes.
    """

    node: ir.Node
    length: int
    sizes: Sizes

    def shape(self, index: int = 0) -> tuple[int, ...] | None:
        """Return the shape of one of the node's inputs, None where it is not known."""
        return self._resolved(self.node.inputs[index]) if len(self.node.inputs) > index else None

    def result(self, index: int = 0) -> tuple[int, ...] | None:
        """Return the declared shape of one of the node's outputs, None where it is not known."""
        return self._resolved(self.node.outputs[index])

    def _resolved(self, value: ir.Value | None) -> tuple[int, ...] | None:
        dims = shape_of(value)
        if dims is None:
            return None
        sizes = [d if isinstance(d, int) else self.sizes.get(d or "", -1) for d in dims]
        return tuple(sizes) if all(s >= 0 for s in sizes) else None

    def axes(self, index: int) -> list[int]:
        """Return the axes a node works on: those its input `index` holds, else the first ones."""
        given = constant_ints(self.node.inputs[index]) if len(self.node.inputs) > index else None
        rank = len(self.shape() or ())
        return [a % rank if rank else a for a in given] if given else list(range(self.length))


def find(node: ir.Node, index: int, length: int, sizes: Sizes) -> Answer:
    """Return what to feed to an input of a node that steers it; None where any number will do.

    Args:
        node: The node.
        index: Which of its inputs.
        length: Number of elements the input has.
        sizes: Sizes of the named axes.
    """
    rule = _RULES.get((node.op_type, index))
    return None if rule is None else rule(Site(node, length, sizes))


def _target_shape(site: Site) -> Answer:
    """A shape to reshape to: the declared one, else that of the data, else flat."""
    declared, data = site.result(), site.shape()
    if declared is not None and len(declared) == site.length and (data is None or _same_size(declared, data)):
        return declared
    if data is not None and len(data) == site.length:
        return data
    return [-1] if site.length == 1 else [*([1] * (site.length - 1)), -1]


def _same_size(a: Sequence[int], b: Sequence[int]) -> bool:
    return math.prod(a) == math.prod(b)


def _declared_or(number: int) -> Callable[[Site], Answer]:
    """Return a rule that gives the declared shape of the output, else this number throughout."""

    def rule(site: Site) -> Answer:
        declared = site.result()
        return declared if declared is not None and len(declared) == site.length else [number] * site.length

    return rule


def _ratios(site: Site) -> Answer:
    """How many times larger the output is than the input, per axis."""
    declared, data = site.result(), site.shape()
    if declared is None or data is None or len(declared) != site.length:
        return [1] * site.length
    return [o / i if i else 1 for o, i in zip(declared, data, strict=True)]


def _repeats(site: Site) -> Answer:
    found = _ratios(site)
    return [int(r) for r in found] if isinstance(found, list) else None


def _resized(index: int) -> Callable[[Site], Answer]:
    """Return a rule for scales (2) or sizes (3) of Resize, which may be about some axes only."""

    def rule(site: Site) -> Answer:
        declared, data = site.result(), site.shape()
        axes = list(attribute(site.node, "axes", ())) or list(range(site.length))
        if declared is None or data is None or len(axes) != site.length:
            return None if index == 2 else [4] * site.length
        if index == 3:
            return [declared[a] for a in axes]
        return [declared[a] / data[a] for a in axes]

    return rule


def _slice_end(site: Site) -> Answer:
    declared, axes = site.result(), site.axes(3)
    if declared is None or any(a >= len(declared) for a in axes):
        return [np.iinfo(np.int32).max] * site.length
    return [declared[a] for a in axes]


def _padding(site: Site) -> Answer:
    """All padding at the end, as much as the declared output asks for."""
    declared, data = site.result(), site.shape()
    half = site.length // 2
    if declared is None or data is None:
        return [0] * half + [1] * half
    axes = site.axes(3) if len(site.node.inputs) > 3 else list(range(len(data)))
    return [0] * half + [declared[a] - data[a] for a in axes[:half]]


def _largest(site: Site) -> Answer:
    declared = site.result()
    return declared[int(attribute(site.node, "axis", -1))] if declared else 1


def _parts(site: Site) -> Answer:
    shapes = [site.result(i) for i in range(len(site.node.outputs))]
    axis = int(attribute(site.node, "axis", 0))
    return [s[axis] for s in shapes if s] if all(shapes) else None


def _splits(site: Site) -> Answer:
    """Lengths of the pieces: one each, and the rest for the last."""
    data, ones = site.shape(), site.length - 1
    axis = int(attribute(site.node, "axis", 0))
    return [*([1] * ones), data[axis] - ones] if data and ones else 1


def _key_length(site: Site) -> Answer:
    keys = site.shape(1)
    return [keys[-2]] * site.length if keys else None


def _removed_axes(site: Site) -> Answer:
    """Axes whose reduction (or removal) gives the declared output."""
    data, declared = site.shape(), site.result()
    if data is None or declared is None:
        return list(range(site.length))
    keep = bool(attribute(site.node, "keepdims", 1)) and site.node.op_type != "Squeeze"
    for axes in itertools.combinations(range(len(data)), site.length):
        reduced = tuple(1 if i in axes else s for i, s in enumerate(data) if keep or i not in axes)
        removable = site.node.op_type != "Squeeze" or all(data[a] == 1 for a in axes)
        if reduced == declared and removable:
            return axes
    return list(range(site.length))


def _added_axes(site: Site) -> Answer:
    """Axes whose insertion gives the declared output."""
    data, declared = site.shape(), site.result()
    if data is None or declared is None:
        return list(range(site.length))
    for axes in itertools.combinations(range(len(declared)), site.length):
        if tuple(s for i, s in enumerate(declared) if i not in axes) == data and all(declared[a] == 1 for a in axes):
            return axes
    return list(range(site.length))


def _full_length(axis_name: str, default: int) -> Callable[[Site], Answer]:
    """Return a rule that gives the size of the axis that an attribute names."""

    def rule(site: Site) -> Answer:
        data = site.shape()
        axis = int(attribute(site.node, axis_name, default))
        return [data[axis]] * site.length if data else None

    return rule


def _depth(site: Site) -> Answer:
    declared = site.result()
    return declared[int(attribute(site.node, "axis", -1))] if declared else 10


def _range_end(site: Site) -> Answer:
    declared = site.result()
    return declared[0] if declared else 5


def _coordinates(site: Site) -> Answer:
    """Indices of GatherND and ScatterND: the first elements along every axis."""
    return [0] * site.length


def _constant(value: Number) -> Callable[[Site], Answer]:
    return lambda site: [value] * site.length


def _counting(site: Site) -> Answer:
    return list(range(site.length))


def _rules() -> Iterator[tuple[tuple[str, int], Callable[[Site], Answer]]]:
    zero, one = _constant(0), _constant(1)
    yield ("Reshape", 1), _target_shape
    for op in ("Expand", "CenterCropPad"):
        yield (op, 1), _declared_or(1)
    yield ("ConstantOfShape", 0), _declared_or(2)
    yield ("AffineGrid", 1), _affine_size
    yield ("Tile", 1), _repeats
    yield ("Upsample", 1), _ratios
    yield ("Resize", 2), _resized(2)
    yield ("Resize", 3), _resized(3)
    yield ("Slice", 1), zero
    yield ("Slice", 2), _slice_end
    yield ("Slice", 3), _counting
    yield ("Slice", 4), one
    yield ("Pad", 1), _padding
    yield ("Pad", 3), _counting
    yield ("TopK", 1), _largest
    yield ("Split", 1), _parts
    yield ("SplitToSequence", 1), _splits
    yield ("MaxUnpool", 2), _declared_or(1)
    yield ("TensorScatter", 2), zero
    yield ("Attention", 6), _key_length
    yield ("Unsqueeze", 1), _added_axes
    yield ("Squeeze", 1), _removed_axes
    for op in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
        yield (f"Reduce{op}", 1), _removed_axes
    for op, index in (("CumSum", 1), ("CumProd", 1), ("Trilu", 1), ("SequenceAt", 1), ("SequenceInsert", 2)):
        yield (op, index), zero
    yield ("OneHot", 1), _depth
    yield ("Range", 0), zero
    yield ("Range", 1), _range_end
    yield ("Range", 2), one
    yield ("Loop", 0), _constant(3)
    yield ("Loop", 1), _constant(True)
    yield ("Dropout", 1), _constant(0.5)
    yield ("Dropout", 2), _constant(False)
    yield ("BatchNormalization", 4), one
    yield ("NonMaxSuppression", 2), _constant(3)
    yield ("NonMaxSuppression", 3), _constant(0.5)
    yield ("NonMaxSuppression", 4), zero
    yield ("GatherND", 1), _coordinates
    yield ("ScatterND", 1), _coordinates
    yield ("ReverseSequence", 1), _full_length("time_axis", 0)
    for op in ("LSTM", "GRU", "RNN"):
        yield (op, 4), _full_length("_", 0)
    yield ("DFT", 1), _constant(8)
    yield ("DFT", 2), one
    yield ("STFT", 1), _constant(4)
    yield ("STFT", 3), _constant(8)
    for op in ("HannWindow", "HammingWindow", "BlackmanWindow"):
        yield (op, 0), _range_end
    for index, number in enumerate((8, 16, 8192, 0, 4096)):
        yield ("MelWeightMatrix", index), _constant(number)
    yield ("RoiAlign", 2), zero
    for index in (1, 2):
        yield ("QuantizeLinear", index), _constant(0.1 if index == 1 else 0)
        yield ("DequantizeLinear", index), _constant(0.1 if index == 1 else 0)
    for op, indices in (("QLinearConv", (1, 4, 6)), ("QLinearMatMul", (1, 4, 6))):
        for index in indices:
            yield (op, index), _constant(0.1)


def _affine_size(site: Site) -> Answer:
    """[N, C, H, W] (or with a depth) from the declared grid [N, H, W, 2]."""
    grid = site.result()
    return (
        [grid[0], 1, *grid[1:-1]] if grid is not None and len(grid) == site.length else [1, 1] + [4] * (site.length - 2)
    )


_RULES = dict(_rules())
