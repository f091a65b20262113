"""ConvTranspose whose windows do not overlap, as a Conv and a rearrangement, both of which integers have kernels for.

With strides as large as the kernel, each element of the input makes a window of its own, so that the operator is a
product per place (a Conv with a kernel of one place) and a change of order, as in the sub-pixel convolution of Shi et
al. (2016).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.int8 import activated
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import (
    Names,
    Scope,
    attribute,
    constant_array,
    constant_tensor,
    has_references,
    is_op,
    remove_unused,
    replace_value,
)
from onnxopt.rewrite import Builder

RANK = 4
ACTIVATIONS = ("Relu", "Clip")


def separate_windows(
    main: Scope, shapes: Shapes, is_integer: Callable[[ir.Node | None], bool]
) -> list[tuple[ir.Node, tuple[int, int]]]:
    """Return the ConvTransposes that can be written so and lie between what is computed with integers.

    One that makes an output of the model, perhaps through a last function, is left in floating point, where it is not
    rounded.

    Args:
        main: The main graph.
        shapes: Its shapes.
        is_integer: Whether a node is computed with integers.

    Returns:
        Nodes with the height and the width of their windows.
    """
    found = []
    for node in main.graph:
        size = _window(node, shapes)
        if size is None:
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        while is_op(before, *ACTIVATIONS) and before is not None and before.inputs[0] is not None:
            before = before.inputs[0].producer()
        result = activated(node.outputs[0])
        users = list(result.consumers())
        if not is_integer(before) or is_op(before, "Gemm") or result.is_graph_output():
            continue
        if users and all(is_integer(user) or is_op(user, "ConvTranspose") for user in users):
            found.append((node, size))
    return found


def _window(node: ir.Node, shapes: Shapes) -> tuple[int, int] | None:
    """Return height and width of the windows where they do not overlap, or None."""
    if not is_op(node, "ConvTranspose") or has_references(node) or node.inputs[0] is None:
        return None
    weight = constant_tensor(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or (bias is not None and constant_tensor(bias) is None) or len(weight.shape) != RANK:
        return None
    if weight.dtype != ir.DataType.FLOAT or shapes.dtype(node.inputs[0]) != ir.DataType.FLOAT:
        return None
    height, width = (int(n) for n in tuple(weight.shape.numpy())[2:])
    padded = any(attribute(node, "pads", ())) or any(attribute(node, "output_padding", ()))
    plain = attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID") and "output_shape" not in node.attributes
    if padded or not plain or attribute(node, "group", 1) != 1 or any(d != 1 for d in attribute(node, "dilations", ())):
        return None
    return (height, width) if tuple(attribute(node, "strides", (1, 1))) == (height, width) else None


def write(node: ir.Node, size: tuple[int, int], scope: Scope, shapes: Shapes, names: Names) -> None:
    """Put a Conv, with the activation that follows, and the rearrangement in the place of a ConvTranspose."""
    height, width = size
    result = activated(node.outputs[0])
    activation = result.producer()
    weight, bias = constant_array(node.inputs[1]), constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None and activation is not None, "checked before"
    channels = weight.shape[1]
    sizes = shapes.of(result) or ()
    # Where sizes are known, batches of no element can be reshaped too.
    rows, columns = (n if isinstance(n, int) else -1 for n in sizes[2:]) if len(sizes) == RANK else (-1, -1)
    # What bounds an activation may be computed between it and the node.
    builder = Builder(scope, names, activation, node.outputs[0].name or node.op_type)
    kernel = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, weight.shape[0], 1, 1)
    inputs = [node.inputs[0], builder.constant("weight", kernel)]
    if bias is not None:
        inputs.append(builder.constant("bias", np.tile(bias, height * width)))
    value = builder.op("Conv", inputs, {"kernel_shape": (1, 1)})
    value.type = result.type
    if activation is not node:
        rest = activation.inputs[1:]
        attributes = {name: attribute(activation, name) for name in activation.attributes}
        value = builder.op(activation.op_type, [value, *rest], attributes)
    # n, window and channel, y, x; each Reshape joins an axis whose size may be unknown with a known one
    value = builder.op("Transpose", [value], {"perm": (0, 3, 2, 1)})
    value = builder.op("Reshape", [value, builder.ints("rows", (0, 0, rows, width * channels))])
    value = builder.op("Transpose", [value], {"perm": (0, 2, 1, 3)})
    value = builder.op("Reshape", [value, builder.ints("columns", (0, 0, columns, channels))])
    value = builder.op("Transpose", [value], {"perm": (0, 3, 1, 2)})
    value.type, value.shape = result.type, result.shape
    replace_value(result, value)
    remove_unused(activation)
