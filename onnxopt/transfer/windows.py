"""A Conv and a change of order, read as the ConvTranspose that they take the place of.

Quantizers write a ConvTranspose whose windows do not overlap so, because integers have kernels for it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxopt.graph import Scope, attribute, constant_ints, is_op, only_use, remove_unused, replace_value
from onnxopt.rewrite import Builder
from onnxopt.transfer.site import Conversion
from onnxopt.transfer.tensors import Repeated, permuted, reshaped

_STEPS = (
    ("Transpose", (0, 3, 1, 2)),
    ("Reshape", None),
    ("Transpose", (0, 2, 1, 3)),
    ("Reshape", None),
    ("Transpose", (0, 3, 2, 1)),
)
"""What changes the order, last to first."""
ACTIVATIONS = ("Relu", "Clip")
RANK = 4
AXES_AS_INPUT = 18


def read_windows(conversion: Conversion, scope: Scope) -> None:
    """Put a ConvTranspose in the place of each Conv whose result is put in the order of one."""
    for node in list(scope.graph):
        found = _found(node, conversion) if is_op(node, "Transpose") else None
        if found is not None:
            _write(found, conversion, scope)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """A ConvTranspose as it was found.

    Attributes:
        conv: The Conv of one place.
        activation: What follows it, if anything does.
        order: The nodes that change the order, last to first.
        weight: Channels of the input and the output, height and width of the windows.
    """

    conv: ir.Node
    activation: ir.Node | None
    order: list[ir.Node]
    weight: tuple[int, int, int, int]


def _found(last: ir.Node, conversion: Conversion) -> _Windows | None:
    nodes, sizes = [last], []
    for op_type, order in _STEPS:
        current = nodes[-1]
        if not is_op(current, op_type) or (current is not last and not _has_one_use(current)):
            return None
        if order is None:
            shape = constant_ints(current.inputs[1])
            if shape is None or len(shape) != RANK or shape[:2] != (0, 0) or shape[2] == 0 or shape[3] < 1:
                return None
            sizes.append(int(shape[3]))
        elif tuple(attribute(current, "perm", ())) != order:
            return None
        before = _producer(current)
        if before is None or last.outputs[0].is_graph_output():
            return None
        nodes.append(before)
    activation, conv = None, nodes.pop()
    if is_op(conv, *ACTIVATIONS) and _has_one_use(conv) and (before := _producer(conv)) is not None:
        activation, conv = conv, before
    weight = conversion.known(conv.inputs[1]) if is_op(conv, "Conv") and _has_one_use(conv) else None
    if weight is None or len(weight.shape) != RANK or weight.shape[2:] != (1, 1) or _moves(conv):
        return None
    height, width = weight.shape[0] // sizes[1], sizes[1] // sizes[0]
    if height * width * sizes[0] != weight.shape[0] or not _is_known(_bias(conv), conversion):
        return None
    return _Windows(conv, activation, nodes, (weight.shape[1], sizes[0], height, width))


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs[0] is not None else None


def _bias(conv: ir.Node) -> ir.Value | None:
    return conv.inputs[2] if len(conv.inputs) > 2 else None


def _is_known(bias: ir.Value | None, conversion: Conversion) -> bool:
    return bias is None or conversion.known(bias) is not None


def _has_one_use(node: ir.Node) -> bool:
    return only_use(node.outputs[0]) is not None


def _moves(conv: ir.Node) -> bool:
    """Whether a Conv of one place does more than a product at each place."""
    plain = attribute(conv, "group", 1) == 1 and not any(attribute(conv, "pads", ()))
    return not plain or any(n != 1 for n in attribute(conv, "strides", ()))


def _write(found: _Windows, conversion: Conversion, scope: Scope) -> None:
    conv, activation, last = found.conv, found.activation, found.order[0]
    window = found.weight[2:]
    real, builder = conversion.real, conversion.builder(last, scope)
    inputs = [conv.inputs[0], _kernel(found, conversion, builder)]
    bias = _bias(conv)
    if bias is not None:
        inputs.append(_common_bias(bias, found, conversion, builder))
    value = builder.op("ConvTranspose", inputs, {"kernel_shape": window, "strides": window})
    made = value.producer()
    assert made is not None
    for index in range(1, len(inputs)):
        real.operands[made, index] = real.operand(conv, index) or (conv, index)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    now = {conv.outputs[0]: value}
    if activation is not None:
        attributes = {n: a.value for n, a in activation.attributes.items()}
        value = builder.op(activation.op_type, [value, *activation.inputs[1:]], attributes)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        now[activation.outputs[0]] = value
    now.update({node.outputs[0]: value for node in found.order})
    real.grids[:] = [dataclasses.replace(g, value=now.get(g.value, g.value)) for g in real.grids]
    replace_value(last.outputs[0], value)
    remove_unused(last)


def _kernel(found: _Windows, conversion: Conversion, builder: Builder) -> ir.Value:
    given = found.conv.inputs[1]
    stored = conversion.known(given)
    assert stored is not None, "checked before"
    inputs, channels, height, width = found.weight
    split = (height, width, channels, inputs)
    parts = builder.op("Reshape", [given, builder.ints("windows", split)])
    kernel = builder.op("Transpose", [parts], {"perm": (3, 2, 0, 1)})
    kernel.type, kernel.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(found.weight)
    conversion.real.tensors[kernel] = permuted(reshaped(stored, split), (3, 2, 0, 1))
    return kernel


def _common_bias(bias: ir.Value, found: _Windows, conversion: Conversion, builder: Builder) -> ir.Value:
    """Return one bias for all places of a window: the mean where what makes up for rounding differs between them."""
    stored = conversion.known(bias)
    assert stored is not None, "checked before"
    _, channels, height, width = found.weight
    places = builder.op("Reshape", [bias, builder.ints("places", (height * width, channels))])
    if builder.scope.opset < AXES_AS_INPUT:
        mean = builder.op("ReduceMean", [places], {"axes": (0,), "keepdims": 0})
    else:
        mean = builder.op("ReduceMean", [places, builder.ints("axes", (0,))], {"keepdims": 0})
    mean.type, mean.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((channels,))
    conversion.real.tensors[mean] = Repeated(stored, height * width)
    return mean
