"""What all pages are made of: one self-contained document, and its sections."""

from __future__ import annotations

from onnxopt.report.markup import Html, tag
from onnxopt.report.style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Even if a model's names got through as markup, nothing in the page could run or load."""


def page(title: str, *content: Html) -> str:
    """Return a self-contained page.

    Args:
        title: What the window is called.
        *content: The header, the sections, and what follows them.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *content)), lang="en") + "\n"


def short_page(title: str, subtitle: str, sections: list[Html]) -> str:
    """Return a page that says what it is in a title and a sentence."""
    header = tag("header", tag("p", "onnxopt", class_="kicker"), tag("h1", title), tag("p", subtitle))
    return page(f"{title} - onnxopt", header, *sections)


def section(title: str, *content: str) -> Html:
    """Return a part of a page under its heading."""
    return tag("section", tag("h2", title), *content)
