"""Shapes, elements and types against what really comes out: of ONNX's own test cases, and of ONNX Runtime."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shape_rules import RULES
from onnxopt.analysis.shape_view import Content
from onnxopt.analysis.shapes import Shapes

Bindings = dict[tuple[str, bool], int]
MODELS = Path(__file__).parents[2] / "models"


@dataclasses.dataclass
class Outcome:
    """What a comparison found.

    Attributes:
        wrong: Claims that reality refutes, in words.
        values: How many tensors were compared.
        complete: How many of them have a shape made of nothing but sizes of model inputs.
    """

    wrong: list[str] = dataclasses.field(default_factory=list)
    values: int = 0
    complete: int = 0

    def compare(self, shapes: Shapes, value: ir.Value, actual: np.ndarray[Any, Any], sizes: Bindings) -> None:
        """Compare what is known about a value with what it is. Symbols met for the first time are bound."""
        shape = shapes.of(value)
        where = f"{value.producer().op_type if value.producer() else 'input'} {value.name}"  # type: ignore[union-attr]
        self.values += 1
        if shape is None:
            return
        given = set(sizes)
        self.complete += all(set(dims.symbols(d)) <= given for d in shape)
        if len(shape) != actual.ndim:
            self.wrong.append(f"{where}: rank {len(shape)}, really {actual.ndim}")
            return
        for axis, (dim, size) in enumerate(zip(shape, actual.shape, strict=True)):
            if not holds(dim, size, sizes):
                self.wrong.append(f"{where}: axis {axis} is {dim}, really {size} ({sizes})")
        content = shapes.known_content(value)
        if content is None:
            return
        if content.shape != actual.shape:
            self.wrong.append(f"{where}: elements of shape {content.shape}, really {actual.shape}")
            return
        for item, element in zip(content.items, actual.reshape(-1).tolist(), strict=True):
            if item is not None and not holds(item, int(element), sizes):
                self.wrong.append(f"{where}: holds {item}, really {element} ({sizes})")


def holds(dim: Dim, number: int, sizes: Bindings) -> bool:
    """Whether the dim is this number; a symbol alone that has no size yet gets it."""
    unbound = [s for s in dims.symbols(dim) if s not in sizes]
    if len(unbound) == 1 and dim == dims.symbol(unbound[0][0], opaque=unbound[0][1]):
        sizes[unbound[0]] = number
        return True
    return bool(unbound) or dims.evaluate(dim, sizes) == number


# ONNX's test cases ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return list(collect_testcases(None))


def arrays(tensors: Sequence[Any]) -> list[np.ndarray[Any, Any] | None]:
    """Return the tensors as arrays, None for sequences, optionals and types numpy lacks."""
    return [np.asarray(t) if isinstance(t, (np.ndarray, np.generic)) else None for t in tensors]


def variant(case: Any, mode: str) -> tuple[onnx.ModelProto, Bindings]:
    """Return the case's model without declared results.

    Args:
        case: The test case.
        mode: "given" keeps its inputs; "symbolic" gives every axis a name; "constant" does too, but makes constants
            of the small integer inputs.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    graph = proto.graph
    del graph.value_info[:]
    for output in graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    if mode == "given":
        return proto, {}
    sizes: Bindings = {}
    kept = []
    for info, array in zip(graph.input, arrays(case.data_sets[0][0]), strict=False):
        if mode == "constant" and array is not None and array.dtype.kind in "iub" and array.size <= 64:
            graph.initializer.append(numpy_helper.from_array(array, info.name))
            continue
        kept.append(onnx.ValueInfoProto.FromString(info.SerializeToString()))
        if array is not None and info.type.HasField("tensor_type"):
            shape = kept[-1].type.tensor_type.shape
            del shape.dim[:]
            for size in array.shape:
                shape.dim.add().dim_param = f"d{len(sizes)}"
                sizes[f"d{len(sizes)}", False] = size
    del graph.input[:]
    graph.input.extend(kept)
    return proto, sizes


@pytest.mark.parametrize(("mode", "least"), [("given", 0.78), ("symbolic", 0.75), ("constant", 0.88)])
def test_cases_of_the_standard(cases: list[Any], mode: str, least: float) -> None:
    outcome = Outcome()
    for case in cases:
        proto, sizes = variant(case, mode)
        model = ir.from_proto(proto)
        shapes = Shapes(model)
        for value, actual in zip(model.graph.outputs, arrays(case.data_sets[0][1]), strict=False):
            if actual is not None:
                outcome.compare(shapes, value, actual, dict(sizes))
    assert not outcome.wrong
    assert outcome.values > 1500
    assert outcome.complete / outcome.values > least


