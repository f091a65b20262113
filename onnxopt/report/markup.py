"""HTML that is escaped by construction: text becomes markup only through `tag`, which escapes it."""

from __future__ import annotations

import html
from collections.abc import Iterable

from onnxopt.report.words import printable

_VOID = frozenset({"meta", "rect", "line", "circle", "path"})


class Html(str):
    """Finished markup. Every other string is text, and is escaped before it gets into a page."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Return text as markup; what is markup already stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text), quote=True))


def joined(parts: Iterable[str]) -> Html:
    """Join parts, escaping those that are text."""
    return Html("".join(escaped(p) for p in parts))


def tag(name: str, /, *children: str, **attributes: str | float) -> Html:
    """Return an element.

    Args:
        name: Name of the element.
        *children: Markup or text, which is escaped.
        **attributes: Values are escaped; `_` in names becomes `-`, and a trailing one is dropped (`class_`).
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(str(value)), quote=True)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{joined(children)}</{name}>")


def lettering(text: str, x: float, y: float, anchor: str) -> Html:
    """Return text in a picture; `anchor` says whether its "start", "middle" or "end" is at x."""
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def drawing(description: str, parts: Iterable[Html], width: int, height: int) -> Html:
    """Return a picture whose description is there for those who do not see it.

    Args:
        description: What it shows.
        parts: What is drawn, the lowest first.
        width: Of the coordinates that the parts lie in.
        height: Likewise.
    """
    return tag(
        "svg",
        tag("title", description),
        *parts,
        class_="pareto",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=description,
    )
