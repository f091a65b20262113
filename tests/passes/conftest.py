import collections
import dataclasses

import onnx
import pytest

import onnxopt
from onnxopt.graph import all_nodes


@dataclasses.dataclass
class Rewritten:
    """A model after some passes, verified against what it was."""

    model: object
    report: object

    @property
    def ops(self):
        """How often each operator is left, nested graphs and functions included."""
        return dict(collections.Counter(node.op_type for node in all_nodes(self.model)))

    @property
    def nodes(self):
        """The nodes of the main graph."""
        return list(self.model.graph)

    @property
    def refusals(self):
        return {reason for p in self.report.passes for reason, _ in p.refusals}

    @property
    def edits(self):
        return sum(len(p.applied) for p in self.report.passes)


@pytest.fixture
def rewritten():
    """Run passes over ONNX text (or a proto); the result must verify, and a second run must find nothing."""

    def run(source, passes, *, target="portable", verify=True):
        proto = onnx.parser.parse_model(source) if isinstance(source, str) else source
        result = onnxopt.optimize(proto, passes=passes, target=target, verify=verify, measure=False)
        assert not [d.reason for p in result.report.passes for d in p.dropped]
        assert not [p.reason for p in result.report.passes if p.status == "dropped"]
        assert not verify or result.report.verification is not None, result.report.not_verified
        assert not verify or result.report.verification.ok, result.report.verification.reason
        again = onnxopt.optimize(result.model, passes=passes, target=target, verify=False, measure=False)
        assert not [a.summary for p in again.report.passes for a in p.applied]
        return Rewritten(result.model, result.report)

    return run
