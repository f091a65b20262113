"""Graphs drawn at random whose bodies read values from all scopes around them: any part of them, out and back in."""

import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxopt
from onnxopt.graft import RefusedError
from onnxopt.graft.cut import Flow
from onnxopt.runtime import open_session

X = np.array([-1.5, 0.5, 2.0], np.float32)


class Maker:
    """Draws graphs of vectors with three elements, with If, Loop and Scan in one another, and a function."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.count = 0

    def name(self):
        self.count += 1
        # In other bodies, names are used again.
        return f"v{self.count}"

    def info(self, name, kind=TensorProto.FLOAT, shape=(3,)):
        return helper.make_tensor_value_info(name, kind, shape)

    def nodes(self, visible, depth, number):
        nodes, visible = [], list(visible)
        for _ in range(number):
            drawn = self.rng.random()
            pick = lambda: self.rng.choice(visible[-6:])  # noqa: E731
            if drawn < 0.25 and depth < 2:
                made = self.branch(visible, depth)
            elif drawn < 0.35 and depth < 2:
                made = self.loop(visible, depth)
            elif drawn < 0.45:
                made = [helper.make_node("twice", [pick()], [self.name()], domain="local")]
            elif drawn < 0.7:
                made = [helper.make_node(self.rng.choice(["Add", "Mul", "Sub"]), [pick(), pick()], [self.name()])]
            else:
                made = [helper.make_node(self.rng.choice(["Tanh", "Neg", "Abs"]), [pick()], [self.name()])]
            nodes += made
            visible.append(made[-1].output[0])
        return nodes

    def body(self, visible, depth, inputs=()):
        states = [i.name for i in inputs if i.name.startswith("s")]
        nodes = self.nodes([*visible, *states], depth + 1, self.rng.randint(1, 3))
        weights = []
        if self.rng.random() < 0.5:
            weights.append(helper.make_tensor(f"w{depth}", TensorProto.FLOAT, [3], [1.0, float(self.count), 2.0]))
            nodes.append(helper.make_node("Add", [nodes[-1].output[0], f"w{depth}"], [self.name()]))
        return helper.make_graph(nodes, "body", list(inputs), [self.info(nodes[-1].output[0])], weights)

    def branch(self, visible, depth):
        start = self.count
        then = self.body(visible, depth)
        end, self.count = self.count, start
        other = self.body(visible, depth)
        self.count = max(end, self.count)
        return [helper.make_node("If", ["c"], [self.name()], then_branch=then, else_branch=other)]

    def loop(self, visible, depth):
        body = self.body(
            visible,
            depth,
            [
                self.info(f"i{depth}", TensorProto.INT64, ()),
                self.info(f"go{depth}", TensorProto.BOOL, ()),
                self.info(f"s{depth}"),
            ],
        )
        on = self.name()
        body.node.append(helper.make_node("Identity", [f"go{depth}"], [on]))
        result = body.output[0]
        del body.output[:]
        body.output.extend([self.info(on, TensorProto.BOOL, ()), result])
        return [helper.make_node("Loop", ["trips", "", self.rng.choice(visible)], [self.name()], body=body)]

    def model(self):
        nodes = self.nodes(["x", "bias"], 0, 9)
        outputs = dict.fromkeys([nodes[-1].output[0], nodes[self.rng.randrange(len(nodes))].output[0]])
        graph = helper.make_graph(
            nodes,
            "drawn",
            [self.info("x"), self.info("c", TensorProto.BOOL, ())],
            [self.info(name) for name in outputs],
            [
                helper.make_tensor("bias", TensorProto.FLOAT, [3], [0.25, -0.5, 1.0]),
                helper.make_tensor("trips", TensorProto.INT64, [], [2]),
            ],
        )
        twice = helper.make_function(
            "local", "twice", ["p"], ["q"], [helper.make_node("Add", ["p", "p"], ["q"])], [helper.make_opsetid("", 17)]
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        proto = helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=8)
        onnx.checker.check_model(proto)
        return proto

    def cut(self, model):
        """Draw a cut: any values, and whatever else is needed then."""
        flow = Flow(model)
        made = [v for node in flow.nodes for v in node.outputs if v in flow.varying]
        target = self.rng.choice(made)
        sources = [self.rng.choice([flow.value("x"), *made])]
        nodes, sides = flow.between(sources, [target])
        read = [v for v in sources if any(v in flow.reads[n] for n in nodes)]
        return f"{','.join(v.name for v in [*read, *sides])}->{target.name}" if read else None


def run(model, choose):
    with open_session(model, optimized=False) as session:
        return session.run({"x": X, "c": np.array(choose)})


@pytest.mark.parametrize("seed", range(12))
def test_out_and_back_in(seed):
    maker = Maker(seed)
    model, donor = onnxopt.load(maker.model()), onnxopt.load(maker.model())
    expected = [run(model, choose) for choose in (True, False)]
    for _ in range(3):
        cut = maker.cut(model)
        if cut is None:
            continue
        assert onnxopt.extract(model, cut).certificate.ok
        same = onnxopt.graft(model, model, replace=cut, with_=cut).model
        for choose, outputs in zip((True, False), expected, strict=True):
            found = run(same, choose)
            assert all(np.array_equal(found[name], outputs[name]) for name in outputs)
        other = maker.cut(donor)
        if (
            other is not None
            and other.count(",") == cut.count(",")
            and ("c" in other.split(",")) == ("c" in cut.split(","))
        ):
            try:
                assert onnxopt.graft(model, donor, replace=cut, with_=other).certificate.ok
            except RefusedError as refused:
                assert refused.reason in ("cycle", "shape", "boundary")
