"""Cut and paste: a part cut out of a model, or put into another, with a proof of what the result computes."""

from onnxopt.graft.extraction import Extraction, extract
from onnxopt.graft.reasons import REASONS, Reason, RefusedError
from onnxopt.graft.transplant import Grafted, graft

__all__ = ["REASONS", "Extraction", "Grafted", "Reason", "RefusedError", "extract", "graft"]
