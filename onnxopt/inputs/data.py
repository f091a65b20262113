"""Real inputs: what they look like to everyone who runs models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

Feed = dict[str, Any]
"""Input name -> array; a list of arrays for a sequence, None for an optional input without a value."""


class Data:
    """Real inputs: can be iterated again and again, knows its length, holds one sample in memory at a time.

    Attributes:
        name: Where the samples come from, for reports.
        notes: What was done to make them fit, each in a sentence.
    """

    def __init__(
        self,
        name: str,
        samples: Callable[[], Iterator[Feed]],
        length: int | Callable[[], int],
        notes: Sequence[str] = (),
    ) -> None:
        """Describe where samples come from.

        Args:
            name: Where from, for reports.
            samples: Starts a new pass over them.
            length: How many there are, or how to find out.
            notes: What was done to make them fit.
        """
        self.name = name
        self.notes = tuple(notes)
        self._samples = samples
        self._length = length

    def __iter__(self) -> Iterator[Feed]:
        """Start a new pass over the samples."""
        return self._samples()

    def __len__(self) -> int:
        """Return the number of samples; the first time this may take a pass over them."""
        if callable(self._length):
            self._length = self._length()
        return self._length

    def select(self, chosen: Collection[int]) -> Data:
        """Return the samples of these numbers, counted from 0, in their own order."""
        wanted = frozenset(chosen)
        last = max(wanted, default=-1)
        return Data(
            self.name,
            lambda: (s for i, s in enumerate(itertools.islice(self._samples(), last + 1)) if i in wanted),
            len(wanted),
            self.notes,
        )

    def take(self, count: int) -> Data:
        """Return the first `count` samples, or all of them when there are fewer."""
        return Data(
            self.name,
            lambda: itertools.islice(self._samples(), count),
            lambda: min(count, len(self)),
            self.notes,
        )
