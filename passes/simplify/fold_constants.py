"""Compute what does not depend on the inputs, without making the model bigger."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import evaluation
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    RANDOM_OPS,
    STANDARD_DOMAINS,
    Scope,
    bodies,
    constant_tensor,
    drop_unused_constants,
    first_output,
    has_references,
    is_op,
    named,
    remove_node,
    replace_value,
    scopes,
    use_count,
)
from onnxopt.numeric.kernels import Array, TooLargeError

_QUANTIZATION = frozenset(["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"])

_SMALLEST_ALLOWANCE = 256

_OTHER_DOMAIN = "it is not an operator of the standard domain"
_HAS_BODY = "it carries nested graphs"
_REFERS = "an attribute refers to the function's caller"
_IS_RANDOM = "it draws random numbers"
_QUANTIZES = "folding would undo quantization"
_IS_OUTPUT = "it computes a graph output, which must come from a node"
_GROWS = "the result is bigger than what it replaces"
_TIED = "its input is used elsewhere too, so the result would be stored besides it"
_NO_TYPE = "the type to cast to is not known"
_TOO_LARGE = "the result is larger than max_bytes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldConstants(GraphPass):
    """Compute what does not depend on the inputs, without making the model bigger.

    Sizes count as constant where they do not depend on the inputs. Constant nodes become initializers, except
    in functions.

    Attributes:
        max_growth: Share of the bytes of all constants by which one result may exceed what folding it frees
            (rounded down to a power of two; at least 256 bytes are allowed).
        max_bytes: Largest result to compute, in bytes.
    """

    name: ClassVar[str] = "fold-constants"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    max_growth: float = 0.0001
    max_bytes: int = 1 << 26

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node that can be computed now."""
        return _Folder(self, model, ctx).run()


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiting:
    """A node refused for its size, which may change once other users of its inputs are gone."""

    refusal: Refusal
    freed: int


class _Folder:
    """One sweep over a model in topological order."""

    def __init__(self, options: FoldConstants, model: ir.Model, ctx: Context) -> None:
        self._options = options
        self._model = model
        self._ctx = ctx
        self._scopes: dict[ir.Graph, Scope] = {}
        # Integers computed from shapes that depend on the inputs, at least in part.
        self._sizes: set[ir.Value] = set()
        self._waiting: dict[ir.Node, _Waiting] = {}

    @functools.cached_property
    def _allowance(self) -> int:
        """Bytes by which one result may exceed what it frees.

        A power of two, so that what this run folds does not move it and another run finds nothing more.
        """
        total = 0
        for scope in scopes(self._model):
            constants = [*scope.graph.initializers.values()]
            constants += [node.outputs[0] for node in scope.graph if is_op(node, "Constant")]
            total += sum(t.nbytes for v in constants if (t := constant_tensor(v)) is not None)
        share = int(total * self._options.max_growth)
        return max(_SMALLEST_ALLOWANCE, 1 << max(share.bit_length() - 1, 0))

    def run(self) -> Iterator[Edit | Refusal]:
        for scope in scopes(self._model):
            self._scopes[scope.graph] = scope
            for node in scope.graph:
                yield from self._visit(scope, node)
        # What was refused for its size while nodes that are gone now still used its inputs.
        while ready := [n for n, w in self._waiting.items() if n.graph is not None and _freed(n) != w.freed]:
            for node in ready:
                yield from self._follow(node)
        yield from (w.refusal for n, w in self._waiting.items() if n.graph is not None)

    def _follow(self, node: ir.Node) -> Iterator[Edit | Refusal]:
        """Visit a node, and when it is folded what uses it."""
        todo = [node]
        while todo:
            node = todo.pop()
            if node.graph is None:
                continue
            users = [use.node for output in node.outputs for use in output.uses()]
            yield from self._visit(self._scopes[node.graph], node)
            if node.graph is None:
                todo.extend(users)

    def _visit(self, scope: Scope, node: ir.Node) -> Iterator[Edit | Refusal]:
        is_output = any(o.is_graph_output() for o in node.outputs)
        if not is_output and not any(use_count(o) for o in node.outputs):
            return
        if is_op(node, "Constant", "Identity"):
            if not is_output:
                yield from self._lifted(scope, node) if node.op_type == "Constant" else self._skipped(scope, node)
            return
        known = self._from_shapes(node)
        if known is None and not _is_constant(node):
            return
        reason = _IS_OUTPUT if is_output else None if known else _never(node)
        tensors = self._computed(scope, node, known) if reason is None else reason
        if isinstance(tensors, str):
            yield from self._refused(scope, node, tensors)
            return
        apply = functools.partial(_replace_by_constants, scope, node, tensors)
        yield Edit(self._site(scope, node), _summary(node, tensors), apply)

    def _site(self, scope: Scope, node: ir.Node) -> Site:
        return Site(self._options.name, scope.path, first_output(node))

    def _refused(self, scope: Scope, node: ir.Node, reason: str) -> Iterator[Refusal]:
        refusal = Refusal(self._site(scope, node), reason)
        if reason in (_GROWS, _TIED):
            self._waiting[node] = _Waiting(refusal, _freed(node))
        else:
            yield refusal

    def _lifted(self, scope: Scope, node: ir.Node) -> Iterator[Edit]:
        """Make a Constant node an initializer, where there can be one."""
        output = node.outputs[0]
        tensor = constant_tensor(output)
        if scope.function is not None or tensor is None or tensor.dtype == ir.DataType.STRING:
            return
        lifted = {output: named(tensor, output.name or "")}
        apply = functools.partial(_replace_by_constants, scope, node, lifted)
        yield Edit(self._site(scope, node), "made Constant an initializer", apply)

    def _skipped(self, scope: Scope, node: ir.Node) -> Iterator[Edit]:
        """Use a constant itself instead of a copy of it, so that what follows can be folded."""
        source = node.inputs[0]
        if source is None or constant_tensor(source) is None:
            return
        apply = functools.partial(_skip, node, source)
        yield Edit(self._site(scope, node), f"folded Identity of {source.name}", apply)

    def _from_shapes(self, node: ir.Node) -> dict[ir.Value, Array] | None:
        """Return the used outputs if they are sizes that do not depend on the inputs."""
        if node.domain not in STANDARD_DOMAINS:
            return None
        if node.op_type not in ("Shape", "Size") and not any(v in self._sizes for v in node.inputs):
            return None
        known: dict[ir.Value, Array] = {}
        for output in node.outputs:
            content = self._ctx.shapes.known_content(output)
            dtype = self._ctx.shapes.dtype(output)
            if content is not None and not all(isinstance(item, int) for item in content.items):
                self._sizes.add(output)
            elif content is not None and dtype is not None:
                known[output] = np.asarray(content.items, dtype.numpy()).reshape(content.shape)
        return known if all(o in known or not use_count(o) for o in node.outputs) else None

    def _computed(
        self, scope: Scope, node: ir.Node, known: dict[ir.Value, Array] | None
    ) -> dict[ir.Value, ir.TensorProtocol] | str:
        """Return the used outputs as named tensors, or why they are not to be stored."""
        freed = _freed(node)
        allowed = freed + _node_bytes(node) + self._allowance
        limit = min(allowed, self._options.max_bytes)
        like = node.inputs[1] if node.op_type == "CastLike" else None
        try:
            if known is None:
                cast_to = None if like is None else self._ctx.shapes.dtype(like)
                if like is not None and cast_to is None:
                    return _NO_TYPE
                arrays = evaluation.compute(node, scope.opset, self._ctx.evaluate, limit, cast_to)
                known = dict(zip(node.outputs, arrays, strict=True))
            tensors: dict[ir.Value, ir.TensorProtocol] = {
                o: ir.Tensor(np.asarray(a), name=o.name) for o, a in known.items() if use_count(o)
            }
            if sum(t.nbytes for t in tensors.values()) <= allowed:
                return tensors
        except evaluation.NotComputableError as error:
            return error.reason
        except TooLargeError:
            if limit < allowed:
                return _TOO_LARGE
        return _TIED if _constant_bytes(node) - freed > self._allowance else _GROWS


