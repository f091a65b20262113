"""Reads a run of scales and shifts per channel behind a value as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.linear import affine, per_channel
from onnxopt.graph import Scope, only_use

_Array = np.ndarray[Any, Any]

CHANNEL_AXIS = 1


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelMap:
    """scale * x + shift with one number per channel each, in float64.

    Attributes:
        end: The value behind the last node; x itself when there is none.
        nodes: How many nodes there are.
    """

    end: ir.Value
    scale: _Array
    shift: _Array
    nodes: int


def read(value: ir.Value, scope: Scope, rank: int, channels: int) -> ChannelMap:
    """Return what is done to a value of so many axes and channels, by nodes of its graph that alone use it."""
    node = value.producer()
    graph = node.graph if node is not None else None
    scale: _Array = np.ones(channels)
    shift: _Array = np.zeros(channels)
    count = 0
    while (user := only_use(value)) is not None and user.graph is graph:
        found = affine(user, scope.opset)
        if found is None or found.x is not value:
            break
        factor, shifted = (
            np.full(channels, neutral) if array is None else per_channel(found, array, rank, CHANNEL_AXIS, channels)
            for array, neutral in ((found.scale, 1.0), (found.shift, 0.0))
        )
        if isinstance(factor, str) or isinstance(shifted, str):
            break
        scale, shift = scale * factor, shift * factor + shifted
        value, count = user.outputs[0], count + 1
    return ChannelMap(value, scale, shift, count)
