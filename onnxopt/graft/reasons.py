"""Why something is not cut or grafted: a closed list, so that programs and sweeps can count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

from onnxopt.errors import NothingDoneError, UsageError

Reason = Literal[
    "open cut",
    "empty cut",
    "nested",
    "no block",
    "no backbone",
    "unknown type",
    "random",
    "boundary",
    "shape",
    "adapter",
    "data",
    "opset",
    "cycle",
    "does not run",
    "not reproduced",
]
"""What keeps a cut or a graft from being made:

- open cut: the part needs values besides those that are named;
- empty cut: nothing lies between the boundaries;
- nested: boundaries lie in different bodies of If, Loop and Scan, or in a function;
- no block: the model has no such block;
- no backbone: no pooling and no linear layer was found in front of the outputs;
- unknown type: the element type of a boundary value is told by nothing;
- random: the part draws random numbers, so that nothing can be proven about it;
- boundary: the boundaries of host and donor do not belong together, or not in one way only;
- shape: no adapter makes a value fit where it is to go;
- adapter: one is needed, and adapters are not allowed;
- data: an adapter has to be fitted, and there is no data to fit it to;
- opset: operator sets cannot be reconciled;
- cycle: the host computes what goes into the cut from what comes out of it;
- does not run: ONNX Runtime cannot run the model, or the result;
- not reproduced: the result computes something else than it should.
"""

REASONS: tuple[Reason, ...] = get_args(Reason)


class RefusedError(NothingDoneError):
    """What was asked for cannot be done, or cannot be shown to be right; nothing was written.

    Attributes:
        reason: One of `REASONS`.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        """Say why, in one sentence that names what is concerned and what can be done."""
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def about(model: str) -> Iterator[None]:
    """Let what is said about a cut begin with the model it is in: "host" or "donor".

    Args:
        model: Which of them.

    Raises:
        RefusedError: If what is done refuses.
        UsageError: If what was given means nothing in the model.
    """
    try:
        yield
    except RefusedError as refused:
        raise RefusedError(refused.reason, f"In the {model}: {refused}") from refused
    except UsageError as error:
        raise UsageError(f"In the {model}: {error}", *error.options) from error
