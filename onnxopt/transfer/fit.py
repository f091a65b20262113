"""What a layer's parameters must be for it to compute what the corresponding layer of another model computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.transfer.match import Pair
from onnxopt.transfer.quantized import Dequantized, Packed
from onnxopt.transfer.skeleton import Group, Member, Skeleton
from onnxopt.transfer.tensors import Array, Joined, Permuted, Reshaped, Sliced, Store, Tensor, Unwritable, chain

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SAME_RATIO = 1e-4


class MissingBias(Unwritable):
    """The target layer has no place for a bias that the source has."""


@dataclasses.dataclass(frozen=True)
class Write:
    """An array for a parameter of the target."""

    tensor: Tensor
    array: Array


class Ratios:
    """By how much layers must be scaled because their values are scaled differently on their way.

    One model multiplies queries by 1 / sqrt(width), another has that in its weights. The ways out of two corresponding
    layers say by how much they are scaled; where it differs, the weights take the quotient.
    """

    def __init__(self, source: Skeleton, target: Skeleton, pairs: Sequence[Pair]) -> None:
        """Take the matched models."""
        self._counterpart = {p.source.index: p.target.index for p in pairs}
        for kind in ("input", "output"):
            ends = ([g.index for g in s.groups if g.kind == kind] for s in (source, target))
            self._counterpart.update(zip(*ends, strict=False))
        self._out = _gains(source), _gains(target)

    def of(self, pair: Pair) -> float:
        """Return the factor of a layer.

        Raises:
            Unwritable: If its ways out ask for different ones.
        """
        found = []
        for (after, label), gain in self._out[0].get(pair.source.index, {}).items():
            other = self._out[1].get(pair.target.index, {}).get((self._counterpart.get(after, -1), label))
            # The operands of one product share their scale: it is put into the first.
            if "N" not in label and not label.startswith("M1S") and gain and other:
                found.append(gain / other)
        if not found or all(abs(f - 1) < _SAME_RATIO for f in found):
            return 1.0
        if max(found) - min(found) > _SAME_RATIO * max(abs(f) for f in found):
            raise Unwritable("its results are scaled differently on different ways")
        return found[0]


def _gains(skeleton: Skeleton) -> dict[int, dict[tuple[int, str], float | None]]:
    found: dict[int, dict[tuple[int, str], float | None]] = {}
    for group in skeleton.groups:
        for edge in group.edges:
            found.setdefault(edge.source, {})[group.index, edge.label] = edge.gain
    return found


def fit(pair: Pair, ratio: float, store: Store) -> list[Write]:
    """Return what to write into the target layer.

    Args:
        pair: The layers.
        ratio: What the source's results are to be multiplied by.
        store: Where the source's parameters are.

    Raises:
        Unwritable: If the target cannot hold it; the message is the reason.
    """
    source, target = pair.source, pair.target
    same = np.allclose(source.onward, target.onward, rtol=1e-6, atol=1e-7)
    if ratio == 1.0 and same and _same_members(source, target):
        return [Write(b, a.read(store)) for a, b in zip(source.tensors(), target.tensors(), strict=True)]
    if source.kind not in ("linear", "conv", "affine", "embedding"):
        raise Unwritable("its results are scaled differently")
    scale_by = source.onward[0] / target.onward[0]
    weight, scale, shift = _effective(source, ratio * (1.0 if same else scale_by), store)
    if not same:
        shift = shift + (source.onward[1] - target.onward[1]) / target.onward[0]
    found = []
    if target.weight is not None:
        assert weight is not None
        found.append(Write(target.weight, weight))
        scale = np.ones(())
    return [*found, *_members(target.members, scale, shift)]


def _same_members(source: Group, target: Group) -> bool:
    kinds = [(m.kind, m.epsilon) for m in source.members]
    return kinds == [(m.kind, m.epsilon) for m in target.members]


def _effective(group: Group, ratio: float, store: Store) -> tuple[Array | None, Array, Array]:
    """Return the weight with what follows folded in, and scale and shift; float64."""
    scale: Array = np.ones(())
    shift: Array = np.zeros(())
    for member in group.members:
        factor, more = member.affine(store)
        scale, shift = scale * factor, shift * factor + more
    scale, shift = scale * ratio, shift * ratio
    if group.weight is None:
        return None, scale, shift
    weight = group.weight.read(store).astype(np.float64)
    if scale.ndim:
        if weight.shape[group.channels] != scale.shape[0]:
            raise Unwritable("a BatchNormalization after a transposed convolution in groups is not folded")
        scale = scale.reshape(tuple(-1 if i == group.channels else 1 for i in range(weight.ndim)))
    return weight * scale, np.ones(()), shift


def _members(members: Sequence[Member], scale: Array, shift: Array) -> list[Write]:
    """Return what makes members scale and shift as wanted."""
    found: list[Write] = []
    holders = [i for i, m in enumerate(members) if m.kind != "scale"]
    factors = [i for i, m in enumerate(members) if m.kind != "bias"]
    if not holders and np.any(shift != 0):
        raise MissingBias("it has no bias to hold that of the source")
    if not factors and np.any(scale != 1):
        raise Unwritable("it has no scale to hold that of the source")
    for index, member in enumerate(members):
        width = member.parts[0].shape
        factor = scale if factors and index == factors[0] else np.ones(())
        bias = shift if holders and index == holders[-1] else np.zeros(())
        # Weights take the scale where there are any; of a normalization it is in front of the shift.
        arrays: tuple[Array, ...]
        if member.kind == "norm":
            # Mean 0 and variance 1 leave the epsilon to undo.
            arrays = (factor * np.sqrt(1 + member.epsilon), bias, np.zeros(()), np.ones(()))
        else:
            arrays = (factor if member.kind == "scale" else bias,)
        found += [Write(p, np.broadcast_to(a, width)) for p, a in zip(member.parts, arrays, strict=True)]
    return found


def describe(pair: Pair, ratio: float) -> str:
    """Say in words what happens to parameters on their way, empty for a plain copy."""
    said: list[str] = []
    # The weight, or without one the first vector, speaks for all.
    before, after = form(next(pair.source.tensors())), form(next(pair.target.tensors()))
    if before != after:
        said.append(f"{before or 'plain'} to {after or 'plain'}")
    folded, neutral = ("norm" in [m.kind for m in g.members] for g in (pair.source, pair.target))
    if folded and not neutral:
        said.append("BatchNormalization folded")
    elif neutral and not folded:
        said.append("BatchNormalization made neutral")
    if ratio != 1:
        said.append(f"scaled by {ratio:.4g}")
    return ", ".join(said)


def form(tensor: Tensor) -> str:
    """Say how a parameter is stored."""
    words: list[str] = []
    for current in chain(tensor):
        if isinstance(current, Sliced):
            words.append("part")
        elif isinstance(current, Permuted):
            words.append("transposed")
        elif isinstance(current, Reshaped) and int(np.prod(current.shape)) != max(current.shape, default=1):
            words.append("reshaped")
        elif isinstance(current, Joined):
            words.append("joined")
        elif isinstance(current, Dequantized):
            words.append(current.dtype.name.lower())
        elif isinstance(current, Packed):
            words.append(f"{current.bits} bits")
    return " ".join(dict.fromkeys(words))


def is_lossy(skeleton: Skeleton) -> bool:
    """Whether any parameter is stored in less than 32 bits."""
    return any(is_narrow(t) for g in skeleton.layers for t in g.tensors())


def is_narrow(tensor: Tensor) -> bool:
    """Whether a parameter is stored in less than 32 bits."""
    return is_quantized(tensor) or any((v.dtype or ir.DataType.FLOAT) in _NARROW for v in tensor.leaves())


def is_quantized(tensor: Tensor) -> bool:
    """Whether a parameter is stored as integers."""
    return any(
        isinstance(t, (Dequantized, Packed)) or (isinstance(t, Joined) and any(map(is_quantized, t.sources)))
        for t in chain(tensor)
    )
