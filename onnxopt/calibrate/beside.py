"""Runs one model after the other beside a reference, whose values are computed once and kept as far as they fit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibrate.watched import Watched
from onnxopt.contract import JointObserver, Progress
from onnxopt.feeds import Data, Feed
from onnxopt.runtime import RunOptions

KEPT_BYTES = 256 << 20
"""What is kept of the reference. The samples that do not fit are run again for every model."""


class Beside:
    """Shows values of models beside those of a reference. A callable of `onnxopt.contract.ShowBeside`."""

    def __init__(
        self,
        reference: ir.Model,
        names: Sequence[str],
        data: Data | Sequence[Feed],
        options: RunOptions,
        progress: Progress,
        *,
        room: int | None = None,
    ) -> None:
        """Run nothing yet.

        Args:
            reference: It is not changed, and must not change in between.
            names: Values of its main graph that observers may look at.
            data: The samples, run one at a time.
            options: How to run the models; the runtime's optimizations are on.
            progress: Told which sample is being run.
            room: Bytes of values that may be kept; `KEPT_BYTES` by default.
        """
        self._reference = Watched(reference, names, options)
        self._data, self._options, self._progress = data, options, progress
        self._kept: dict[int, Mapping[str, np.ndarray]] = {}
        self._room = KEPT_BYTES if room is None else room

    def __call__(self, changed: ir.Model, observers: Sequence[JointObserver], samples: Collection[int]) -> None:
        """Show some samples; of each model only what leads to the values in question is computed.

        All values of one sample are in memory together.

        Args:
            changed: It is not changed.
            observers: Who looks at which values.
            samples: Their numbers.

        Raises:
            ValueError: If a main graph has no such value.
            RuntimeFailure: If a model does not run.
        """
        if not observers:
            return
        watched = Watched(changed, [name for o in observers for name in o.changed], self._options)
        count = len(self._reference.names) + len(watched.names)
        self._progress.stage(f"observing {count} values of two models", total=len(samples))
        missing = not self._kept.keys() >= set(samples)
        with self._reference if missing else contextlib.nullcontext(), watched as after:
            for index, feed in self._chosen(samples):
                left, right = self._values(index, feed), after.values(feed)
                for observer in observers:
                    observer.add(
                        [left[name] for name in observer.reference], [right[name] for name in observer.changed]
                    )
                self._progress.advance()

    def _chosen(self, samples: Collection[int]) -> Iterator[tuple[int, Feed]]:
        """Yield samples with their numbers, and read none behind the last."""
        wanted = set(samples)
        for index, feed in enumerate(self._data):
            if not wanted:
                return
            if index in wanted:
                wanted.remove(index)
                yield index, feed

    def _values(self, index: int, feed: Feed) -> Mapping[str, np.ndarray]:
        if index in self._kept:
            return self._kept[index]
        values = self._reference.values(feed)
        size = sum(array.nbytes for array in values.values() if isinstance(array, np.ndarray))
        if size <= self._room and all(isinstance(array, np.ndarray) for array in values.values()):
            self._kept[index] = values
            self._room -= size
        return values
