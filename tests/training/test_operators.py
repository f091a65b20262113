"""Operators against ONNX Runtime; benchmarks/training.py does the same with all tests of the onnx package."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxopt import model as models
from onnxopt import runtime
from onnxopt.errors import DataError, ModelError
from onnxopt.training.interpreter import Interpreter


def close(ours: Any, theirs: Any) -> bool:
    if theirs is None or ours is None:
        return ours is theirs
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    array = ours.detach().numpy().astype(np.float64)
    tolerance = 1e-2 if theirs.dtype.kind not in "iub" and theirs.dtype.itemsize < 4 else 1e-4
    wanted = theirs.astype(np.float64)
    # the runtime hides by the smallest number instead of by minus infinity
    wanted[wanted < -1e38] = -np.inf
    finite = np.abs(wanted[np.isfinite(wanted)])
    room = tolerance * max(0.1, float(finite.max()) if finite.size else 0.0)
    return array.shape == wanted.shape and np.allclose(array, wanted, rtol=tolerance, atol=room, equal_nan=True)


def run(text: str, feed: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what torch and what the runtime compute."""
    model = models.load(onnx.parser.parse_model(text))
    with runtime.open_session(model, optimized=False) as session:
        expected = session.run(feed)
    return Interpreter(model).run(feed), expected


X = np.linspace(-2, 3, 2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6)
POSITIVE = np.abs(X) / 3.1 + 0.01


