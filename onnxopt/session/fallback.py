"""Sessions that ONNX Runtime runs, wholly or in part, on another provider than the one that was asked for."""

from __future__ import annotations

from onnxopt.errors import RuntimeFailure
from onnxopt.session import providers
from onnxopt.session.loaded import Session
from onnxopt.session.providers import CPU

# fmt: off
_SHAPE_OPS = frozenset(
    {
        "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand",
        "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "If", "Less", "LessOrEqual", "Loop",
        "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd",
        "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Tile", "Unsqueeze",
        "Where",
    }
)
# fmt: on
"""Operators that compute with shapes; ONNX Runtime keeps these on the CPU on purpose."""


def not_started(session: Session) -> str:
    """Say that the provider that was asked for did not start."""
    return (
        f"ONNX Runtime could not start the provider {providers.short(session.provider)} and fell back to "
        f"{', '.join(map(providers.short, session.registered))}; its driver or libraries are missing or do not match"
    )


def refuse_fallback(session: Session) -> None:
    """Raise when the session, or nodes that compute more than shapes, ended up on another provider."""
    if not session.started:
        raise RuntimeFailure(f"{not_started(session)} (--allow-fallback accepts this).")
    if session.provider == CPU:
        return
    placed = session.placement()
    strays = [n for n in placed.get(CPU, ()) if n.partition(" ")[0] not in _SHAPE_OPS]
    if strays:
        total = sum(len(nodes) for nodes in placed.values())
        shown = ", ".join(strays[:5]) + (", ..." if len(strays) > 5 else "")
        raise RuntimeFailure(
            f"{len(strays)} of {total} nodes would run on the cpu instead of {providers.short(session.provider)}: "
            f"{shown} (--allow-fallback accepts this)."
        )
