"""Writing sizes of dynamic axes into a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.graph import copied, scopes
from onnxopt.proto.collector import garbage_collection_paused
from onnxopt.proto.inference import infer_types
from onnxopt.registry import nearest


def fix_shape(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """Give dynamic axes of the inputs a size, and work out the shapes that follow from it.

    Stated shapes of intermediate values and outputs that contradict are replaced by what is inferred.

    Args:
        model: The model; it is not changed.
        sizes: Name of an axis -> its size in elements, for all inputs that use the name. An axis without a name is
            called "input:position", counting from 0.

    Returns:
        A new model.

    Raises:
        UsageError: If there is no such axis, it has another size already, or a size is less than 1.
    """
    with garbage_collection_paused():
        result = copied(model)
        names = _fix_inputs(result.graph, sizes)
        for value in _values(result):
            if value.shape is not None:
                value.shape = _substituted(value.shape, names)
        _follow(result)
    return result


def _fix_inputs(graph: ir.Graph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Set the axes that have no name; return the sizes of those that have one."""
    symbols = {name for name, _ in _axes(graph) if name}
    names: dict[str, int] = {}
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f'The size of the axis "{key}" must be a whole number of at least 1, not {size}.')
        if key in symbols:
            _agree(names, key, size)
            continue
        value, axis = _find(graph, key)
        assert value.shape is not None, "only axes of known shapes are found"
        dim = value.shape[axis]
        if _is_dynamic(dim):
            if name := _name(dim):
                _agree(names, name, size)
            else:
                shape = value.shape.copy()
                shape[axis] = size
                value.shape = shape
        elif dim != size:
            raise UsageError(f'The axis "{key}" has the size {dim} already and cannot have {size}.')
    return names


def _agree(names: dict[str, int], name: str, size: int) -> None:
    if names.setdefault(name, size) != size:
        raise UsageError(f'The axis "{name}" is given two sizes, {names[name]} and {size}.')


def _find(graph: ir.Graph, key: str) -> tuple[ir.Value, int]:
    """Return the input and axis that "input:position" means."""
    name, _, position = key.rpartition(":")
    if name and re.fullmatch(r"-?\d+", position):
        for value in graph.inputs:
            rank = len(value.shape) if value.shape is not None else 0
            if value.name == name and -rank <= int(position) < rank:
                return value, int(position) % rank
    found = list(_axes(graph))
    known = list(dict.fromkeys(symbol or place for symbol, place in found))
    if not known:
        raise UsageError(f'There is no dynamic axis "{key}": all inputs have a fixed shape.')
    raise UsageError(
        f'There is no dynamic axis "{key}".{nearest(key, known)} The model has: '
        f"{', '.join(_described(axis, found) for axis in known)}."
    )


def _described(axis: str, found: list[tuple[str, str]]) -> str:
    places = [place for symbol, place in found if symbol == axis]
    return f"{axis} ({', '.join(places)})" if places else axis


def _axes(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """Yield each dynamic axis of the inputs: its name, empty where it has none, and "input:position"."""
    for value in graph.inputs:
        for position, dim in enumerate(value.shape or ()):
            if _is_dynamic(dim):
                yield _name(dim), f"{value.name}:{position}"


def _is_dynamic(dim: int | ir.SymbolicDim) -> bool:
    # Some exporters write -1 for a size that is not known.
    return not isinstance(dim, int) or dim < 0


def _name(dim: int | ir.SymbolicDim) -> str:
    """Return the name of a dynamic axis; empty for "?", which some exporters give to all of them."""
    return "" if isinstance(dim, int) or dim.value in (None, "?") else dim.value


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for scope in scopes(model):
        yield from scope.graph.inputs
        for node in scope.graph:
            yield from node.outputs


def _substituted(shape: ir.Shape, names: Mapping[str, int]) -> ir.Shape:
    dims = [dim if isinstance(dim, int) else _evaluated(dim, names) for dim in shape]
    return ir.Shape(dims, denotations=[shape.get_denotation(i) for i in range(len(dims))])


def _evaluated(dim: ir.SymbolicDim, names: Mapping[str, int]) -> int | ir.SymbolicDim:
    """Return a dimension with the names replaced, in expressions such as "2*batch" too."""
    if dim.value is None or dim.value in names:
        return dim if dim.value is None else names[dim.value]
    if not names.keys() & set(re.findall(r"\w+", dim.value)):
        return dim
    try:
        return dim.evaluate(names)
    except ValueError:
        # A name that only looks like an expression.
        return dim


def _follow(model: ir.Model) -> None:
    """Replace stated dimensions by what follows from the inputs, where anything does."""
    inferred = infer_types(model, trust_stated=False)
    for scope in scopes(model):
        if scope.function is not None:
            continue
        for node in scope.graph:
            for value in node.outputs:
                kind = inferred.get(value.name or "")
                if kind is None or not isinstance(value.type, ir.TensorType):
                    continue
                if kind.tensor_type.HasField("shape"):
                    value.shape = _merged(value.shape, kind.tensor_type.shape)


def _merged(stated: ir.Shape | None, inferred: onnx.TensorShapeProto) -> ir.Shape:
    known = [d.dim_value if d.HasField("dim_value") else None for d in inferred.dim]
    if stated is None or len(stated) != len(known):
        return ir.Shape(known)
    dims = [k if k is not None else s for k, s in zip(known, stated, strict=True)]
    return ir.Shape(dims, denotations=[stated.get_denotation(i) for i in range(len(dims))])
