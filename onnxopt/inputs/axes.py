"""Sizes for the dynamic axes of a model's inputs.

An axis has a fixed size, a name, an expression over names, or nothing at all. Axes of the same name get the
same size. What size is plausible follows from what the axis seems to be: its name says so, or its position.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir

from onnxopt.errors import DataError, UsageError
from onnxopt.inputs.consumers import required_sizes
from onnxopt.registry import nearest

MAX_ELEMENTS = 1 << 28
"""A generated input never has more elements than this."""

_USUAL_ELEMENTS = 1 << 22
"""Chosen sizes are halved until every input has at most this many elements, where fixed sizes allow it."""


class Kind(enum.Enum):
    """What an axis seems to be."""

    BATCH = "batch"
    SEQUENCE = "sequence"
    PAST = "past"
    TOTAL = "total"
    HEIGHT = "height"
    WIDTH = "width"
    DEPTH = "depth"
    SAMPLES = "samples"
    CHANNELS = "channels"
    FEATURES = "features"
    COUNT = "count"


SIZES: Mapping[Kind, tuple[int, ...]] = {
    Kind.BATCH: (1, 2, 3),
    Kind.SEQUENCE: (16, 7, 33),
    Kind.PAST: (8, 5, 12),
    Kind.HEIGHT: (96, 64, 160),
    Kind.WIDTH: (128, 160, 64),
    Kind.DEPTH: (8, 16, 8),
    Kind.SAMPLES: (16000, 8000, 12000),
    Kind.CHANNELS: (3,),
    Kind.FEATURES: (8,),
    Kind.COUNT: (4, 3, 6),
}
"""Size of an axis in the first, second, third ... set of inputs."""

_WORDS: tuple[tuple[Kind, str], ...] = (
    (Kind.BATCH, "batch batches batchsize bs"),
    (Kind.TOTAL, "total"),
    (Kind.PAST, "past cache cached kv"),
    (Kind.HEIGHT, "height h rows"),
    (Kind.WIDTH, "width w cols columns"),
    (Kind.DEPTH, "depth d"),
    (Kind.SAMPLES, "samples audio audios wav wavs waveform waveforms signal signals"),
    (Kind.CHANNELS, "channel channels c"),
    (Kind.FEATURES, "feature features hidden embed embedding"),
    (
        Kind.SEQUENCE,
        "seq sequence sequences seqlen len length lengths token tokens time times t frame frames step steps l s "
        "text words chars bytes src tgt source target encoder decoder",
    ),
    (Kind.COUNT, "num count boxes points objects rois"),
)
_KIND_OF_WORD = {word: kind for kind, words in _WORDS for word in words.split()}

_AUDIO_WORDS = frozenset(
    {
        "audio",
        "audios",
        "wav",
        "wavs",
        "waveform",
        "waveforms",
        "speech",
        "signal",
        "signals",
        "samples",
        "pcm",
        "sound",
    }
)
_RATE_WORDS = (frozenset({"sr"}), frozenset({"sample", "rate"}), frozenset({"sampling", "rate"}))
"""Names of an input that tells the sampling rate: the model takes sound."""
_STATE_WORDS = frozenset({"state", "states", "hidden", "cell", "hx", "cx", "h", "c", "hn", "cn"})
_CACHE_WORDS = frozenset({"past", "cache", "key", "keys", "value", "values", "kv"})
_IMAGE_CHANNELS = (1, 3, 4)


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an input whose size is not fixed.

    Attributes:
        input: Name of the input.
        index: Which of its axes.
        key: What it is called in `--shape`: its name, or "input:index" when it has none.
        expression: The expression it is declared as, over the names of other axes; empty when it is none.
        kind: What it seems to be.
    """

    input: str
    index: int
    key: str
    expression: str
    kind: Kind

    def __str__(self) -> str:
        """Return its name, or "?" when it has none."""
        return "?" if self.key == f"{self.input}:{self.index}" else self.key


