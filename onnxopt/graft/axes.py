"""Names of dynamic axes where values of one model stand in another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxopt.graft.interface import Dims
from onnxopt.graph import bodies, scopes


def rename_axes(host: ir.Model, nodes: Sequence[ir.Node], names: Mapping[str, int | str] | None) -> None:
    """Let copied values have the host's names of axes, or, where these are not known, none.

    Args:
        host: The model that the nodes now are in.
        nodes: The copied nodes.
        names: Name of an axis in the donor -> size or name in the host; None to forget all sizes.
    """
    values = [v for node in nodes for v in _values(node)]
    held = _axis_names(host, set(values))
    for value in values:
        if value.shape is not None and not value.is_graph_output():
            value.shape = _renamed(value.shape, names, held)


def unify(pairs: Iterable[tuple[Dims | None, Dims | None]]) -> dict[str, int | str] | None:
    """Return what the donor's names of axes mean in the host.

    Args:
        pairs: Axes of each value in the donor, and of what it gets in the host.

    Returns:
        Name -> size or name; None when what the donor says about shapes does not hold in the host.
    """
    names: dict[str, int | str] = {}
    for donor, host in pairs:
        if donor is None or host is None:
            continue
        if len(donor) != len(host):
            return None
        for one, other in zip(donor, host, strict=True):
            if isinstance(one, int):
                if one != other:
                    return None
            elif one is not None and (other is None or names.setdefault(one, other) != other):
                return None
    return names


def _values(node: ir.Node) -> Iterable[ir.Value]:
    inner = (n for _, body in bodies(node) for n in body.all_nodes())
    for each in (node, *inner):
        yield from each.outputs
        for _, body in bodies(each):
            yield from body.inputs


def _axis_names(model: ir.Model, without: set[ir.Value]) -> set[str]:
    values = (
        v
        for scope in scopes(model)
        for v in (*scope.graph.inputs, *(o for node in scope.graph for o in node.outputs))
        if v not in without and v.shape is not None
    )
    return {d.value for v in values for d in v.shape or () if not isinstance(d, int) and d.value is not None}


def _renamed(shape: ir.Shape, names: Mapping[str, int | str] | None, held: set[str]) -> ir.Shape:
    if names is None:
        # Runtimes want to know how many axes the values of a body have.
        return ir.Shape([None] * len(shape))
    dims: list[int | str | None] = []
    for dim in shape:
        name = dim if isinstance(dim, int) else dim.value
        if isinstance(name, str):
            dims.append(names.get(name, None if name in held else name))
        else:
            dims.append(name)
    return ir.Shape(dims)
