"""Which residual block the outputs miss least: found by leaving each of them out, in two rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxopt.analysis.blocks import Block
from onnxopt.contract import ShowBeside
from onnxopt.graph import copied, remove_unused, replace_value
from onnxopt.repair.outputs import OutputError

FIRST_SAMPLES = 8
"""Every block is tried on so many samples at least."""
FIRST = GOES_ON = 4
"""Every block is tried on one of so many samples, and one of so many blocks on the others too."""


def leave_out(model: ir.Model, block: Block) -> None:
    """Let what goes into a block take the place of what comes out.

    Args:
        model: The model, or a copy of it, that values of the same names are in.
        block: The block.
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    old, new = values[block.end.name], values[block.start.name]
    producer = old.producer()
    assert producer is not None, "nodes compute it"
    replace_value(old, new)
    remove_unused(producer)


class Contest:
    """Blocks of a model, each left out on trial.

    On few samples, the order of blocks is nearly that on all of them. How similar the output of a block is to its input
    says nothing of the kind: over the blocks of three networks the rank correlation with the error was -0.07 to 0.23.
    """

    def __init__(
        self, model: ir.Model, blocks: Sequence[Block], outputs: Sequence[str], show: ShowBeside, samples: int
    ) -> None:
        """Run nothing yet.

        Args:
            model: It is not changed, and must not change before the ranking is complete.
            blocks: Its blocks.
            outputs: Names of the outputs that errors are of.
            show: Shows values beside those of the model that errors are measured from.
            samples: The first so many samples are run.
        """
        self._model, self._outputs, self._show = model, tuple(outputs), show
        first = max(samples // FIRST, min(samples, FIRST_SAMPLES))
        self._first, self._others = range(first), range(first, samples)
        self._blocks = list(blocks)
        self._errors = [OutputError(self._outputs) for _ in blocks]

    def ranked(self) -> Iterator[tuple[Block, float]]:
        """Yield blocks with the error of the outputs without them on all samples, the least first.

        Those that went no further after the first round follow in its order, each tried on the other samples when it is
        its turn. Errors that are no finite number come last.
        """
        order = self._tried(range(len(self._blocks)), self._first)
        best = -(-len(order) // GOES_ON)
        for index in self._tried(order[:best], self._others):
            yield self._blocks[index], self._errors[index].error
        for index in order[best:]:
            self._tried([index], self._others)
            yield self._blocks[index], self._errors[index].error

    def _tried(self, indexes: Sequence[int], samples: range) -> list[int]:
        """Run samples without one block after the other, and return these in the order of their errors so far."""
        for index in indexes if samples else ():
            trial = copied(self._model)
            leave_out(trial, self._blocks[index])
            self._show(trial, [self._errors[index]], samples)
        return sorted(indexes, key=self._rank)

    def _rank(self, index: int) -> float:
        error = self._errors[index].error
        return error if math.isfinite(error) else math.inf
