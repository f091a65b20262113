import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt import feeds
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.removal import Removal
from onnxopt.graph import all_nodes
from onnxopt.verify import Verifier


def _build(text, constants=None, opset=17, **shapes):
    """Build a model from ONNX text, with random float weights of these shapes and these constants."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head} agraph {text}")
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.uniform(0.2, 1, shape).astype(np.float32) * rng.choice([-1, 1], shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    arrays |= {name: np.asarray(array) for name, array in (constants or {}).items()}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


class Pruned:
    """A model with the first units of each group removed, proven equal to the original with zeros."""

    def __init__(self, model, keep):
        self.coupling = analyse(model)
        self.removal = Removal(model, self.coupling)
        self.model = model
        self.groups = {group.name: group.units for group in self.coupling.groups}
        for group in self.coupling.groups:
            self.removal.remove(group.roots[: group.units - max(1, round(group.units * keep))])
        onnx.checker.check_model(ir.to_proto(model))
        zeroed = self.removal.zeroed()
        inputs = feeds.generate(zeroed, sets=2)
        verification = Verifier(zeroed, inputs).check(model)
        assert verification.ok, verification.reason

    def shape(self, name):
        for graph in [
            self.model.graph,
            *(
                a.as_graph()
                for n in all_nodes(self.model)
                for a in n.attributes.values()
                if a.type == ir.AttributeType.GRAPH
            ),
        ]:
            if name in graph.initializers:
                return list(graph.initializers[name].const_value.shape)
        raise KeyError(name)

    def node(self, op_type):
        return next(node for node in all_nodes(self.model) if node.op_type == op_type)

    def why(self, name, axis):
        value = next(a.value for a in self.coupling.axes if a.value.name == name)
        return self.coupling.frozen(value, axis)


@pytest.fixture
def prune():
    def run(text, constants=None, keep=0.5, opset=17, **shapes):
        return Pruned(_build(text, constants, opset, **shapes), keep)

    return run


@pytest.fixture(scope="session")
def build():
    return _build