def test_types_of_the_standard(cases: list[Any]) -> None:
    wrong, known = [], 0
    for case in cases:
        model = ir.from_proto(case.model)
        declared = [value.dtype for value in model.graph.outputs]
        for node in model.graph:
            for output in node.outputs:
                output.type = None
        shapes = Shapes(model)
        for value, dtype in zip(model.graph.outputs, declared, strict=True):
            found = shapes.dtype(value)
            known += found is not None
            if found is not None and found != dtype and not is_container(case, value.name):
                wrong.append(f"{case.name}: {found}, really {dtype}")
    assert not wrong
    assert known > 1800


def is_container(case: Any, name: str | None) -> bool:
    return any(o.name == name and not o.type.HasField("tensor_type") for o in case.model.graph.output)


def test_every_operator_of_the_standard_has_a_rule_or_a_reason() -> None:
    latest = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == "" and not s.deprecated}
    containers = {
        "ConcatFromSequence",  # the tensors of a sequence are not followed
        "Optional",
        "OptionalGetElement",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceMap",
        "SplitToSequence",
    }
    by_value = {"StringNormalizer"}  # drops stop words
    assert latest - set(RULES[""]) == containers | by_value


# ONNX Runtime -----------------------------------------------------------------------------------------


def run(proto: onnx.ModelProto, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Run a model without optimizations and return every value that a node of the main graph gives."""
    everything = onnx.ModelProto()
    everything.CopyFrom(proto)
    names = [name for node in proto.graph.node for name in node.output if name]
    declared = {output.name for output in proto.graph.output}
    everything.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in declared)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(everything.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def compare_with_runtime(model: ir.Model, feeds: Sequence[Mapping[str, Any]]) -> Outcome:
    """Compare everything known about the values of the main graph with what the runtime gives."""
    shapes = Shapes(model)
    outcome = Outcome()
    for feed in feeds:
        results = run(ir.to_proto(model), feed)
        sizes: Bindings = {}
        for value in model.graph.inputs:
            for dim, size in zip(shapes.of(value) or (), feed[value.name or ""].shape, strict=True):
                assert holds(dim, size, sizes)
        for node in model.graph:
            for value in node.outputs:
                actual = results.get(value.name or "")
                if isinstance(actual, np.ndarray):
                    outcome.compare(shapes, value, actual, sizes)
    return outcome


def graph_of(inputs: str, nodes: Sequence[str], opset: int = 22) -> ir.Model:
    """Return a model of these nodes, each written without its output."""
    body = "\n".join(f"y{i} = {node}" for i, node in enumerate(nodes))
    header = f'ir_version: 10, opset_import: ["":{opset}, "com.microsoft":1]'
    return ir.from_onnx_text(f"<{header}> g ({inputs}) => (float[] last) {{ {body} last = Identity(x) }}")


def test_slices_as_the_runtime_cuts_them() -> None:
    ends = (-(2**63), -7, -3, -1, 0, 1, 2, 5, 2**63 - 1)
    cuts = list(itertools.product(ends, ends, (1, 2, -1, -3)))
    nodes, constants = [], []
    for index, (start, end, step) in enumerate(cuts):
        for letter, number in (("s", start), ("e", end), ("t", step)):
            constants.append((f"{letter}{index}", number))
        nodes.append(f"Slice(x, s{index}, e{index}, zero, t{index})")
    model = graph_of("float[n] x", nodes)
    add_constants(model, [*constants, ("zero", 0)])
    outcome = compare_with_runtime(model, [{"x": np.zeros(n, np.float32)} for n in range(7)])
    assert not outcome.wrong
    # Cut backwards from the far end, where the standard and the runtime do not agree.
    assert outcome.complete == outcome.values - 7 * 2 * len(ends)


def add_constants(model: ir.Model, constants: Sequence[tuple[str, int]]) -> None:
    """Give the values of these names their numbers, as lists of one."""
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, number in constants:
        value = used[name]
        value.const_value = ir.tensor(np.array([number]), name=name)
        model.graph.register_initializer(value)


def test_elements_of_slices_as_the_runtime_cuts_them() -> None:
    ends = (-9, -3, -1, 0, 1, 3, 9)
    cuts = list(itertools.product(ends, ends, (1, 2, -1, -2)))
    nodes, constants = ["Shape(x)"], []
    for index, (start, end, step) in enumerate(cuts):
        for letter, number in (("s", start), ("e", end), ("t", step)):
            constants.append((f"{letter}{index}", number))
        nodes.append(f"Slice(y0, s{index}, e{index}, zero, t{index})")
    model = graph_of("float[a,b,c,d] x", nodes)
    add_constants(model, [*constants, ("zero", 0)])
    outcome = compare_with_runtime(model, [{"x": np.zeros((2, 3, 4, 5), np.float32)}])
    assert not outcome.wrong
    assert outcome.complete == outcome.values


def test_windows_as_the_runtime_moves_them() -> None:
    """Pooling and convolution over every size of an axis: strides, dilations, padding, partial last windows."""
    nodes = []
    for k, s, d in itertools.product((1, 2, 3), (1, 2, 3), (1, 2)):
        for before, after in ((0, 0), (1, 0), (0, 1), (1, 1)):
            if max(before, after) >= k:
                continue
            at = f"kernel_shape=[{k}], strides=[{s}], dilations=[{d}]"
            nodes += [f"MaxPool <{at}, pads=[{before},{after}], ceil_mode={ceil}> (x)" for ceil in (0, 1)]
            nodes.append(f"AveragePool <{at}, pads=[{before},{after}], ceil_mode=1> (x)")
            nodes.append(f"Conv <{at}, pads=[{before},{after}]> (x, w{k})")
            nodes.append(f"ConvTranspose <{at}, pads=[{before},{after}], output_padding=[{s - 1}]> (x, w{k})")
        if d > 1 or s > k:
            continue  # the runtime refuses to choose the padding
        nodes += [f"MaxPool <{at}, auto_pad={mode}> (x)" for mode in ('"SAME_UPPER"', '"SAME_LOWER"', '"VALID"')]
        nodes.append(f'Conv <{at}, auto_pad="SAME_UPPER"> (x, w{k})')
        nodes.append(f'ConvTranspose <{at}, auto_pad="SAME_UPPER"> (x, w{k})')
    model = graph_of("float[1,1,n] x, float[1,1,1] w1, float[1,1,2] w2, float[1,1,3] w3", nodes)
    feeds = [
        {"x": np.zeros((1, 1, n), np.float32), **{f"w{k}": np.zeros((1, 1, k), np.float32) for k in (1, 2, 3)}}
        for n in range(6, 16)
    ]
    outcome = compare_with_runtime(model, feeds)
    assert not outcome.wrong
    assert outcome.complete == outcome.values


def test_windows_with_channels_last_as_the_runtime_moves_them() -> None:
    nodes = []
    for k, s, d in itertools.product((1, 2, 3), (1, 2, 3), (1, 2)):
        at = f"kernel_shape=[{k},2], strides=[{s},1], dilations=[{d},1]"
        for before, after in ((0, 0), (1, 0), (0, 1)):
            if max(before, after) < k:
                pads = f"pads=[{before},0,{after},1]"
                nodes += [f"com.microsoft.NhwcMaxPool <{at}, {pads}, ceil_mode={ceil}> (x)" for ceil in (0, 1)]
    model = graph_of("uint8[b,h,w,5] x", nodes, 11)
    for value in model.graph.outputs:
        value.type = ir.TensorType(ir.DataType.UINT8)
    shapes = Shapes(model)
    assert {shapes.dtype(n.outputs[0]) for n in model.graph} == {ir.DataType.UINT8}
    outcome = compare_with_runtime(model, [{"x": np.zeros((2, n, 4, 5), np.uint8)} for n in range(6, 12)])
    assert not outcome.wrong
    assert outcome.complete == outcome.values


def test_resizing_as_the_runtime_rounds_it() -> None:
    scales = (0.5, 0.25, 1.0, 2.0, 3.0, 0.3, 1.7)
    nodes = [f"Resize(x, , f{i})" for i in range(len(scales))]
    nodes += [f"Resize(z, , f{i})" for i in range(len(scales))]
    model = graph_of("float[1,1,n,n] x, float[1,1,37,23] z", nodes)
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for index, scale in enumerate(scales):
        value = used[f"f{index}"]
        value.const_value = ir.tensor(np.array([1, 1, scale, scale], np.float32), name=value.name)
        model.graph.register_initializer(value)
    fixed = np.zeros((1, 1, 37, 23), np.float32)
    feeds = [{"x": np.zeros((1, 1, n, n), np.float32), "z": fixed} for n in (8, 9, 10, 11, 50)]
    outcome = compare_with_runtime(model, feeds)
    assert not outcome.wrong
    assert outcome.complete == outcome.values - 2 * len(feeds), "0.3 and 1.7 of an unknown size"


def test_stretching_as_the_runtime_does_it() -> None:
    nodes = ["Add(x, w)", "Mul(y0, x)", "Where(c, x, w)", "Expand(x, t)", "Max(x, w, x)", "MatMul(p, q)"]
    model = graph_of("float[a,b] x, float[c,b] w, bool[a,1] c, int64[2] t, float[e,a,b] p, float[f,b,c] q", nodes)
    feeds = []
    for a, b, c in ((3, 4, 3), (1, 4, 3), (3, 4, 1), (0, 4, 1), (1, 4, 0), (1, 1, 1)):
        feeds.append(
            {
                "x": np.zeros((a, b), np.float32),
                "w": np.zeros((c, b), np.float32),
                "c": np.zeros((a, 1), np.bool_),
                "t": np.array([max(a, 1), 1]),
                "p": np.zeros((2, a, b), np.float32),
                "q": np.zeros((1, b, c), np.float32),
            }
        )
    outcome = compare_with_runtime(model, feeds)
    assert not outcome.wrong


FUSED: list[tuple[str, str]] = [
    ("FusedMatMul <transA=1, alpha=2.0> (a, b)", "float[2,k,m] a, float[2,k,n] b"),
    ("FusedMatMul <transB=1> (a, b)", "float[2,m,k] a, float[2,n,k] b"),
    ('FusedConv <activation="Relu", pads=[1,1,1,1]> (a, b)', "float[n,3,h,w] a, float[4,3,3,3] b"),
    ("Gelu(a)", "float[m,n] a"),
    ("QuickGelu(a)", "float[m,n] a"),
    ("FastGelu(a, b)", "float[m,8] a, float[8] b"),
    ("BiasGelu(a, b)", "float[m,8] a, float[8] b"),
    ("SimplifiedLayerNormalization(a, b)", "float[m,n,8] a, float[8] b"),
    ("SkipLayerNormalization(a, b, c)", "float[m,n,8] a, float[m,n,8] b, float[8] c"),
    ("SkipSimplifiedLayerNormalization(a, b, c)", "float[m,n,8] a, float[m,n,8] b, float[8] c"),
    ("RotaryEmbedding(a, i, b, c)", "float[m,n,16] a, int64[m,n] i, float[32,8] b, float[32,8] c"),
    ("MultiHeadAttention <num_heads=2> (a, b, c)", "float[m,n,16] a, float[m,k,16] b, float[m,k,16] c"),
    ("Attention <num_heads=2> (a, b, c)", "float[m,n,16] a, float[16,48] b, float[48] c"),
    (
        "Attention <num_heads=2, qkv_hidden_sizes=[16,16,32]> (a, b, c)",
        "float[m,n,16] a, float[16,64] b, float[64] c",
    ),
    ("DynamicQuantizeMatMul(a, b, c)", "float[m,k] a, int8[k,n] b, float[1] c"),
    ("MatMulNBits <K=32, N=5, bits=4, block_size=32> (a, b, c)", "float[m,n,32] a, uint8[5,1,16] b, float[5] c"),
]
SIZES = ({"m": 2, "n": 5, "k": 4, "h": 7, "w": 9}, {"m": 1, "n": 3, "k": 6, "h": 5, "w": 5})


def feed_for(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Any]:
    feed: dict[str, Any] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else sizes[d.value or ""] for d in value.shape]
        feed[value.name or ""] = np.zeros(shape, value.dtype.numpy())
    return feed


def fused_graph(node: str, inputs: str, outputs: str) -> ir.Model:
    domain = "" if node.startswith("Simplified") else "com.microsoft."
    header = 'ir_version: 10, opset_import: ["":17, "com.microsoft":1]'
    return ir.from_onnx_text(f"<{header}> g ({inputs}) => (float[] y) {{ {outputs} = {domain}{node} }}")


@pytest.mark.parametrize(("node", "inputs"), FUSED, ids=[n.partition("(")[0] for n, _ in FUSED])
def test_fused_operators_of_the_runtime(node: str, inputs: str) -> None:
    model = fused_graph(node, inputs, "y")
    outcome = compare_with_runtime(model, [feed_for(model, sizes) for sizes in SIZES])
    assert not outcome.wrong
    assert outcome.complete == outcome.values == len(SIZES)


def test_further_outputs_of_fused_operators() -> None:
    cases = (
        ("SkipLayerNormalization(a, b, c)", "float[m,n,8] a, float[m,n,8] b, float[8] c", "y, , , total"),
        (
            "MultiHeadAttention <num_heads=2> (a, b, c, , , , p, q)",
            "float[m,n,16] a, float[m,n,16] b, float[m,n,16] c, float[m,2,k,8] p, float[m,2,k,8] q",
            "y, key, value",
        ),
        (
            "GroupQueryAttention <num_heads=4, kv_num_heads=2> (a, b, c, p, q, lengths, total)",
            "float[m,1,32] a, float[m,1,16] b, float[m,1,16] c, float[m,2,k,8] p, float[m,2,k,8] q, int32[m] lengths, "
            "int32[1] total",
            "y, key, value",
        ),
        ("Attention <num_heads=2> (a, b, c)", "float[m,n,16] a, float[16,48] b, float[48] c", "y, cache"),
    )
    for node, inputs, outputs in cases:
        model = fused_graph(node, inputs, outputs)
        feeds = [feed_for(model, sizes) for sizes in SIZES]
        for feed in feeds:
            if "total" in feed:
                feed["total"] += 1
        outcome = compare_with_runtime(model, feeds)
        assert not outcome.wrong, node
        assert outcome.values == len(SIZES) * len([o for o in outputs.split(",") if o.strip()])


def test_slices_between_computed_positions() -> None:
    nodes = [
        "Shape(x)",
        "Shape(w)",
        "Slice(x, y1, y0)",
        "Slice(x, zero, y1)",
        "Slice(x, y1, far)",
        "Slice(x, back, y1)",
    ]
    model = graph_of("float[n] x, float[m] w", nodes)
    add_constants(model, [("zero", 0), ("far", 2**63 - 1), ("back", -3)])
    feeds = [{"x": np.zeros(n, np.float32), "w": np.zeros(m, np.float32)} for n in range(6) for m in range(6)]
    outcome = compare_with_runtime(model, feeds)
    assert not outcome.wrong
    assert outcome.complete == outcome.values


LOOP = """g (float[b,4] x, int64 n, bool c) => (float[r,4] y, float[q,4] v, float[s,r,4] w) {{
    y, v, w = Loop(n, c, x, x) <body = l (int64 i, bool k, float[p,4] state, float[q,4] other)
        => (bool k2, float[p,4] state2, float[q,4] other2, float[p,4] out)
        {{ k2 = Identity(k) state2 = Relu(state) other2 = {other} out = Relu(state) }}> }}"""
BRANCH = """g (float[b,4] x, int64 n, bool c) => (float[r,4] y) {{
    y = If(c) <then_branch = t () => (float[p,4] u) {{ u = Relu(x) }},
               else_branch = e () => (float[q,4] v) {{ v = {other} }}> }}"""


@pytest.mark.parametrize("graph", [LOOP, BRANCH])
@pytest.mark.parametrize("other", ["Relu({})", "Concat <axis=0> ({}, x)"])
def test_nodes_with_graphs(graph: str, other: str) -> None:
    text = graph.format(other=other.format("other" if graph is LOOP else "x"))
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["":22]> {text}')
    x = np.zeros((3, 4), np.float32)
    feeds = [{"x": x, "n": np.array(n), "c": np.array(c)} for n in (0, 1, 3) for c in (True, False)]
    assert not compare_with_runtime(model, feeds).wrong


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_whole_models(path: Path) -> None:
    model = ir.load(path)
    feeds = [feed_for(model, dict.fromkeys(names_of(model), size)) for size in (1, 3)]
    outcome = compare_with_runtime(model, feeds)
    assert not outcome.wrong
    assert outcome.complete == outcome.values > 0


def names_of(model: ir.Model) -> list[str]:
    return [d.value or "" for v in model.graph.inputs for d in v.shape or () if not isinstance(d, int)]


def test_a_wrong_claim_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself can fail: each of these claims is off by one."""
    model = graph_of("float[n] x", ["Shape(x)", "Relu(x)"])
    off = dims.symbol("n") + 1
    lies: tuple[tuple[str, Callable[..., Any], str], ...] = (
        ("of", lambda self, value: (off,) if value.name == "y1" else (dims.symbol("n"),), "axis 0 is n + 1"),
        (
            "known_content",
            lambda self, value: Content((1,), (off,)) if value.name == "y0" else None,
            "holds n + 1",
        ),
    )
    for name, lie, complaint in lies:
        with monkeypatch.context() as patch:
            patch.setattr(Shapes, name, lie)
            outcome = compare_with_runtime(model, [{"x": np.zeros(3, np.float32)}])
        assert any(complaint in wrong for wrong in outcome.wrong)
