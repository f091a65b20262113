"""What each position of the output of a convolution is computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Windows:
    """The parts of an input that a convolution looks at.

    Attributes:
        kernel: Size along each spatial axis.
        strides: Likewise.
        dilations: Likewise.
        groups: Groups of channels.
        padding: "NOTSET", "VALID", "SAME_UPPER" or "SAME_LOWER".
        pads: Zeros in front along each axis, then behind, for "NOTSET".
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    padding: str
    pads: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, kernel: tuple[int, ...], groups: int) -> Windows:
        """Read the attributes of a Conv."""
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        return cls(
            kernel,
            tuple(attribute(node, "strides", ones)),
            tuple(attribute(node, "dilations", ones)),
            groups,
            attribute(node, "auto_pad", "NOTSET"),
            tuple(attribute(node, "pads", zeros + zeros)),
        )

    def rows(self, x: Array, shape: tuple[int, ...], positions: Array) -> Array:
        """Return what is seen from some positions of the output, (rows, groups, channels of a group * kernel).

        Args:
            x: The input, (batch, channels, ...).
            shape: Shape of the output, (batch, channels, ...).
            positions: Indices into the flattened batch and spatial axes of the output.
        """
        sizes = shape[2:]
        batch, *places = np.unravel_index(positions, (shape[0], *sizes))
        extent = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        padded = np.pad(x, [(0, 0), (0, 0), *self._margins(x.shape[2:], sizes, extent)])
        seen = np.empty((len(positions), x.shape[1], *self.kernel), x.dtype)
        starts = [place * s for place, s in zip(places, self.strides, strict=True)]
        for offset in np.ndindex(*self.kernel):
            at = [start + o * d for start, o, d in zip(starts, offset, self.dilations, strict=True)]
            seen[(slice(None), slice(None), *offset)] = padded[(batch, slice(None), *at)]
        return seen.reshape(len(positions), self.groups, -1)

    def _margins(self, source: Sequence[int], sizes: Sequence[int], extent: Sequence[int]) -> list[tuple[int, int]]:
        if self.padding == "NOTSET":
            return list(zip(self.pads[: len(extent)], self.pads[len(extent) :], strict=True))
        margins = []
        for size, made, stride, covered in zip(source, sizes, self.strides, extent, strict=True):
            missing = max(0, (made - 1) * stride + covered - size) if self.padding.startswith("SAME") else 0
            front = missing // 2 if self.padding == "SAME_UPPER" else missing - missing // 2
            margins.append((front, missing - front))
        return margins


@dataclasses.dataclass(frozen=True, slots=True)
class Scattered:
    """The parts of an input that a transposed convolution adds up at a position of its output.

    Attributes:
        kernel: Size along each spatial axis.
        strides: Likewise.
        dilations: Likewise.
        groups: Groups of channels.
        front: What is cut off in front along each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    front: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, kernel: tuple[int, ...], groups: int) -> Scattered:
        """Read the attributes of a ConvTranspose that has explicit pads or none."""
        ones = (1,) * len(kernel)
        return cls(
            kernel,
            tuple(attribute(node, "strides", ones)),
            tuple(attribute(node, "dilations", ones)),
            groups,
            tuple(attribute(node, "pads", (0,) * 2 * len(kernel)))[: len(kernel)],
        )

    def rows(self, x: Array, shape: tuple[int, ...], positions: Array) -> Array:
        """Return what arrives at some positions of the output, (rows, groups, channels of a group * kernel).

        Args:
            x: The input, (batch, channels, ...).
            shape: Shape of the output, (batch, channels, ...).
            positions: Indices into the flattened batch and spatial axes of the output.
        """
        batch, *places = np.unravel_index(positions, (shape[0], *shape[2:]))
        seen = np.zeros((len(positions), x.shape[1], *self.kernel), x.dtype)
        for offset in np.ndindex(*self.kernel):
            # The input at t adds to the output at t * stride + offset * dilation - front.
            ways = [p + f - o * d for p, f, o, d in zip(places, self.front, offset, self.dilations, strict=True)]
            at = [way // s for way, s in zip(ways, self.strides, strict=True)]
            there = np.ones(len(positions), bool)
            for way, t, s, size in zip(ways, at, self.strides, x.shape[2:], strict=True):
                there &= (way % s == 0) & (t >= 0) & (t < size)
            seen[(there, slice(None), *offset)] = x[(batch[there], slice(None), *(t[there] for t in at))]
        return seen.reshape(len(positions), self.groups, -1)
