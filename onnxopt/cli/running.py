"""From the options that say how models are run to what the library takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxopt.feeds import Data
    from onnxopt.runtime import RunOptions


def options_of(running: Mapping[str, Any]) -> RunOptions:
    """Return provider, threads and custom operators.

    Raises:
        UsageError: If the provider is not there.
    """
    from onnxopt.runtime import run_options

    return run_options(running["provider"], running["threads"], running["custom_ops"], running["allow_fallback"])


def feeds_of(model: ir.Model, running: Mapping[str, Any]) -> Data | None:
    """Return the user's data for a model; None when inputs are to be generated."""
    if running["data"] is None:
        return None
    from onnxopt.feeds import load_data

    return load_data(running["data"], model)


def source_of(running: Mapping[str, Any], sets: int) -> str:
    """Return where the feeds came from, in words."""
    from onnxopt.report.words import count

    if running["data"] is not None:
        return f"{count(sets, 'sample')} of {running['data']}"
    return f"{count(sets, 'set')} of generated inputs (seed {running['seed']})"
