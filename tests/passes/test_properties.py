"""What holds for every built-in pass on every model, whatever it does."""

import random
from pathlib import Path

import onnx
import onnx.backend.test
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt import registry
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, Guarantee
from onnxopt.graph import scopes
from onnxopt.model import load
from onnxopt.runtime import evaluate_node

ROOT = Path(__file__).parents[2]
BACKEND = Path(onnx.backend.test.__file__).parent / "data"
SAMPLE = 25

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
TEXTS = {
    "constants": f"""{HEAD} g (float[n,4] x) => (float[n,4] y, float[2] z) <float[4] w = {{1, 2, 3, 4}}> {{
        a = Constant <value_ints = [2]> ()  s = Shape(x)  i = Constant <value_int = 1> ()  d = Gather(s, i)
        e = Div(d, a)  f = Cast <to = 1> (e)  v = Mul(w, f)  y = Add(x, v)
        one = Constant <value_floats = [1.0, 1.0]> ()  z = Neg(one)
    }}""",
    "identities": f"""{HEAD} g (float[n,4] x) => (float[n,4] y, float[n,4] z) <float[1] zero = {{0}}> {{
        a = Identity(x)  b = Add(a, zero)  c = Identity(b)  y = Identity(c)  z = Identity(x)
    }}""",
    "duplicates": f"""{HEAD} g (float[n,4] x) => (float[n,4] y, float[n,4] z)
    <float[4] w = {{1, 2, 3, 4}}, float[4] v = {{1, 2, 3, 4}}> {{
        a = Mul(x, w)  b = Mul(x, v)  c = Exp(a)  d = Exp(b)  y = Add(c, d)  z = Add(d, c)  dead = Sin(x)
    }}""",
    "nested": f"""{HEAD} g (float[4] x, bool c) => (float[4] y) <float[4] w = {{1, 2, 3, 4}}, float[4] u = {{1, 2, 3, 4}}> {{
        k = Neg(w)  i = Identity(x)
        y = If (c) <
            then_branch = t () => (float[4] a)
                {{ p = Neg(w)  q = Add(i, p)  r = Constant <value_float = 1.0> ()  a = Mul(q, r) }},
            else_branch = e () => (float[4] b) <float[4] v = {{1, 2, 3, 4}}>
                {{ m = Identity(k)  n = Add(m, v)  o = Sub(n, i)  b = Identity(o) }}>
    }}""",
    "loop": f"""{HEAD} g (float[4] x, int64 n) => (float[4] y, float[a,4] all) <float[4] w = {{1, 2, 3, 4}}, bool t = {{1}}> {{
        y, all = Loop (n, t, x) <body = b (int64 i, bool ci, float[4] s) => (bool co, float[4] so, float[4] out) {{
            co = Identity(ci)  z = Constant <value_float = 0.0> ()  v = Neg(w)  p = Add(s, v)  so = Add(p, z)  out = Identity(s)
        }}>
    }}""",
    "functions": """<ir_version: 10, opset_import: ["" : 18, "my" : 1]>
        g (float[4] x) => (float[4] y) { a = my.F <to = 1> (x)  b = my.F <to = 1> (x)  y = Add(a, b) }
        <domain: "my", opset_import: ["" : 18]> F <to> (x) => (y) {
            one = Constant <value_float = 1.0> ()  two = Constant <value_float = 2.0> ()  s = Add(one, two)
            i = Identity(x)  c = Cast <to: int = @to> (i)  d = Cast <to: int = @to> (i)  e = Add(c, d)  y = Mul(e, s)
        }
        <domain: "my", opset_import: ["" : 18]> Unused (x) => (y) { y = Neg(x) }""",
    "convolution": f"""{HEAD} g (float[n,1,4,4] x) => (float[n,2,4,4] y)
    <float[2,1,1,1] w = {{1, 2}}, float[2] s = {{1, 2}}, float[2] m = {{3, 4}}> {{
        c = Conv(x, w)  b = BatchNormalization(c, s, m, m, s)  y = Relu(b)
    }}""",
    "transposed convolution": f"""{HEAD} g (float[n,1,4,4] x) => (float[n,2,4,4] y)
    <float[1,2,1,1] w = {{1, 2}}, float[2] s = {{1, 2}}, float[2] m = {{3, 4}}> {{
        c = ConvTranspose(x, w)  b = BatchNormalization(c, s, m, m, s)  y = Relu(b)
    }}""",
    "nothing to do": f"{HEAD} g (float[n] x) => (float[n] y) {{ y = Neg(x) }}",
}


