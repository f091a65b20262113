"""What values take on when a model runs, and the grids of 8 bits that follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.int8 import Between, Layer, Ties
from onnxopt.contract import Observer
from onnxopt.graph import constant_array, constant_tensor
from onnxopt.numeric import grids
from onnxopt.numeric.grids import Array, Grid
from onnxopt.numeric.histogram import Histogram, Method, value_range
from onnxopt.numeric.means import ChannelMeans

LEVELS = 255
"""The largest integer of 8 bits."""


class Seen:
    """What the values that may become integers take on: a histogram for each set that shares a grid.

    Attributes:
        ties: Which values share a grid.
        observers: What is to watch the values of a model that runs, by name.
    """

    def __init__(self, layers: list[Layer], others: list[Between], method: Method) -> None:
        """Prepare to watch.

        Args:
            layers: Whose inputs and outputs are wanted.
            others: What lies between them.
            method: How ranges follow from what was seen.
        """
        self.ties = Ties(others)
        self._method = method
        self._histograms: dict[ir.Value, Histogram] = {}
        self._grids: dict[ir.Value, Grid] = {}
        self._means: dict[ir.Value, ChannelMeans] = {}
        self._multiples = {r: (b.source, b.factor) for b in others if b.factor and self.ties.alone(r := b.results[0])}
        self.observers: dict[str, list[Observer]] = {}
        passed = {v for b in others for v in b.results if self.ties.of(v) is self.ties.of(b.sources[0][1])}
        passed |= self._multiples.keys()
        sources = [*(x.source for x in layers), *(v for b in others for _, v in b.sources)]
        for value in [*sources, *(x.result for x in layers), *(v for b in others for v in b.results)]:
            histogram = self._histograms.setdefault(self.ties.of(value), Histogram())
            # What is only handed on has been counted where it came from.
            if constant_tensor(value) is None and value not in passed and value.name:
                self.observers[value.name] = [histogram]

    def watch_means(self, layers: Iterable[Layer]) -> None:
        """Take in the means of what layers are applied to as well."""
        for item in layers:
            if item.source not in self._means and constant_tensor(item.source) is None:
                self._means[item.source] = means = ChannelMeans()
                self.observers.setdefault(item.source.name or "", []).append(means)

    def means(self, value: ir.Value) -> Array | None:
        """Return the means of a layer's input channels; None where they were not watched."""
        return self._means[value].means if value in self._means else None

    def is_multiple(self, value: ir.Value) -> bool:
        """Whether a value is what the integers of another one stand for on a coarser or finer grid."""
        return value in self._multiples

    def has_step(self, value: ir.Value) -> bool:
        """Whether the levels of a value are numbers that float32 holds, which a factor may prevent."""
        numbers = np.finfo(np.float32)
        return bool(numbers.tiny <= self.grid(value).scale <= numbers.max / LEVELS)

    def histogram(self, value: ir.Value) -> Histogram:
        """Return what the values that share a grid with this one took on."""
        if value in self._multiples:
            return self.histogram(self._multiples[value][0])
        return self._histograms[self.ties.of(value)]

    def grid(self, value: ir.Value) -> Grid:
        """Return the grid of a value, or of a constant."""
        constant = constant_array(value)
        if constant is not None:
            return grids.asymmetric(*grids.value_range(constant))
        if value in self._multiples:
            source, factor = self._multiples[value]
            grid = self.grid(source)
            with np.errstate(over="ignore"):  # see `has_step`
                return dataclasses.replace(grid, scale=np.asarray(grid.scale * np.float32(factor)))
        key = self.ties.of(value)
        if key not in self._grids:
            low, high = value_range(self._histograms[key], self._method)
            self._grids[key] = grids.asymmetric(np.asarray(low, np.float32), np.asarray(high, np.float32))
        return self._grids[key]
