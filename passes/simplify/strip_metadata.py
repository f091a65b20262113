"""Drop what exporters note about nodes: stack traces, module names, the rules that made them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import Scope, first_output, scopes

PREFIXES = ("pkg.torch.", "pkg.onnxscript.")
KEYS = ("namespace",)
"""Under these keys torch's exporter and onnxscript's rewriter write what they know of a node."""

MOST_KEYS = 3
"""So many kinds of notes are named, the largest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StripMetadata(GraphPass):
    """Drop what exporters note about nodes, values and graphs, such as stack traces with the paths of source files.

    That is metadata under keys of torch's exporter and of onnxscript, and the doc strings of nodes. After a rewrite
    much of it is about nodes that are gone. Metadata under other keys stays, and so does that of the model itself,
    which applications read.
    """

    name: ClassVar[str] = "strip-metadata"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per graph with such notes."""
        for scope in scopes(model):
            sizes = _sizes(scope)
            if sizes:
                nodes = list(scope.graph)
                site = Site(self.name, scope.path, first_output(nodes[0]) if nodes else "")
                yield Edit(site, _summary(sizes), functools.partial(_strip, scope))


def _holders(scope: Scope) -> Iterator[ir.Node | ir.Value | ir.Graph | ir.Function]:
    """Yield everything in a graph that metadata is attached to."""
    yield scope.graph
    if scope.function is not None:
        yield scope.function
    yield from scope.graph.inputs
    yield from scope.graph.initializers.values()
    for node in scope.graph:
        yield node
        yield from node.outputs


def _is_note(key: str) -> bool:
    return key.startswith(PREFIXES) or key in KEYS


def _sizes(scope: Scope) -> dict[str, int]:
    """Return how many bytes the notes of a graph take up, by their kind."""
    sizes: collections.Counter[str] = collections.Counter()
    for holder in _holders(scope):
        for key, text in holder.metadata_props.items():
            if _is_note(key):
                sizes[key] += len(f"{key}{text}".encode())
        if isinstance(holder, ir.Node) and holder.doc_string:
            sizes["doc strings"] += len(holder.doc_string.encode())
    return dict(sizes)


def _summary(sizes: dict[str, int]) -> str:
    ordered = sorted(sizes, key=lambda key: (-sizes[key], key))
    more = f" and {len(ordered) - MOST_KEYS} more" if len(ordered) > MOST_KEYS else ""
    return f"dropped {sum(sizes.values()):,} bytes of the exporter's notes: {', '.join(ordered[:MOST_KEYS])}{more}"


def _strip(scope: Scope) -> None:
    for holder in _holders(scope):
        for key in list(filter(_is_note, holder.metadata_props)):
            del holder.metadata_props[key]
        if isinstance(holder, ir.Node):
            holder.doc_string = None