@pytest.mark.parametrize(
    "node",
    [
        *(
            f"y = {op}(x)"
            for op in [
                "Abs",
                "Neg",
                "Exp",
                "Floor",
                "Ceil",
                "Round",
                "Sign",
                "Sin",
                "Cos",
                "Tan",
                "Atan",
                "Sinh",
                "Cosh",
                "Tanh",
                "Asinh",
                "Erf",
                "Relu",
                "Sigmoid",
                "HardSigmoid",
                "HardSwish",
                "LeakyRelu",
                "Elu",
                "Selu",
                "Celu",
                "Softplus",
                "Softsign",
                "ThresholdedRelu",
                "Mish",
                "Gelu",
                "Shrink",
                "Identity",
                "Flatten",
                "Softmax",
                "LogSoftmax",
                "Hardmax",
                "ArgMax",
                "ArgMin",
                "GlobalAveragePool",
                "GlobalMaxPool",
                "GlobalLpPool",
                "MeanVarianceNormalization",
                "LpNormalization",
                "Transpose",
                "IsNaN",
                "Shape",
                "Size",
                "NonZero",
                "Dropout",
            ]
        ),
        *(
            f"y = {op}(p)"
            for op in ["Log", "Sqrt", "Reciprocal", "Asin", "Acos", "Atanh", "ReduceLogSum", "ReduceLogSumExp"]
        ),
        *(
            f"y = {op}(x, p)"
            for op in [
                "Add",
                "Sub",
                "Mul",
                "Div",
                "PRelu",
                "Max",
                "Min",
                "Sum",
                "Mean",
                "Greater",
                "Less",
                "GreaterOrEqual",
                "Equal",
            ]
        ),
        *(
            f"y = {op} <keepdims = {k}> (x, a)"
            for k in (0, 1)
            for op in [
                "ReduceSum",
                "ReduceMean",
                "ReduceMax",
                "ReduceMin",
                "ReduceProd",
                "ReduceL1",
                "ReduceL2",
                "ReduceSumSquare",
            ]
        ),
        "y = Pow(p, x)",
        "y = Mod <fmod = 1> (x, p)",
        'y = Gelu <approximate = "tanh"> (x)',
        "y = Clip(x, low)",
        "y = LRN <size = 3, alpha = 0.1> (x)",
        "y = BatchNormalization(x, c, c, c, c)",
        "y = InstanceNormalization(x, c, c)",
        "y = LayerNormalization <axis = -1> (x, six, six)",
        "y = GroupNormalization <num_groups = 2> (x, c, c)",
        "y = Concat <axis = 2> (x, p)",
        "y, z = Split <axis = 1, num_outputs = 2> (x)",
        "y = Slice(x, a, b, a)",
        "y = Unsqueeze(x, a)",
        "y = Tile(x, r)",
        "y = DepthToSpace <blocksize = 2> (x)",
        'y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)',
        "y = Trilu <upper = 0> (x)",
        "y = Gather <axis = 3> (x, a)",
        "y = Gather <axis = 1> (x, scalar)",
        "y = GatherND(x, a)",
        "y = CumSum <reverse = 1, exclusive = 1> (x, scalar)",
        "y, z = TopK <axis = -1> (x, one)",
        "y = Cast <to = 7> (x)",
        'y = Einsum <equation = "bchw,bcvw->bhv"> (x, p)',
        "t = Transpose <perm = [0, 1, 3, 2]> (p)  y = MatMul(x, t)",
        "f = Flatten(x)  g = Flatten(p)  y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, g, low)",
        'y = Resize <mode = "linear"> (x, , scales)',
        'y = Resize <mode = "cubic", coordinate_transformation_mode = "align_corners"> (x, , scales)',
        'y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric"> (x, , scales)',
        'y = Pad <mode = "reflect"> (x, pads)',
        "y = Pad(x, pads, low)",
        "q = QuantizeLinear(x, step, zero)  y = DequantizeLinear(q, step, zero)",
        "q, s, o = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, s, o)",
        "y = Where(m, x, p)",
        "y = LpPool <kernel_shape = [2, 2], strides = [2, 1], p = 2> (x)",
        "y = Expand(scalar, r)",
        "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 0]> (x, k)",
        "s = SplitToSequence <axis = 1> (x)  y = SequenceAt(s, scalar)",
    ],
)
def test_single_operators(node: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[2, 4, 5, 6] x, float[2, 4, 5, 6] p, bool[2, 4, 5, 6] m) => (y)
        <int64[1] a = {{1}}, int64[1] b = {{3}}, int64 scalar = {{2}}, int64[1] one = {{3}}, int64[4] r = {{1, 2, 1, 3}},
         float low = {{-0.5}}, float[4] c = {{0.5, 1, 2, 3}}, float[6] six = {{1, 2, 3, 4, 5, 6}},
         float[4] scales = {{1, 1, 2, 1.5}}, int64[8] pads = {{0, 0, 1, 2, 0, 0, 2, 1}}, float step = {{0.02}},
         uint8 zero = {{100}}, float[4, 1, 2, 1] k = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ {node} }}"""
    ours, theirs = run(text, {"x": X, "p": POSITIVE, "m": X > 0.3})
    assert close(ours["y"], theirs["y"])


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(op: str, gates: int, direction: str) -> None:
    ways, hidden = (2 if direction == "bidirectional" else 1), 4
    rng = np.random.default_rng(0)
    shapes = {
        "x": (5, 3, 2),
        "w": (ways, gates * hidden, 2),
        "r": (ways, gates * hidden, hidden),
        "b": (ways, 2 * gates * hidden),
    }
    feed: dict[str, Any] = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    feed["n"] = np.array([5, 2, 4], np.int32)
    inputs = ", ".join(f"float[{', '.join(map(str, s))}] {n}" for n, s in shapes.items())
    for extra in ("linear_before_reset = 1", "linear_before_reset = 0") if op == "GRU" else ("clip = 1.5",):
        text = f"""<ir_version: 8, opset_import: ["" : 17]> g ({inputs}, int32[3] n) => (y, h)
            {{ y, h = {op} <hidden_size = {hidden}, direction = "{direction}", {extra}> (x, w, r, b, n) }}"""
        ours, theirs = run(text, feed)
        assert close(ours["y"], theirs["y"]) and close(ours["h"], theirs["h"])


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    group=st.sampled_from([1, 2]),
    auto=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    op=st.sampled_from(["Conv", "MaxPool", "AveragePool"]),
    ceil=st.booleans(),
    counted=st.booleans(),
)
def test_windows(
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: list[int],
    group: int,
    auto: str,
    op: str,
    ceil: bool,
    counted: bool,
) -> None:
    pads = [min(p, kernel[i % 2] - 1) for i, p in enumerate(pads)]
    padding = f"pads = {pads}" if auto == "NOTSET" else f'auto_pad = "{auto}"'
    extra = {
        "Conv": f"group = {group}",
        "MaxPool": f"ceil_mode = {int(ceil)}",
        "AveragePool": f"ceil_mode = {int(ceil)}, count_include_pad = {int(counted)}",
    }[op]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, *size)).astype(np.float32)
    w = rng.standard_normal((2, 4 // group, *kernel)).astype(np.float32)
    inputs = "x, w" if op == "Conv" else "x"
    weights = f", float[2, {4 // group}, {kernel[0]}, {kernel[1]}] w" if op == "Conv" else ""
    text = f"""<ir_version: 8, opset_import: ["" : 19]> g (float[2, 4, h, v] x{weights}) => (float[a, b, c, d] y) {{
        y = {op} <kernel_shape = {list(kernel)}, strides = {list(strides)}, {padding}, {extra}> ({inputs})
    }}"""
    # the runtime takes negative padding for "SAME" where windows are narrower than their stride, or refuses it
    assume(not auto.startswith("SAME") or all(k >= s for k, s in zip(kernel, strides, strict=True)))
    ours, theirs = run(text, {"x": x, "w": w} if op == "Conv" else {"x": x})
    assert close(ours["y"], theirs["y"])


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    op=st.sampled_from(["MaxPool", "AveragePool", "LpPool"]),
    ceil=st.booleans(),
)
def test_windows_may_be_larger_than_what_they_look_at(
    size: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int], op: str, ceil: bool
) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 19]> g (float[2, 3, h, v] x) => (float[a, b, c, d] y) {{
        y = {op} <kernel_shape = {list(kernel)}, strides = {list(strides)}, ceil_mode = {int(ceil)}> (x) }}"""
    # what is more than a stride too large has no windows at all, of which the runtime makes a negative number
    assume(all(n - k > -2 * s for n, k, s in zip(size, kernel, strides, strict=True)))
    ours, theirs = run(text, {"x": np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)})
    assert close(ours["y"], theirs["y"])


