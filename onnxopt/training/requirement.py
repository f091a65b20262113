"""What to say when torch is not installed."""

from __future__ import annotations

import importlib.util

from onnxopt.errors import UsageError


def require_torch(what: str) -> None:
    """Check that torch can be imported.

    Args:
        what: What needs it, as the beginning of the sentence.

    Raises:
        UsageError: If it is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError(f"{what} needs torch, which is not installed; run: pip install 'onnxopt[torch]'.")
