"""Which nodes a user means by name patterns, and how they are called after others were fused into them."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxopt.analysis.weights import weights
from onnxopt.graph import Scope, first_output, only_use, scopes

NEAR = 3
"""Names offered when a pattern matches none."""

_FUSED = 8
"""So many nodes behind a layer may have been fused into it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Patterns of names, as in a shell: `*`, `?` and `[ab]`. A name is meant by itself, too, whatever it is made of.

    Attributes:
        only: A node must fit one of them; any does when there are none.
        exclude: A node must fit none of them.
    """

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def unmatched(self, models: Sequence[ir.Model]) -> tuple[str, list[str]] | None:
        """Return the first pattern that fits nothing in any of the models, and names like it; None when all do."""
        known = list(dict.fromkeys(name for model in models for _, _, names in _named(model) for name in names))
        for pattern in (*self.only, *self.exclude):
            if not any(_fits(name, (pattern,)) for name in known):
                return pattern, difflib.get_close_matches(pattern.strip("*"), known, n=NEAR, cutoff=0.4)
        return None

    def spared(self, original: ir.Model, model: ir.Model) -> dict[tuple[str, str], str]:
        """Return what must be left alone.

        Args:
            original: The model as the user knows it.
            model: The same, possibly with nodes fused.

        Returns:
            (path of the graph, first output of a node or name of a weight) -> which option says so. A weight is left
            alone where an excluded node uses it, and where none of those that are asked for does.
        """
        also = _heirs(original, model, (*self.only, *self.exclude))
        found: dict[tuple[str, str], str] = {}
        names_of: dict[ir.Node, set[str]] = {}
        for scope, node, names in _named(model):
            output = first_output(node)
            names_of[node] = names | also.get((scope.path, output), set())
            reason = self._reason([names_of[node]])
            if reason:
                found[scope.path, output] = reason
        for weight in weights(model):
            users = [names_of[role.node] for role in weight.roles]
            reason = self._reason(users or [{weight.value.name or ""}])
            if reason:
                found[weight.scope.path, weight.value.name or ""] = reason
        return found

    def _reason(self, users: Sequence[set[str]]) -> str:
        """Return which option spares what these nodes, called so, share."""
        if any(_fits(name, self.exclude) for names in users for name in names):
            return "it was to be left alone (exclude)"
        if self.only and not any(_fits(name, self.only) for names in users for name in names):
            return "others were to be changed (only)"
        return ""


def _named(model: ir.Model) -> Iterator[tuple[Scope, ir.Node, set[str]]]:
    """Yield every node with the names it goes by: its own, its outputs' and its constants'."""
    for scope in scopes(model):
        for node in scope.graph:
            names = {node.name, *(v.name for v in node.outputs)}
            names.update(v.name for v in node.inputs if v is not None and v.is_initializer())
            yield scope, node, {name for name in names if name}


def _heirs(original: ir.Model, model: ir.Model, patterns: tuple[str, ...]) -> dict[tuple[str, str], set[str]]:
    """Return what layers that are no more were called, by the first output of the node that they went into."""
    left = {(scope.path, first_output(node)) for scope, node, _ in _named(model)}
    layers = {role.node for weight in weights(original) for role in weight.roles}
    found: dict[tuple[str, str], set[str]] = {}
    for scope, node, names in _named(original):
        if node not in layers or (scope.path, first_output(node)) in left:
            continue
        if not any(_fits(name, patterns) for name in names):
            continue
        heir: ir.Node | None = node
        for _ in range(_FUSED):
            heir = only_use(heir.outputs[0]) if heir is not None and heir.outputs else None
            if heir is not None and (scope.path, first_output(heir)) in left:
                found.setdefault((scope.path, first_output(heir)), set()).update(names)
                break
    return found


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
