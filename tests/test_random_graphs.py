"""Chains of layout, slicing, padding and arithmetic drawn at random: the lossless recipe must not change a number."""

import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.errors import RuntimeFailure
from onnxopt.verify import Verifier

OPSETS = (10, 12, 13, 17, 18, 21)
SEEDS = range(60)


class Maker:
    """Adds nodes to a graph of two inputs of three axes, and keeps the shape of every value."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.opset = self.rng.choice(OPSETS)
        self.shape = [self.rng.choice([1, 2, 4, 6]) for _ in range(3)]
        # ONNX's own inference for opset 10 gives what a Slice has cut the size it had before, and the runtime then
        # reuses buffers of the wrong size, depending on the order of the nodes.
        self.dynamic = self.rng.random() < 0.6 and self.opset > 10
        self.values = [("x", self.shape), ("z", self.shape)]
        self.nodes, self.weights = [], []

    def constant(self, array, dtype=np.int64):
        name = f"k{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, op, inputs, outputs=1, **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def keep(self, name, shape):
        self.values.append((name, list(shape)))

    def pick(self):
        return self.values[-1] if self.rng.random() < 0.6 else self.rng.choice(self.values)

    def alike(self, shape):
        return self.rng.choice([name for name, other in self.values if list(other) == list(shape)])

    def axes_op(self, op, value, axis):
        if self.opset >= 13:
            return self.node(op, [value, self.constant([axis])])
        return self.node(op, [value], axes=[axis])

    # What can be drawn; each takes a value with its shape and at least one axis.

    def slice(self, value, shape):
        axis = self.rng.randrange(len(shape))
        low, high = self.rng.choice([0, 0, 1, 2, -1, -2]), self.rng.choice([1, 2, 3, 4, -1, 100, 2**31 - 1, 2**63 - 1])
        result = list(shape)
        result[axis] = len(range(shape[axis])[low:high])
        counted = axis - len(shape) if self.rng.random() < 0.3 else axis
        inputs = [self.constant([n]) for n in (low, high, counted)]
        sliced = self.node("Slice", [value, *inputs])
        self.keep(sliced, result)
        if result[axis] == 1 and self.rng.random() < 0.5:
            self.keep(self.axes_op("Squeeze", sliced, axis), result[:axis] + result[axis + 1 :])

    def split(self, value, shape):
        axis = self.rng.randrange(len(shape))
        if shape[axis] < 2:
            return
        first = self.rng.randint(1, shape[axis] - 1)
        sizes = [first, shape[axis] - first]
        if self.opset >= 13:
            parts = self.node("Split", [value, self.constant(sizes)], 2, axis=axis)
        else:
            parts = self.node("Split", [value], 2, axis=axis, split=sizes)
        for part, size in zip(parts, sizes, strict=True):
            self.keep(part, [*shape[:axis], size, *shape[axis + 1 :]])
        if self.rng.random() < 0.6:
            order = parts if self.rng.random() < 0.8 else parts[::-1]
            self.keep(self.node("Concat", order, axis=axis), shape)

    def concat(self, value, shape):
        axis = self.rng.randrange(len(shape))
        others = [self.alike(shape) for _ in range(self.rng.randint(1, 2))]
        joined = [*shape[:axis], shape[axis] * (1 + len(others)), *shape[axis + 1 :]]
        counted = axis - len(shape) if self.rng.random() < 0.3 else axis
        self.keep(self.node("Concat", [value, *others], axis=counted), joined)

    def pad(self, value, shape):
        if self.opset < 11:
            return
        pads = [self.rng.choice([0, 0, 1]) for _ in range(2 * len(shape))]
        filling = [self.constant(self.rng.choice([0, 1]), np.float32)] if self.rng.random() < 0.5 else []
        sizes = [n + pads[i] + pads[i + len(shape)] for i, n in enumerate(shape)]
        self.keep(self.node("Pad", [value, self.constant(pads), *filling]), sizes)

    def cast(self, value, shape):
        between = self.node(
            "Cast", [value], to=self.rng.choice([TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT32])
        )
        if self.rng.random() < 0.4:
            between = self.node("Cast", [between], to=self.rng.choice([TensorProto.DOUBLE, TensorProto.INT64]))
        self.keep(self.node("Cast", [between], to=TensorProto.FLOAT), shape)

    def twice(self, value, shape):
        op = self.rng.choice(["Relu", "Abs", "Floor", "Ceil", "Sign", "Neg"])
        for _ in range(self.rng.randint(1, 2)):
            value = self.node(op, [value])
            self.keep(value, shape)

    def add_neg(self, value, shape):
        operands = [value, self.node("Neg", [self.alike(shape)])]
        self.rng.shuffle(operands)
        self.keep(self.node(self.rng.choice(["Add", "Sub"]), operands), shape)

    def expand(self, value, shape):
        sizes = [self.rng.choice([1, n]) for n in shape]
        small = self.constant(np.random.default_rng(len(self.nodes)).random(sizes), np.float32)
        target = self.node("Shape", [value]) if self.rng.random() < 0.6 else self.constant(shape)
        operands = [value, self.node("Expand", [small, target])]
        self.rng.shuffle(operands)
        self.keep(self.node(self.rng.choice(["Add", "Mul", "Sub"]), operands), shape)

    def where(self, value, shape):
        condition = self.constant(np.full(shape[-1:], self.rng.random() < 0.5), np.bool_)
        self.keep(self.node("Where", [condition, value, self.alike(shape)]), shape)

    def neutral(self, value, shape):
        number = helper.make_tensor("t", TensorProto.FLOAT, [1], [self.rng.choice([0.0, 1.0])])
        filled = self.node("ConstantOfShape", [self.node("Shape", [value])], value=number)
        operands = [value, filled] if self.rng.random() < 0.8 else [filled, value]
        self.keep(self.node(self.rng.choice(["Add", "Mul", "Sub", "Div"]), operands), shape)

    def constants(self, value, shape):
        family = self.rng.choice([("Add", "Sub"), ("Mul", "Div")])
        for _ in range(2):
            if self.rng.random() < 0.6:
                number = self.constant(self.rng.choice([0.25, 0.5, 1, 2, 3, -4]), np.float32)
            else:
                number = self.constant(np.random.default_rng(len(self.nodes)).uniform(0.5, 2, shape[-1:]), np.float32)
            operands = [value, number] if self.rng.random() < 0.8 else [number, value]
            value = self.node(self.rng.choice(family), operands)
        self.keep(value, shape)

    def reduce(self, value, shape):
        axis, kept = self.rng.randrange(len(shape)), self.rng.choice([0, 1])
        if not shape[axis]:
            return
        op = self.rng.choice(["ReduceMean", "ReduceMax", "ReduceSum"])
        if self.opset >= (13 if op == "ReduceSum" else 18):
            value = self.node(op, [value, self.constant([axis])], keepdims=kept)
        else:
            value = self.node(op, [value], axes=[axis], keepdims=kept)
        without, with_one = shape[:axis] + shape[axis + 1 :], [*shape[:axis], 1, *shape[axis + 1 :]]
        self.keep(value, with_one if kept else without)
        if self.rng.random() < 0.6:
            undone = self.axes_op("Squeeze" if kept else "Unsqueeze", value, axis)
            self.keep(undone, without if kept else with_one)

    def unsqueeze(self, value, shape):
        axis = self.rng.randint(0, len(shape))
        if len(shape) < 4:
            self.keep(self.axes_op("Unsqueeze", value, axis), [*shape[:axis], 1, *shape[axis:]])

    def transpose(self, value, shape):
        order = self.rng.sample(range(len(shape)), len(shape))
        self.keep(self.node("Transpose", [value], perm=order), [shape[i] for i in order])

    DRAWN = (slice, slice, split, concat, pad, cast, twice, add_neg, expand, where, neutral, constants, reduce, unsqueeze, transpose)  # fmt: skip

    def model(self):
        """Draw nodes; what nothing uses, and here and there what something does, is an output."""
        while len(self.nodes) < 12:
            value, shape = self.pick()
            if shape:
                self.rng.choice(self.DRAWN)(self, value, list(shape))
        used = {name for node in self.nodes for name in node.input}
        made = [name for name, _ in self.values[2:]]
        outputs = [name for name in made if name not in used or self.rng.random() < 0.05]
        axes = ["a", "b", "c"] if self.dynamic else self.shape
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in "xz"],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def feed(self):
        rng = np.random.default_rng(0)
        return {name: 3 * rng.standard_normal(self.shape).astype(np.float32) for name in "xz"}


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_graph(seed, target):
    maker = Maker(seed)
    proto = maker.model()
    verifier = Verifier(onnxopt.load(proto), [maker.feed()])
    try:
        verifier.check(onnxopt.load(proto))
    except RuntimeFailure as failure:
        pytest.skip(f"it does not run: {failure}")
    result = onnxopt.optimize(proto, target=target, verify=False, measure=False)
    assert not [p.reason for p in result.report.passes if p.status == "dropped" or p.dropped]
    verification = verifier.check(result.model)
    assert verification.ok, f"{verification.reason}\n{onnx.printer.to_text(proto)}"
    again = onnxopt.optimize(result.model, target=target, verify=False, measure=False)
    assert not [f"{p.name}: {a.summary}" for p in again.report.passes for a in p.applied]
