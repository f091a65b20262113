"""Parameters from one model to another, by structure: `onnxopt.transfer`."""

from onnxopt.transfer.run import transfer

__all__ = ["transfer"]