def test_gradients_pass_a_window_that_is_too_large() -> None:
    text = """<ir_version: 9, opset_import: ["" : 19]> g (double[1, 2, 2, 4] x) => (double[a, b, c, d] y)
        { y = AveragePool <kernel_shape = [3, 2], strides = [3, 2]> (x) }"""
    interpreter = Interpreter(models.load(onnx.parser.parse_model(text)))
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: interpreter.run({"x": x})["y"], (x,))


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("parts", "options"),
    [(1, ""), (1, "onesided = 1"), (2, ""), (2, "inverse = 1"), (1, "inverse = 1")],
)
@pytest.mark.parametrize("length", ["", "n"])
def test_spectra(opset: int, parts: int, options: str, length: str) -> None:
    axis, given_axis = ("axis = 2", "") if opset < 20 else ("", ", axis")
    attributes = ", ".join(filter(None, (axis, options)))
    node = f"y = DFT <{attributes}> (x, {length}{given_axis})" if attributes else f"y = DFT (x, {length}{given_axis})"
    node = node.replace("(x, )", "(x)")
    text = f"""<ir_version: 9, opset_import: ["" : {opset}]> g (float[2, 3, 8, {parts}] x) => (float[a, b, c, d] y)
        <int64 n = {{8}}, int64 axis = {{2}}> {{ {node} }}"""
    ours, theirs = run(text, {"x": np.random.default_rng(0).standard_normal((2, 3, 8, parts)).astype(np.float32)})
    assert close(ours["y"], theirs["y"])


def test_gradients_pass_spectra() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (double[1, 8, 1] x) => (double[a, b, c] y)
        { s = DFT <onesided = 1> (x)  t = Mul (s, s)  z = DFT <inverse = 1> (t)  y = Mul (z, z) }"""
    interpreter = Interpreter(models.load(onnx.parser.parse_model(text)))
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 8, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: interpreter.run({"x": x})["y"], (x,))


def test_blocks_are_added_up_where_they_lie() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]> g (float[1, 8, 12] x) => (float[a, b, c, d] y)
        <int64[2] image = {5, 4}, int64[2] block = {2, 2}>
        { y = Col2Im <pads = [1, 0, 0, 1], strides = [2, 1], dilations = [1, 1]> (x, image, block) }"""
    found, expected = run(text, {"x": np.linspace(-2, 3, 96, dtype=np.float32).reshape(1, 8, 12)})
    assert close(found["y"], expected["y"])


@pytest.mark.parametrize(
    ("onesided", "inputs"), [(1, "x, step, window"), (1, "x, step, , size"), (0, "x, step, window")]
)
def test_spectra_of_windows(onesided: int, inputs: str) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 17]> g (float[2, 40, 1] x) => (float[a, b, c, d] y)
        <int64 step = {{4}}, float[8] window = {{0.1, 0.4, 0.8, 1, 1, 0.8, 0.4, 0.1}}, int64 size = {{8}}>
        {{ y = STFT <onesided = {onesided}> ({inputs}) }}"""
    x = np.random.default_rng(0).standard_normal((2, 40, 1)).astype(np.float32)
    found, expected = run(text, {"x": x})
    assert close(found["y"], expected["y"])


def test_bodies_use_the_values_around_them_and_functions_the_attributes_of_their_caller() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[3] x, bool c, int64 n) => (float[3] y, float[3] last, float[k, 3] all)
        <float[3] w = {1, 2, 3}, bool go = {1}>
        {
            scaled = own.Scaled <by = 0.5> (x)
            y = If (c) <
                then_branch = t () => (float[3] a) { a = Mul (scaled, w) },
                else_branch = e () => (float[3] b) { b = Sub (scaled, w) }
            >
            last, all = Loop (n, go, y) <
                body = b (int64 i, bool d, float[3] s) => (bool e, float[3] t, float[3] u)
                { e = Identity (d)  t = Add (s, scaled)  u = Mul (t, w) }
            >
        }
        <domain: "own", opset_import: ["" : 17]>
        Scaled <by> (a) => (b) { f = Constant <value_float: float = @by> ()  b = LeakyRelu <alpha: float = @by> (a) }
    """
    for condition in (True, False):
        feed = {"x": np.array([-1, 2, -3], np.float32), "c": np.array(condition), "n": np.array(3)}
        ours, theirs = run(text, feed)
        assert all(close(ours[name], theirs[name]) for name in theirs)