class Axes:
    """The axes of a model's inputs.

    Attributes:
        shapes: Per input its declared shape: a size or an `Axis` per axis.
    """

    def __init__(self, inputs: list[ir.Value]) -> None:
        """Look at the declared shapes, and at what the consumers of the inputs require.

        Args:
            inputs: The inputs to be fed.
        """
        names = {d for value in inputs for d in _dims(value) if isinstance(d, str)}
        self.shapes: dict[str, tuple[int | Axis, ...]] = {
            value.name or "": _shape(value, names, inputs) for value in inputs
        }
        self._required: dict[str, int] = {}
        for value in inputs:
            shape = self.shapes[value.name or ""]
            for index, size in required_sizes(value, len(shape)).items():
                axis = shape[index]
                if isinstance(axis, Axis):
                    self._required.setdefault(axis.key, size)

    def __iter__(self) -> Iterator[Axis]:
        """Yield every dynamic axis."""
        for shape in self.shapes.values():
            yield from (axis for axis in shape if isinstance(axis, Axis))

    @property
    def names(self) -> tuple[str, ...]:
        """What can be given a size: names of axes, names within expressions, "input:index" for the nameless."""
        found: dict[str, None] = {}
        for axis in self:
            found.update(dict.fromkeys(_symbols(axis.expression) if axis.expression else [axis.key]))
        return tuple(found)

    def overrides(self, shape: Mapping[str, int]) -> dict[str, int]:
        """Return the user's sizes by the key of an axis.

        Args:
            shape: Sizes by name, or by "input:index".

        Raises:
            UsageError: If there is no such axis, it is fixed to another size, or the size is negative.
        """
        found: dict[str, int] = {}
        for name, size in shape.items():
            if size < 0:
                raise UsageError(f"The size of the axis {name} must be at least 0, not {size}.")
            if name in self.names:
                found[name] = size
                continue
            axis = self._position(name)
            if isinstance(axis, Axis):
                found[axis.key] = size
            elif axis != size:
                raise UsageError(f"The axis {name} has the fixed size {axis}; it cannot be {size}.")
        return found

    def _position(self, name: str) -> int | Axis:
        """Return the axis that "input:index" stands for.

        Raises:
            UsageError: If there is none.
        """
        owner, _, index = name.rpartition(":")
        shape = self.shapes.get(owner)
        if shape is not None and index.isdigit() and int(index) < len(shape):
            return shape[int(index)]
        known = f"It has {', '.join(self.names)}." if self.names else "All its axes are fixed."
        raise UsageError(
            f'The inputs of the model have no dynamic axis "{name}".{nearest(name, list(self.names))} {known}'
        )

    def choose(
        self, index: int, overrides: Mapping[str, int], sizes: Mapping[Kind, tuple[int, ...]] = SIZES
    ) -> dict[str, int]:
        """Choose a size for every name.

        Args:
            index: Which set of inputs it is for; sizes differ between sets.
            overrides: Sizes that stand, by key.
            sizes: Sizes to choose from, by kind.
        """
        kinds: dict[str, Kind] = {axis.key: axis.kind for axis in self if not axis.expression}
        for axis in self:
            for name in _symbols(axis.expression):
                kinds.setdefault(name, _kind_of_name(name) or Kind.COUNT)
        chosen: dict[str, int] = {}
        for name, kind in kinds.items():
            options = sizes.get(kind) or SIZES.get(kind, (1,))
            chosen[name] = self._required.get(name, options[index % len(options)])
        chosen.update(overrides)
        for axis in self:
            if axis.kind is Kind.TOTAL and not axis.expression and axis.key not in overrides:
                chosen[axis.key] = self._total(chosen)
        self._shrink(chosen, frozenset(overrides) | frozenset(self._required))
        return chosen

    def _shrink(self, chosen: dict[str, int], kept: frozenset[str]) -> None:
        """Halve the largest sizes that may change, until no input is unusually large."""
        for shape in self.shapes.values():
            keys = {axis.key for axis in shape if isinstance(axis, Axis)} - kept
            while math.prod(a if isinstance(a, int) else _size(a, chosen) for a in shape) > _USUAL_ELEMENTS:
                largest = max(keys & set(chosen), key=lambda k: chosen[k], default="")
                if chosen.get(largest, 1) <= 1:
                    break
                chosen[largest] //= 2

    def _total(self, chosen: Mapping[str, int]) -> int:
        """Return past plus new length, for an axis that is called the total length."""
        by_kind = {axis.kind: chosen[axis.key] for axis in self if axis.key in chosen}
        return by_kind.get(Kind.PAST, 0) + by_kind.get(Kind.SEQUENCE, SIZES[Kind.SEQUENCE][0])

    def concrete(self, name: str, chosen: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of an input under the chosen sizes.

        Raises:
            DataError: If it is too large to be generated.
        """
        shape = tuple(axis if isinstance(axis, int) else _size(axis, chosen) for axis in self.shapes[name])
        if math.prod(shape) > MAX_ELEMENTS:
            raise DataError(
                f"The input {name} of shape {list(shape)} is too large to be generated; give smaller sizes with "
                "--shape or real inputs with --data."
            )
        return shape


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """Compute an expression such as "past + 2*length"; None when it is none or a name has no size."""
    tree = _parse(expression)
    return None if tree is None else _compute(tree, sizes)


def words(name: str) -> list[str]:
    """Split a name into its lower-case words: "pastSequence_len.1" gives past, sequence, len."""
    return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _size(axis: Axis, chosen: Mapping[str, int]) -> int:
    if axis.key in chosen:
        return chosen[axis.key]
    found = evaluate(axis.expression, chosen)
    return max(found or 0, 0)


def _dims(value: ir.Value) -> tuple[int | str | None, ...]:
    """Return the declared axes: a size, a name, or None for the unknown and what exporters write for it."""
    dims: list[int | str | None] = []
    for dim in value.shape or ():
        if isinstance(dim, int):
            dims.append(dim if dim >= 0 else None)
        else:
            text = (dim.value or "").strip()
            dims.append(text if re.search(r"[A-Za-z]", text) and text.lower() != "none" else None)
    return tuple(dims)


def _shape(value: ir.Value, names: set[str], inputs: list[ir.Value]) -> tuple[int | Axis, ...]:
    dims = _dims(value)
    if value.shape is None:
        dims = _guessed_dims(value)
    return tuple(
        dim if isinstance(dim, int) else _axis(value, index, dim, dims, names, inputs) for index, dim in enumerate(dims)
    )


def _guessed_dims(value: ir.Value) -> tuple[int | str | None, ...]:
    """Return a shape for an input of unknown rank: that of what it meets first, else one axis."""
    needed = required_sizes(value, None)
    rank = max(needed, default=0) + 1
    for use in value.uses():
        if use.node.op_type in ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization"):
            rank = 4
    return tuple(needed.get(i) for i in range(rank))


def _axis(
    value: ir.Value,
    index: int,
    dim: str | None,
    dims: tuple[int | str | None, ...],
    names: set[str],
    inputs: list[ir.Value],
) -> Axis:
    owner = value.name or ""
    expression = dim if dim is not None and _is_expression(dim, names) else ""
    kind = _kind_of_name(dim, index) if dim is not None else None
    if kind is None:
        kind = _kind_of_position(value, index, dims, inputs)
    return Axis(owner, index, dim if dim is not None else f"{owner}:{index}", expression, kind)


def _is_expression(dim: str, names: set[str]) -> bool:
    """Whether a name is meant as arithmetic. "batch-size" is a name, unless "batch" and "size" are axes too."""
    tree = _parse(dim)
    if tree is None or isinstance(tree, (ast.Name, ast.Attribute)):
        return False
    symbols = _symbols(dim)
    return bool(symbols) and (all(s in names for s in symbols) or bool(re.search(r"[+*/%() ]", dim)))


def _kind_of_name(name: str, index: int | None = None) -> Kind | None:
    """Return what an axis of this name seems to be; None when the name does not say."""
    found = [_KIND_OF_WORD[w] for w in words(name) if w in _KIND_OF_WORD]
    for kind, _ in _WORDS:
        if kind in found:
            # A lone letter says little: "N" is a batch in front only, and exporters number axes s0, s1, d0 ...
            if re.fullmatch(r"[a-z]\d+", name):
                return None
            return kind
    return Kind.BATCH if index == 0 and name.lower() in ("n", "b") else None


def _kind_of_position(value: ir.Value, index: int, dims: tuple[int | str | None, ...], inputs: list[ir.Value]) -> Kind:
    rank = len(dims)
    about = set(words(value.name or ""))
    if index == 0 and rank > 1:
        return Kind.BATCH
    if rank == 1:
        batched = any(len(_dims(v)) > 1 and not isinstance(_dims(v)[0], int) for v in inputs)
        return Kind.BATCH if batched else Kind.SAMPLES if about & _AUDIO_WORDS else Kind.COUNT
    if about & _CACHE_WORDS and rank >= 3:
        return Kind.PAST if index == rank - 2 else Kind.CHANNELS
    if rank in (4, 5) and "mask" not in about:
        return _image_axis(index, dims)
    if rank == 2 and value.dtype is not None and value.dtype.is_floating_point():
        sound = about & _AUDIO_WORDS or any(rate <= set(words(v.name or "")) for rate in _RATE_WORDS for v in inputs)
        return Kind.SAMPLES if sound else Kind.FEATURES
    if rank == 3 and index == 1 and about & _STATE_WORDS and isinstance(dims[0], int) and isinstance(dims[2], int):
        return Kind.BATCH  # the state of a recurrent layer: layers, batch, width
    if rank == 3 and index == 2 and not isinstance(dims[1], int):
        return Kind.FEATURES
    return Kind.SEQUENCE


def _image_axis(index: int, dims: tuple[int | str | None, ...]) -> Kind:
    """Return which axis of a batch of images (or volumes) this is, channels first unless the last axis is they."""
    rank = len(dims)
    last = dims[-1] in _IMAGE_CHANNELS and dims[1] not in _IMAGE_CHANNELS
    spatial = (Kind.HEIGHT, Kind.WIDTH) if rank == 4 else (Kind.DEPTH, Kind.HEIGHT, Kind.WIDTH)
    order: tuple[Kind, ...] = (Kind.BATCH, *spatial, Kind.CHANNELS) if last else (Kind.BATCH, Kind.CHANNELS, *spatial)
    return order[index]


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., int]] = {
    "max": max,
    "Max": max,
    "min": min,
    "Min": min,
    "floor": math.floor,
    "ceil": math.ceil,
    "ceiling": math.ceil,
}


def _parse(text: str) -> ast.expr | None:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return None


def _symbols(expression: str) -> list[str]:
    """Return the names in an expression, in order, each once."""
    found: dict[str, None] = {}

    def visit(node: ast.expr) -> None:
        if isinstance(node, (ast.Name, ast.Attribute)):
            found[ast.unparse(node)] = None
        elif isinstance(node, ast.BinOp):
            visit(node.left)
            visit(node.right)
        elif isinstance(node, ast.UnaryOp):
            visit(node.operand)
        elif isinstance(node, ast.Call):
            for argument in node.args:
                visit(argument)

    tree = _parse(expression)
    if tree is not None:
        visit(tree)
    return list(found)


def _compute(tree: ast.expr, sizes: Mapping[str, int]) -> int | None:
    if isinstance(tree, (ast.Name, ast.Attribute)):
        return sizes.get(ast.unparse(tree))
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        inner = _compute(tree.operand, sizes)
        return None if inner is None else -inner
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        left, right = _compute(tree.left, sizes), _compute(tree.right, sizes)
        if left is None or right is None or (right == 0 and not isinstance(tree.op, (ast.Add, ast.Sub, ast.Mult))):
            return None
        return int(_BINARY[type(tree.op)](left, right))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS and tree.args:
        values = [_compute(argument, sizes) for argument in tree.args]
        if any(v is None for v in values):
            return None
        return int(_FUNCTIONS[tree.func.id](*values))
    return None
