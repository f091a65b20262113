"""What is known about shapes, element types and the elements of small integer tensors, symbolically."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import onnx_ir as ir

from onnxopt.analysis import dims
from onnxopt.analysis.content_rules import CONTENT_RULES, ContentRule
from onnxopt.analysis.dims import Dim, Expr
from onnxopt.analysis.dtype_rules import output_type
from onnxopt.analysis.shape_rules import RULES
from onnxopt.analysis.shape_rules_control import body_of, scan_axis, scan_states
from onnxopt.analysis.shape_view import (
    INTEGER_TYPES,
    MAX_ELEMENTS,
    Content,
    PartialShape,
    Rule,
    Shape,
    Unknown,
    View,
    tensor_shape,
)
from onnxopt.graph import STANDARD_DOMAINS, bodies, constant_tensor

_MAX_SIZE = 96
"""Expressions larger than this are given a name of their own, which keeps the analysis linear."""
_MAX_STATE_PROOFS = 3
"""How often the states of a Loop that may change shape are sorted out before all are taken to."""

_TELLS_NOTHING = (Unknown, IndexError, ValueError, ZeroDivisionError)
"""What a rule raises where it cannot tell; all but the first only for nodes that no runtime could run: with too
few axes, a list too short or a stride of 0."""
_CONTAINERS = (ir.SequenceType, ir.OptionalType)
_SHAPE, _CONTENT = 0, 1
_Task: TypeAlias = tuple[ir.Value, int]


class Shapes:
    """Symbolic knowledge about the values of a model, worked out on demand and remembered.

    Valid as long as every value keeps its meaning, as it does under exact passes: nodes may be added and removed,
    and new values are understood from what produces them. The model itself is not changed.

    Sizes come from constants and operator rules; a declared shape only fills in what those leave open. Sizes that
    nothing tells have an opaque symbol each, so equal expressions always mean equal sizes. Inside the body of a
    Loop or a Scan, what is known holds within one round; inside a function, within one call.
    """

    def __init__(self, model: ir.Model) -> None:
        """Take the model; nothing is worked out yet."""
        self._model = model
        self._main = model.graph
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._contents: dict[ir.Value, Content | None] = {}
        self._types: dict[ir.Value, ir.DataType | None] = {}
        self._owners: dict[ir.Graph, ir.Node | None] = {}
        self._homes: dict[str, ir.Graph | None] = {}
        self._sizes: set[Dim] = set()

    # What passes ask --------------------------------------------------------------------------------------

    def of(self, value: ir.Value) -> Shape | None:
        """Return the shape of a value, one dim per axis, or None when its rank is unknown."""
        if value not in self._shapes:
            self._solve((value, _SHAPE))
        return self._shapes[value]

    def rank(self, value: ir.Value) -> int | None:
        """Return the number of axes of a value, or None."""
        shape = self.of(value)
        return None if shape is None else len(shape)

    def content(self, value: ir.Value) -> tuple[Dim | None, ...] | Dim | None:
        """Return the elements of a small tensor of integers or truth values (as 0 and 1).

        Returns:
            A tuple for a list, None in it for an element that is unknown; the element itself for a scalar; None
            when nothing is known or the tensor has more than one axis or more than 64 elements.
        """
        content = self.known_content(value)
        if content is None or len(content.shape) > 1:
            return None
        if content.shape:
            return None if all(item is None for item in content.items) and content.items else content.items
        return content.items[0]

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Return the element type of a value: the declared one, or what its producer gives; None when unknown."""
        trail: list[ir.Value] = []
        current: ir.Value | None = value
        found: ir.DataType | None = None
        while current is not None and current not in self._types:
            trail.append(current)
            self._types[current] = None  # should it come back to itself
            source = self._type_source(current)
            # Not isinstance(source, ir.Value), which is slow: its base is a protocol.
            found, current = (source, None) if isinstance(source, ir.DataType) else (None, source)
        if current is not None:
            found = self._types[current]
        for seen in trail:
            self._types[seen] = found
        return found

    def same_shape(self, a: ir.Value | Sequence[Dim], b: ir.Value | Sequence[Dim]) -> bool:
        """Whether two values (or shapes) provably have the same shape."""
        first, second = self._given(a), self._given(b)
        return first is not None and first == second

    def broadcasts_to(self, a: ir.Value | Sequence[Dim], b: ir.Value | Sequence[Dim]) -> bool:
        """Whether stretching `a` and `b` to a common shape provably gives the shape of `b`."""
        first, second = self._given(a), self._given(b)
        if first is None or second is None or len(first) > len(second):
            return False
        return all(x == 1 or x == y for x, y in zip(first, second[len(second) - len(first) :], strict=True))

    def nonneg(self, dim: Dim) -> bool:
        """Whether the number is at least 0, provably or because it is the size of an axis."""
        return dim in self._sizes or dims.provably_nonneg(dim)

    def ir_shape(self, value: ir.Value) -> ir.Shape | None:
        """Return the shape to declare for a value: numbers and the model's own symbols, other sizes left open."""
        shape = self.of(value)
        if shape is None:
            return None
        return ir.Shape(d if isinstance(d, int) else dims.symbol_name(d) for d in shape)

    def _given(self, what: ir.Value | Sequence[Dim]) -> Shape | None:
        return tuple(what) if isinstance(what, Sequence) else self.of(what)

    # What rules ask ---------------------------------------------------------------------------------------

    def known_shape(self, value: ir.Value) -> Shape | None:
        """Return the shape of a value, or None when its rank is unknown."""
        return self.of(value)

    def known_content(self, value: ir.Value) -> Content | None:
        """Return the elements of a value with any number of axes, or None when they are not followed.

        Those of a small tensor of integers are followed even when none of them is known.
        """
        if value not in self._contents:
            self._solve((value, _CONTENT))
        return self._contents[value]

    def note_sizes(self, node: ir.Node, sizes: Iterable[Dim]) -> None:
        """Remember that the numbers are sizes of axes, hence at least 0, where the node always runs."""
        if node.graph is self._main:
            self._sizes.update(size for size in sizes if isinstance(size, Expr))

    def outside(self, dim: Dim, body: ir.Graph) -> bool:
        """Whether the number means the same outside of the body of a node."""
        return not any(opaque and self._is_within(self._homes.get(name), body) for name, opaque in dims.symbols(dim))

    def _is_within(self, graph: ir.Graph | None, body: ir.Graph) -> bool:
        while graph is not None and graph is not body:
            owner = self._owner(graph)
            graph = owner.graph if owner is not None else None
        return graph is body

    # Working it out ---------------------------------------------------------------------------------------

    def _solve(self, task: _Task) -> None:
        """Work out a value and first, without recursion, everything it follows from."""
        stack = [task]
        waiting: set[_Task] = set()  # those above them on the stack are what they follow from
        while stack:
            task = stack[-1]
            value, kind = task
            if value in (self._shapes if kind == _SHAPE else self._contents):
                stack.pop()
                continue
            missing = self._work_out_shape(value) if kind == _SHAPE else self._work_out_content(value)
            if not missing:
                stack.pop()
                waiting.discard(task)
            elif waiting.isdisjoint(missing):
                waiting.add(task)
                stack.extend(missing)
            else:  # it follows from itself: no runtime could compute it
                self._give_up(task)

    def _give_up(self, task: _Task) -> None:
        value, kind = task
        if kind == _SHAPE:
            self._shapes[value] = self._finished(value, None)
        else:
            self._contents[value] = None

    def _work_out_shape(self, value: ir.Value) -> list[_Task]:
        """Remember the shape of the value, or return what must be known first."""
        node = value.producer()
        if node is None:
            return self._work_out_source(value)
        rule = self._rule(node)
        shapes, contents = self._shapes, self._contents
        missing: list[_Task] = [(v, _SHAPE) for v in node.inputs if v is not None and v not in shapes]
        if rule is not None:
            inputs = node.inputs
            for index in rule.contents:
                if index < len(inputs):
                    operand = inputs[index]
                    if operand is not None and operand not in contents:
                        missing.append((operand, _CONTENT))
            if rule.also is not None:
                missing.extend((v, _SHAPE) for v in rule.also(node) if v not in shapes)
        if missing:
            return missing
        found: Sequence[PartialShape] = ()
        if rule is not None:
            try:
                found = rule.shapes(View(node, self))
            except _TELLS_NOTHING:
                found = ()
        for index, output in enumerate(node.outputs):
            if output not in shapes:
                shapes[output] = self._finished(output, found[index] if index < len(found) else None)
        return []

    def _rule(self, node: ir.Node) -> Rule | None:
        domain = node.domain
        rules = RULES.get("" if domain == "ai.onnx" else domain)
        rule = None if rules is None else rules.get(node.op_type)
        if rule is not None and self._model.functions and node.op_identifier() in self._model.functions:
            return None  # the model brings its own definition
        return rule

    def _finished(self, value: ir.Value, shape: PartialShape) -> Shape | None:
        """Fill in what a rule left open: from the declared shape, else with symbols of its own."""
        if shape is not None and all(_is_plain(size) for size in shape):
            return tuple(shape)  # type: ignore[arg-type] # no size is None
        declared = self._declared(value)
        if shape is None:
            if declared is None:
                return None
            shape = (None,) * len(declared)
        if declared is None or len(declared) != len(shape):
            declared = (None,) * len(shape)
        filled = [number if size is None else size for size, number in zip(shape, declared, strict=True)]
        return tuple(
            size if size is not None and _is_plain(size) else self._fresh(value, axis)
            for axis, size in enumerate(filled)
        )

    def _declared(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """Return the numbers of the shape the model declares for a tensor.

        Names are not trusted, and in functions, which may be called with anything, nothing is.
        """
        if value.shape is None or type(value.type) in _CONTAINERS or self._in_function(value.graph):
            return None
        return tuple(d if isinstance(d, int) and d >= 0 else None for d in value.shape)

    def _fresh(self, value: ir.Value, axis: int) -> Expr:
        name = f"{value.name or 'value'}.{axis}#{len(self._homes)}"
        self._homes[name] = value.graph
        return dims.symbol(name, opaque=True)

    # Values without a producer ----------------------------------------------------------------------------

    def _work_out_source(self, value: ir.Value) -> list[_Task]:
        graph = value.graph
        if value.is_graph_input() and graph is self._main:  # an initializer the caller may override included
            self._shapes[value] = self._model_input(value)
        elif value.is_graph_input() and graph is not None and not value.is_initializer():
            return self._work_out_body_input(value, graph)
        elif value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
            self._shapes[value] = tensor_shape(value.const_value)
        else:
            self._shapes[value] = self._finished(value, None)
        return []

    def _model_input(self, value: ir.Value) -> Shape | None:
        if self._declared(value) is None or value.shape is None:
            return None
        sizes = [_declared_size(d) for d in value.shape]
        return tuple(self._fresh(value, axis) if d is None else d for axis, d in enumerate(sizes))

    def _work_out_body_input(self, value: ir.Value, body: ir.Graph) -> list[_Task]:
        """Remember the shape of an input of a Loop or Scan body. Inputs of functions can be anything."""
        owner = self._owner(body)
        if owner is not None and owner.op_type == "Loop" and body_of(owner, "body") is body:
            return self._work_out_states(owner, body)
        if owner is not None and owner.op_type == "Scan" and body_of(owner, "body") is body:
            missing: list[_Task] = [(v, _SHAPE) for v in owner.inputs if v is not None and v not in self._shapes]
            if not missing:
                self._shapes[value] = self._finished_scanned(owner, body, value)
            return missing
        self._shapes[value] = None
        return []

    def _finished_scanned(self, node: ir.Node, body: ir.Graph, value: ir.Value) -> Shape | None:
        position = next(i for i, formal in enumerate(body.inputs) if formal is value)
        try:
            states = scan_states(node, body)
            shape = View(node, self).shape(position)
            if position < states:
                return shape
            axis = scan_axis(node, "scan_input_axes", position - states, len(shape))
        except _TELLS_NOTHING:
            return None
        return (*shape[:axis], *shape[axis + 1 :])

    # States of loops --------------------------------------------------------------------------------------

    def _work_out_states(self, node: ir.Node, body: ir.Graph) -> list[_Task]:
        """Find which states of a Loop keep their shape: assume it, and see whether the body then gives it back."""
        needed = itertools.chain(node.inputs, _captured(body))
        missing: list[_Task] = [(v, _SHAPE) for v in needed if v is not None and v not in self._shapes]
        if missing:
            return missing
        formals = list(body.inputs)
        initial = [self._shapes[v] if v is not None else None for v in node.inputs]
        kept = {i for i in range(2, min(len(formals), len(initial))) if initial[i] is not None}
        for attempt in range(_MAX_STATE_PROOFS + 1):
            if attempt == _MAX_STATE_PROOFS:
                kept = set()
            changed = self._changed_states(body, {i: initial[i] for i in kept})
            if not changed:
                break
            kept -= changed
        return []

    def _changed_states(self, body: ir.Graph, assumed: dict[int, Shape | None]) -> set[int]:
        """Return the states that do not keep the assumed shape; if there are any, forget all that followed."""
        marks = len(self._shapes), len(self._contents)
        for position, formal in enumerate(body.inputs):
            if position < 2:  # the number of the round and the condition: scalars, or lists of one
                self._shapes[formal] = self._finished(formal, None)
            else:
                self._shapes[formal] = assumed.get(position)
        changed = {i for i in assumed if i - 1 >= len(body.outputs) or self.of(body.outputs[i - 1]) != assumed[i]}
        if changed:
            for memo, mark in ((self._shapes, marks[0]), (self._contents, marks[1])):
                while len(memo) > mark:
                    memo.popitem()
        return changed

    def _owner(self, graph: ir.Graph) -> ir.Node | None:
        """Return the node that carries the graph; None for the main graph, functions and detached graphs."""
        if graph not in self._owners:
            graphs = [self._main, *(f.graph for f in self._model.functions.values())]
            self._owners.update(dict.fromkeys((graph, *graphs)))
            while graphs:
                for node in graphs.pop():
                    for _, body in bodies(node):
                        self._owners[body] = node
                        graphs.append(body)
        return self._owners[graph]

    def _in_function(self, graph: ir.Graph | None) -> bool:
        if not self._model.functions or graph is None or graph is self._main:
            return False
        return not self._is_within(graph, self._main)

    # Elements ---------------------------------------------------------------------------------------------

    def _work_out_content(self, value: ir.Value) -> list[_Task]:
        """Remember the elements of the value, or return what must be known first."""
        contents = self._contents
        if value not in self._shapes:
            return [(value, _SHAPE)]
        sizes = _fixed(self._shapes[value])
        node = value.producer()
        rule = None if node is None else self._content_rule(node)
        dtype = None if sizes is None else self.dtype(value)
        if sizes is None or (dtype is not None and dtype not in INTEGER_TYPES):
            contents[value] = None
            return []
        found = None
        if node is None or rule is None:
            found = _constant_content(value, sizes)
        else:
            positions = range(len(node.inputs)) if rule.contents is None else rule.contents
            operands = [node.inputs[i] for i in positions if i < len(node.inputs)]
            if rule.also is not None:
                operands.extend(rule.also(node))
            missing: list[_Task] = [(v, _CONTENT) for v in operands if v is not None and v not in contents]
            if missing:
                return missing
            found = self._computed(node, rule, value, sizes, dtype)
        if found is None and dtype is not None:  # integers, none of which is known
            found = Content(sizes, (None,) * math.prod(sizes))
        contents[value] = found
        return []

    def _content_rule(self, node: ir.Node) -> ContentRule | None:
        if node.domain not in STANDARD_DOMAINS or self._rule(node) is None:
            return None
        return CONTENT_RULES.get(node.op_type)

    def _computed(
        self, node: ir.Node, rule: ContentRule, value: ir.Value, sizes: tuple[int, ...], dtype: ir.DataType | None
    ) -> Content | None:
        try:
            items = tuple(rule.items(View(node, self), sizes, value.index() or 0))
        except _TELLS_NOTHING:
            return None
        if len(items) != math.prod(sizes):
            return None
        low, high = _limits(dtype)
        return Content(sizes, tuple(None if _unfit(item, low, high) else item for item in items))

    # Element types ----------------------------------------------------------------------------------------

    def _type_source(self, value: ir.Value) -> ir.DataType | ir.Value | None:
        """Return the element type of the value, another value that shares it, or None."""
        if value.type is not None:
            return None if type(value.type) in _CONTAINERS else value.dtype
        if value.const_value is not None:
            return value.const_value.dtype
        node = value.producer()
        if node is None:
            return self._state_source(value)
        if self._model.functions and node.op_identifier() in self._model.functions:
            return None
        return output_type(node, value.index() or 0)

    def _state_source(self, value: ir.Value) -> ir.Value | None:
        """Return what the input of a Loop or Scan body starts from."""
        graph = value.graph
        owner = self._owner(graph) if graph is not None and value.is_graph_input() else None
        if graph is None or owner is None or owner.op_type not in ("Loop", "Scan"):
            return None
        position = next(i for i, formal in enumerate(graph.inputs) if formal is value)
        return owner.inputs[position] if position < len(owner.inputs) else None


_NAMELESS = {"none", "null", "unk", "unknown", "dynamic", "dyn"}


def _declared_size(declared: int | ir.SymbolicDim) -> Dim | None:
    """Return the size of an axis of a model input, None for one without a name of its own."""
    if isinstance(declared, int):
        return declared if declared >= 0 else None
    name = declared.value
    # Some exporters write "?" or "None" for every size they do not know.
    if name is None or not any(c.isalpha() for c in name) or name.lower() in _NAMELESS:
        return None
    return dims.symbol(name)


def _is_plain(size: Dim | None) -> bool:
    """Whether the size is known, possible and short enough to be kept as it is."""
    if isinstance(size, int):
        return 0 <= size < 2**63
    return size is not None and dims.size(size) <= _MAX_SIZE


def _captured(body: ir.Graph) -> list[ir.Value]:
    """Return the values of outer graphs that the nodes of a body use."""
    inner: set[ir.Graph] = {body}
    used: dict[ir.Value, None] = {}
    graphs = [body]
    while graphs:
        graph = graphs.pop()
        inner.add(graph)
        for node in graph:
            used.update((v, None) for v in node.inputs if v is not None)
            graphs.extend(b for _, b in bodies(node))
    return [v for v in used if v.graph not in inner]


def _fixed(shape: Shape | None) -> tuple[int, ...] | None:
    """Return the shape if it is all numbers and the tensor small enough to follow."""
    if shape is None:
        return None
    sizes = tuple(d for d in shape if isinstance(d, int))
    return sizes if len(sizes) == len(shape) and math.prod(sizes) <= MAX_ELEMENTS else None


def _constant_content(value: ir.Value, sizes: tuple[int, ...]) -> Content | None:
    node = value.producer()
    # Not graph.constant_tensor for these, common as they are: it wraps and checks, at several times the cost.
    if node is not None and node.op_type == "Constant":
        literal = node.attributes.get("value_ints")
        if literal is not None and not literal.is_ref():
            return Content(sizes, tuple(literal.as_ints()))
        literal = node.attributes.get("value")
        tensor = None if literal is None or literal.is_ref() else literal.value
    else:
        tensor = None
    tensor = constant_tensor(value) if tensor is None else tensor
    if tensor is None or tensor.dtype not in INTEGER_TYPES:
        return None
    return Content(sizes, tuple(int(x) for x in tensor.numpy().reshape(-1).tolist()))


_UNSIGNED = {ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}


def _limits(dtype: ir.DataType | None) -> tuple[int, int]:
    if dtype is None or dtype == ir.DataType.BOOL:
        return -(2**63), 2**63 - 1
    bits = 8 * dtype.itemsize
    return (0, int(2**bits) - 1) if dtype in _UNSIGNED else (-int(2 ** (bits - 1)), int(2 ** (bits - 1)) - 1)


def _unfit(item: Dim | None, low: int, high: int) -> bool:
    """Whether the number is too large an expression to keep, or overflows its type, where the runtime differs."""
    if isinstance(item, int):
        return not low <= item <= high
    return item is not None and ((low == 0 and not dims.provably_nonneg(item)) or dims.size(item) > _MAX_SIZE)