TEXT = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]> g (float[2, 3] x) => (float[2, 3] y)
    <float[3] w = {1, 2, 3}>
    { a = Mul (x, w)  b = ai.onnx.ml.Binarizer <threshold = 0.5> (a)  y = Mul (b, w) }"""


def test_what_torch_lacks_is_named() -> None:
    model = models.load(onnx.parser.parse_model(TEXT))
    with pytest.raises(ModelError, match=r'The node "b" \(Binarizer of ai.onnx.ml\) has no counterpart in torch'):
        Interpreter(model)


def test_the_runtime_computes_what_torch_lacks_and_what_follows_has_gradients() -> None:
    text = TEXT.replace("ai.onnx.ml.Binarizer <threshold = 0.5> (a)", "Unique (a)").replace(
        "y = Mul (b, w)", "c = Unsqueeze (b, z)  y = Mul (c, v)"
    )
    text = text.replace("<float[3] w = {1, 2, 3}>", "<float[3] w = {1, 2, 3}, float[1] v = {2}, int64[1] z = {1}>")
    model = models.load(onnx.parser.parse_model(text))
    interpreter = Interpreter(model, runtime.evaluate_node)
    parameters = {name: torch.tensor([1.0, 2, 3] if name == "w" else [2.0], requires_grad=True) for name in "wv"}
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    y = interpreter.run({"x": x}, parameters)["y"]
    y.sum().backward()
    assert y.detach().numpy().ravel().tolist() == (2 * np.unique(x * [1, 2, 3])).tolist()
    assert parameters["v"].grad is not None and parameters["w"].grad is None
    assert list(interpreter.outside) == ['"b" (Unique)']


def test_inputs_that_do_not_fit() -> None:
    model = models.load(onnx.parser.parse_model(TEXT.replace("ai.onnx.ml.Binarizer <threshold = 0.5> (a)", "Relu (a)")))
    with pytest.raises(DataError, match='The input "x" is missing'):
        Interpreter(model).run({})
    with pytest.raises(DataError, match=r'The node "a" \(Mul\) rejects its inputs in torch: '):
        Interpreter(model).run({"x": np.zeros((2, 4), np.float32)})
    with pytest.raises(ModelError, match='The input "x" has string elements'):
        Interpreter(model).run({"x": np.array(["a"], object)})


def test_integers_between_layers_hand_gradients_on() -> None:
    """Integers that are repeated and pooled with channels last, as quantize-static writes them for old opsets."""
    text = """<ir_version: 6, opset_import: ["" : 11, "com.microsoft" : 1]>
    g (float[2,4,5,6] x) => (float[2,4,6,6] y)
    <float[4] steps = {0.1, 0.2, 0.3, 0.4}, uint8[4] zeros = {9, 9, 9, 9}, float step = {0.1}, uint8 zero = {60},
     int64 begin = {0}, int64 one = {1}, int64 two = {2}> {
        q = QuantizeLinear(x, step, zero)  a = Transpose <perm = [0, 2, 3, 1]> (q)
        b = com.microsoft.NhwcMaxPool <kernel_shape = [2, 2], strides = [2, 2], auto_pad = "SAME_UPPER"> (a)
        s = Shape(b)  n = Gather <axis = 0> (s, two)  m = Mul(n, two)  r = Range(begin, m, one)  i = Div(r, two)
        c = Gather <axis = 2> (b, i)  s1 = Shape(c)  n1 = Gather <axis = 0> (s1, one)  m1 = Mul(n1, two)
        r1 = Range(begin, m1, one)  i1 = Div(r1, two)  d = Gather <axis = 1> (c, i1)
        e = Transpose <perm = [0, 3, 1, 2]> (d)  y = com.microsoft.DequantizeLinear <axis = 1> (e, steps, zeros)
    }"""
    ours, theirs = run(text, {"x": X})
    assert close(ours["y"], theirs["y"])
    given = torch.tensor(X, requires_grad=True)
    Interpreter(models.load(onnx.parser.parse_model(text))).run({"x": given})["y"].sum().backward()
    assert given.grad is not None
    # Each window hands four gradients to its largest element.
    torch.testing.assert_close(given.grad.sum((0, 2, 3)), 2 * 9 * 4 * torch.tensor([1.0, 2.0, 3.0, 4.0]))
