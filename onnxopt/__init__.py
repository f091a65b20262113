"""onnxopt: an ONNX graph optimizer whose every edit is verified, measured and reported.

    result = onnxopt.optimize("model.onnx")
    print(result.report)
    onnxopt.save(result.model, "model.opt.onnx")

Names are resolved on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxopt.advise import advise
    from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
    from onnxopt.errors import OnnxOptError
    from onnxopt.graft import extract, graft
    from onnxopt.head import HeadResult, head
    from onnxopt.measure import measure
    from onnxopt.merge_trunk import merge_trunk
    from onnxopt.model import load, save
    from onnxopt.optimize import Result, optimize
    from onnxopt.pipeline import Pipeline
    from onnxopt.quantize import quantize
    from onnxopt.report.data import Report
    from onnxopt.training.distill import distill
    from onnxopt.training.finetune import finetune
    from onnxopt.transfer import transfer
    from onnxopt.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "Context": "onnxopt.contract",
    "Edit": "onnxopt.contract",
    "GraphPass": "onnxopt.contract",
    "Guarantee": "onnxopt.contract",
    "HeadResult": "onnxopt.head",
    "OnnxOptError": "onnxopt.errors",
    "Pipeline": "onnxopt.pipeline",
    "Refusal": "onnxopt.contract",
    "Report": "onnxopt.report.data",
    "Result": "onnxopt.optimize",
    "Site": "onnxopt.contract",
    "advise": "onnxopt.advise",
    "distill": "onnxopt.training.distill",
    "extract": "onnxopt.graft",
    "graft": "onnxopt.graft",
    "head": "onnxopt.head",
    "finetune": "onnxopt.training.finetune",
    "load": "onnxopt.model",
    "measure": "onnxopt.measure",
    "merge_trunk": "onnxopt.merge_trunk",
    "optimize": "onnxopt.optimize",
    "quantize": "onnxopt.quantize",
    "save": "onnxopt.model",
    "transfer": "onnxopt.transfer",
    "verify": "onnxopt.verify",
}

__all__ = [
    "Context",
    "Edit",
    "GraphPass",
    "Guarantee",
    "HeadResult",
    "OnnxOptError",
    "Pipeline",
    "Refusal",
    "Report",
    "Result",
    "Site",
    "advise",
    "distill",
    "extract",
    "finetune",
    "graft",
    "head",
    "load",
    "measure",
    "merge_trunk",
    "optimize",
    "quantize",
    "save",
    "transfer",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it lives (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])


class _Package(types.ModuleType):
    """Keeps `onnxopt.verify` the function: importing the submodule of that name would put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