def _never(node: ir.Node) -> str | None:
    """Return why a node is not folded even though its inputs are constant."""
    if node.domain not in STANDARD_DOMAINS:
        return _OTHER_DOMAIN
    if any(True for _ in bodies(node)):
        return _HAS_BODY
    if has_references(node):
        return _REFERS
    if node.op_type in RANDOM_OPS:
        return _IS_RANDOM
    return _QUANTIZES if node.op_type in _QUANTIZATION else None


def _is_constant(node: ir.Node) -> bool:
    """Whether all inputs are constant numbers; of a CastLike the first, of the other only the type matters."""
    inputs = node.inputs[:1] if is_op(node, "CastLike") else node.inputs
    found = False
    for value in inputs:
        if value is None:
            continue
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return False
        found = True
    return found


def _constants(node: ir.Node) -> Mapping[ir.Value, ir.TensorProtocol]:
    values = dict.fromkeys(v for v in node.inputs if v is not None)
    return {v: t for v in values if (t := constant_tensor(v)) is not None}


def _constant_bytes(node: ir.Node) -> int:
    return sum(t.nbytes for t in _constants(node).values())


def _freed(node: ir.Node) -> int:
    """Return the bytes of the constants that nothing but this node uses."""
    return sum(
        tensor.nbytes
        for value, tensor in _constants(node).items()
        if use_count(value) == sum(v is value for v in node.inputs) and not value.is_graph_output()
    )


def _node_bytes(node: ir.Node) -> int:
    """Return roughly what the node itself takes in the file, beyond what an initializer takes."""
    names = len(node.op_type) + len(node.name or "") + sum(len(v.name or "") + 2 for v in node.inputs if v)
    return names + 12 * len(node.attributes)


def _summary(node: ir.Node, tensors: Mapping[ir.Value, ir.TensorProtocol]) -> str:
    kinds = [f"{t.dtype.name.lower()}[{','.join(map(str, t.shape))}]" for t in tensors.values()]
    return f"folded {node.op_type} -> {', '.join(kinds)}"


def _skip(node: ir.Node, source: ir.Value) -> None:
    replace_value(node.outputs[0], source)
    remove_node(node)


def _replace_by_constants(scope: Scope, node: ir.Node, tensors: Mapping[ir.Value, ir.TensorProtocol]) -> None:
    """Put constants of the same names in the place of a node's outputs."""
    inputs = [v for v in dict.fromkeys(node.inputs) if v is not None]
    replacements = {old: _constant_like(scope, old, tensor, node) for old, tensor in tensors.items()}
    for old, new in replacements.items():
        old.replace_all_uses_with(new)
    remove_node(node)
    if scope.function is None:
        for new in replacements.values():
            scope.graph.register_initializer(new)
    drop_unused_constants(inputs)


def _constant_like(scope: Scope, old: ir.Value, tensor: ir.TensorProtocol, before: ir.Node) -> ir.Value:
    if scope.function is None:
        new = ir.Value(const_value=tensor)
    else:
        # A function has no initializers.
        constant = ir.node("Constant", [], {"value": tensor}, name=before.name)
        new = constant.outputs[0]
        scope.graph.insert_before(before, constant)
    new.name, new.type, new.shape = old.name, ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    return new
