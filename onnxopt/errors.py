"""What can go wrong, each with the exit code the command line ends with."""

from __future__ import annotations

from typing import ClassVar


class OnnxOptError(Exception):
    """Any error onnxopt raises on purpose. The message is one sentence that says what to do.

    Attributes:
        exit_code: What the command line exits with: 1 when a stated requirement is not met, 2 when the input,
            the options or the output cannot be used.
    """

    exit_code: ClassVar[int] = 2


class UsageError(OnnxOptError):
    """An option, a pass name or a pipeline string that cannot be used.

    Attributes:
        options: The options that the message names as the arguments they are, so that the command line can name them
            as its own.
    """

    def __init__(self, message: str, *options: str) -> None:
        """Say what is wrong, and which of the words are options."""
        super().__init__(message)
        self.options = options


class ModelError(OnnxOptError):
    """A model that cannot be read, is malformed, or reaches outside its folder."""


class OutputError(OnnxOptError):
    """An output that cannot be written."""


class DataError(OnnxOptError):
    """Inputs, labels or calibration data that do not fit the model."""


class RuntimeFailure(OnnxOptError):  # noqa: N818 - "RuntimeError" would shadow the builtin
    """ONNX Runtime is missing, or cannot load or run a model."""


class VerificationError(OnnxOptError):
    """The result does not compute what the original computes, or misses the user's budget."""

    exit_code: ClassVar[int] = 1


class NothingDoneError(OnnxOptError):
    """What was asked for by name cannot be done to this model."""

    exit_code: ClassVar[int] = 1
