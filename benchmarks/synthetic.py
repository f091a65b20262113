"""Models made for the benchmarks: a graph of any number of nodes, a residual network, one with gigabytes of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCK = 10
"""Nodes per block of `mixed_graph`."""


def mixed_graph(nodes: int) -> onnx.ModelProto:
    """Make a chain of blocks, each with something to fold, merge, remove and leave alone.

    Args:
        nodes: About how many nodes; a multiple of BLOCK is exact.
    """
    made: list[onnx.NodeProto] = []
    weights: list[TensorProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        made.append(helper.make_node(op, inputs, [output], name=f"n{len(made)}", **attributes))
        return output

    def const(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(array, name))
        return name

    value = "x"
    for i in range(max(1, nodes // BLOCK)):
        p = f"b{i}_"
        shift = const(p + "shift", np.full(8, 0.01 * (i % 7), np.float32))
        scaled = add("Mul", [shift, const(p + "k", np.float32(2))], p + "scaled")  # folds
        summed = add("Add", [value, scaled], p + "summed")
        same = add("Identity", [summed], p + "same")  # goes
        left = add("Tanh", [same], p + "left")
        right = add("Tanh", [same], p + "right")  # merges with left
        both = add("Add", [left, right], p + "both")
        add("Exp", [both], p + "dead")  # dead
        cast = add("Cast", [both], p + "cast", to=TensorProto.FLOAT)  # goes
        gate = add("Sigmoid", [cast], p + "gate")
        value = add("Mul", [cast, gate], p + "y")
    add("Identity", [value], "y")
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in "xy"]
    graph = helper.make_graph(made, "mixed", [io[0]], [io[1]], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def resnet(blocks: tuple[int, ...]) -> onnx.ModelProto:
    """Make a network of bottlenecks like ResNet's, convolutions folded with what follows, and random weights.

    Args:
        blocks: How many of each width; (3, 8, 36, 3) is ResNet-152.
    """
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[TensorProto] = []

    def conv(source: str, channels: int, out: int, kernel: int = 1, stride: int = 1) -> str:
        name = f"c{len(nodes)}"
        array = rng.standard_normal((out, channels, kernel, kernel), dtype=np.float32)
        weights.append(numpy_helper.from_array(array / np.float32((channels * kernel**2) ** 0.5), name + "_w"))
        weights.append(numpy_helper.from_array(np.zeros(out, np.float32), name + "_b"))
        at = {"strides": [stride] * 2, "pads": [kernel // 2] * 4, "kernel_shape": [kernel] * 2}
        nodes.append(helper.make_node("Conv", [source, name + "_w", name + "_b"], [name], **at))
        return name

    def node(op: str, *inputs: str, **attributes: object) -> str:
        output = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    stem = node("Relu", conv("x", 3, 64, 7, 2))
    value, channels = node("MaxPool", stem, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            inner = node("Relu", conv(value, channels, width))
            inner = conv(node("Relu", conv(inner, width, width, 3, stride)), width, 4 * width)
            carried = value if index else conv(value, channels, 4 * width, 1, stride)
            value, channels = node("Relu", node("Add", inner, carried)), 4 * width
    flat = node("Flatten", node("GlobalAveragePool", value))
    weights.append(numpy_helper.from_array(rng.standard_normal((channels, 1000), dtype=np.float32), "head"))
    nodes.append(helper.make_node("MatMul", [flat, "head"], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 224, 224])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1000])
    graph = helper.make_graph(nodes, "resnet", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def big_model(folder: Path, layers: int = 12, hidden: int = 3072, inner: int = 8960) -> Path:
    """Write a model of `layers` LayerNorm + GELU MLPs spelled out in small ops, with external weights (2.6 GB)."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[TensorProto] = []
    path = folder / "big.onnx"

    def const(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(op: str, *inputs: str, **attributes: object) -> str:
        output = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    two, eps, half = const("two", np.float32(2)), const("eps", np.float32(1e-5)), const("half", np.float32(0.5))
    one, root2 = const("one", np.float32(1)), const("root2", np.float32(2**0.5))
    last = const("last", np.array([-1], np.int64))
    with (folder / "big.onnx.data").open("wb") as data:

        def external(name: str, shape: tuple[int, int]) -> str:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            array = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            for key, entry in (("location", data_name), ("offset", data.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(entry))
            data.write(array.tobytes())
            weights.append(tensor)
            return name

        data_name = "big.onnx.data"
        x = "x"
        for i in range(layers):
            gain, shift = const(f"g{i}", np.ones(hidden, np.float32)), const(f"s{i}", np.zeros(hidden, np.float32))
            inner_bias = const(f"p{i}", rng.standard_normal(inner).astype(np.float32) * np.float32(0.02))
            outer_bias = const(f"q{i}", rng.standard_normal(hidden).astype(np.float32) * np.float32(0.02))
            centred = node("Sub", x, node("ReduceMean", x, last, keepdims=1))
            variance = node("ReduceMean", node("Pow", centred, two), last, keepdims=1)
            normal = node("Div", centred, node("Sqrt", node("Add", variance, eps)))
            normal = node("Identity", node("Add", node("Mul", normal, gain), shift))
            h = node("Add", node("MatMul", normal, external(f"w{i}", (hidden, inner))), inner_bias)
            phi = node("Add", node("Erf", node("Div", h, root2)), one)
            gelu = node("Mul", node("Mul", h, phi), half)
            out = node("Add", node("MatMul", gelu, external(f"u{i}", (inner, hidden))), outer_bias)
            x = node("Add", x, out)
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "seq", hidden]) for n in "xy"]
    graph = helper.make_graph(nodes, "big", [io[0]], [io[1]], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path