def overridable():
    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[2] x, float[2] w) => (float[2] y) {{ v = Neg(w)  y = Add(x, v) }}"
    )
    for name in ("w", "spare"):
        proto.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [2], [0.0, 0.0]))
    proto.metadata_props.add(key="who", value="a test")
    proto.doc_string = "keep this"
    return proto


def cases():
    yield from ((name, onnx.parser.parse_model(text)) for name, text in TEXTS.items())
    yield "overridable", overridable()
    yield from ((path.stem, path) for path in sorted((ROOT / "models").glob("*.onnx")))
    found = sorted(
        p for kind in ("simple", "pytorch-operator", "pytorch-converted") for p in BACKEND.glob(f"{kind}/*/model.onnx")
    )
    yield from ((p.parent.name, p) for p in random.Random(0).sample(found, SAMPLE))


CASES = dict(cases())
EXACT = [name for name in registry.BUILTIN if registry.load(name).guarantee is Guarantee.EXACT]
OPTIONS = {"prune-weights": {"ratio": 0.5}}
"""What passes that cannot run without an option are given."""


def items(model, spec, *, apply):
    """Run a pass over a model, as the manager does; return what it yielded."""
    ctx = Context(target="cpu", seed=0, evaluate=evaluate_node, shapes=Shapes(model))
    graph_pass = registry.load(spec)(**OPTIONS.get(spec, {}))
    if graph_pass.skip_reason(model, ctx) is not None:
        return []
    found = []
    for item in graph_pass.run(model, ctx):
        found.append(item)
        if apply and isinstance(item, Edit):
            item.apply()
    return found


def edits(found):
    return [item for item in found if isinstance(item, Edit)]


def content(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def signature(model):
    return [(v.name, v.type, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.parametrize("spec", registry.BUILTIN)
@pytest.mark.parametrize("case", CASES)
def test_properties(spec, case, tmp_path):
    original = load(CASES[case])
    before = content(original)

    drained = items(original, spec, apply=False)
    assert content(original) == before, "it changed the model without being told to"

    model, twin = original.clone(), original.clone()
    found, again = items(model, spec, apply=True), items(twin, spec, apply=True)
    after = content(model)
    assert content(original) == before, "it wrote into a tensor that clones share"
    assert [str(i.site) for i in found] == [str(i.site) for i in again]
    assert content(twin) == after, "it is not deterministic"
    assert edits(found) or after == before, "it changed something without an edit"
    assert bool(edits(drained)) == bool(edits(found))
    sites = [e.site for e in edits(found)]
    assert len(set(sites)) == len(sites)
    assert {s.pass_name for s in sites} <= {spec}
    assert {s.graph for s in sites} <= {s.path for s in scopes(original)}

    assert signature(model) == signature(original)
    assert model.metadata_props == original.metadata_props
    assert model.doc_string == original.doc_string
    assert model.opset_imports.items() >= original.opset_imports.items()
    if is_valid(original, tmp_path / "before.onnx"):
        assert is_valid(model, tmp_path / "after.onnx")
    if spec in EXACT:
        assert not [e.summary for e in edits(items(model, spec, apply=True))]


def is_valid(model, path):
    onnxopt.save(model, path)
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError:
        return False
    return True


@pytest.mark.parametrize("spec", EXACT)
@pytest.mark.parametrize("case", [*TEXTS, "mnist_cnn_bn"])
def test_exact_passes_are_exact(spec, case):
    model = load(CASES[case])
    if edits(items(model, spec, apply=True)):
        verification = onnxopt.verify(CASES[case], model)
        assert verification.ok, verification.reason


@pytest.mark.parametrize(
    "spec",
    [
        "fold-constants",
        "remove-identities",
        "remove-dead-code",
        "merge-common-subexpressions",
        "deduplicate-initializers",
        "fuse-conv-bn",
        "quantize-weights",
        "quantize-dynamic",
        "prune-weights",
    ],
)
def test_the_cases_are_not_empty_words(spec):
    assert any(edits(items(load(c), spec, apply=False)) for c in CASES.values())
