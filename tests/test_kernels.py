"""The numpy kernels against ONNX Runtime, and what they leave to it."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.numeric import kernels
from onnxopt.runtime import evaluate_node

RNG = np.random.default_rng(0)
I = np.int64  # noqa: E741 - short on purpose, it stands in every line
F = np.float32


def ints(*values):
    return np.array(values, I)


X = RNG.standard_normal((2, 3, 4)).astype(F)
N = RNG.integers(-7, 8, (2, 3, 4))
D = np.array([[-3, -2, 2, 3]] * 3, I)
B = RNG.integers(0, 2, (2, 3, 4)).astype(bool)
TO = {
    np.dtype(t): int(ir.DataType.from_numpy(np.dtype(t)))
    for t in (np.float16, F, np.float64, np.int8, np.int32, I, bool)
}

# Operator, inputs, attributes, opset, number of outputs.
CASES = [
    ("Gather", [X, ints(0, -1)], {"axis": 1}, 17, 1),
    ("Gather", [X, np.array(-2)], {"axis": -1}, 17, 1),
    ("Gather", [X, np.array([[0, 1], [1, 0]], np.int32)], {}, 17, 1),
    ("GatherElements", [X, np.array([[[0, 3, -1, 2]] * 3] * 2)], {"axis": 2}, 17, 1),
    ("GatherElements", [X[0], np.array([[0, 1, 2, 0]])], {"axis": 0}, 17, 1),
    ("Concat", [X, X[:, :1]], {"axis": 1}, 17, 1),
    ("Concat", [N, N], {"axis": -1}, 17, 1),
    ("Slice", [X, ints(1), ints(2**63 - 1), ints(-1)], {}, 17, 1),
    ("Slice", [X, ints(-1, 5), ints(-(2**63), -9), ints(2, 1), ints(-1, -2)], {}, 17, 1),
    ("Slice", [X, ints(-100), ints(100), ints(2), ints(2)], {}, 17, 1),
    ("Slice", [X, ints(3), ints(1), ints(2)], {}, 17, 1),
    ("Slice", [X], {"starts": [1, -3], "ends": [9, 1000], "axes": [1, 2]}, 9, 1),
    ("Split", [X], {"axis": 2}, 17, 2),
    ("Split", [X, ints(1, 3)], {"axis": -1}, 17, 2),
    ("Split", [X], {"axis": 1, "num_outputs": 2}, 18, 2),
    ("Split", [X], {"axis": 2, "split": [1, 3]}, 11, 2),
    ("Squeeze", [X[:1, :, :1]], {}, 17, 1),
    ("Squeeze", [X[:1, :, :1], ints(-1)], {}, 17, 1),
    ("Squeeze", [X[:1]], {"axes": [0]}, 11, 1),
    ("Unsqueeze", [X, ints(0, -1)], {}, 17, 1),
    ("Unsqueeze", [X], {"axes": [1, 4]}, 11, 1),
    ("Reshape", [X, ints(0, -1)], {}, 17, 1),
    ("Reshape", [X[:0], ints(3, 0, 4)], {"allowzero": 1}, 17, 1),
    ("Flatten", [X], {}, 17, 1),
    ("Flatten", [X], {"axis": 0}, 17, 1),
    ("Flatten", [X], {"axis": -1}, 17, 1),
    ("Transpose", [X], {"perm": [2, 0, 1]}, 17, 1),
    ("Transpose", [X], {}, 17, 1),
    ("Transpose", [np.array(3.0, F)], {}, 17, 1),
    ("Expand", [X[:, :1], ints(3, 1)], {}, 17, 1),
    ("Expand", [X[0, 0], ints(2, 2, 1)], {}, 17, 1),
    ("Tile", [X, ints(1, 2, 3)], {}, 17, 1),
    ("Where", [B[0, :, :1], X, X[0, 0]], {}, 17, 1),
    ("ConstantOfShape", [ints(2, 3)], {}, 17, 1),
    ("ConstantOfShape", [np.zeros(0, I)], {"value": ints(7)}, 17, 1),
    ("Range", [np.array(5), np.array(-4), np.array(-2)], {}, 17, 1),
    ("Range", [np.array(5), np.array(2), np.array(1)], {}, 17, 1),
    *(("Cast", [np.array([-2.7, -0.5, 0.0, 2.5])], {"to": to}, 17, 1) for to in TO.values()),
    *(("Cast", [N], {"to": to}, 17, 1) for to in TO.values()),
    ("Cast", [B], {"to": TO[np.dtype(F)]}, 17, 1),
    ("CastLike", [X, ints(1)], {}, 17, 1),
    ("Add", [X, X[0, :, :1]], {}, 17, 1),
    ("Sub", [N, D], {}, 17, 1),
    ("Mul", [X.astype(np.float64), X[0].astype(np.float64)], {}, 17, 1),
    ("Div", [N, D], {}, 17, 1),
    ("Div", [N.astype(np.int32), D.astype(np.int32)], {}, 17, 1),
    ("Div", [X, X[::-1]], {}, 17, 1),
    ("Div", [X, np.zeros_like(X)], {}, 17, 1),
    ("Mod", [N, D], {}, 17, 1),
    ("Mod", [N, D], {"fmod": 1}, 17, 1),
    ("Mod", [X, X[::-1]], {"fmod": 1}, 17, 1),
    ("Equal", [N, D], {}, 17, 1),
    ("Equal", [B, B[::-1]], {}, 17, 1),
    ("Greater", [N, D], {}, 17, 1),
    ("GreaterOrEqual", [N, D], {}, 17, 1),
    ("Less", [X, X[0]], {}, 17, 1),
    ("LessOrEqual", [N, D], {}, 17, 1),
    ("And", [B, B[::-1]], {}, 17, 1),
    ("Or", [B, B[::-1]], {}, 17, 1),
    ("Xor", [B, B[::-1]], {}, 17, 1),
    ("Not", [B], {}, 17, 1),
    ("Neg", [N], {}, 17, 1),
    ("Abs", [X], {}, 17, 1),
    ("Sqrt", [np.abs(X)], {}, 17, 1),
    ("Reciprocal", [X], {}, 17, 1),
    ("Floor", [X], {}, 17, 1),
    ("Ceil", [X], {}, 17, 1),
    ("Max", [N, D, ints(1)], {}, 17, 1),
    ("Min", [N], {}, 17, 1),
    ("ReduceSum", [N, ints(0, -1)], {"keepdims": 0}, 17, 1),
    ("ReduceSum", [N, np.zeros(0, I)], {"noop_with_empty_axes": 1}, 17, 1),
    ("ReduceProd", [N.astype(np.int32)], {"axes": [1]}, 17, 1),
    ("ReduceMax", [N, ints(1)], {}, 18, 1),
    ("ReduceMin", [N], {}, 17, 1),
]  # fmt: skip


def call(inputs, attributes, outputs=1, opset=17, max_bytes=1 << 20):
    return kernels.Call(inputs, attributes, outputs, opset, max_bytes)


def in_runtime(op_type, inputs, attributes, opset, outputs):
    tensors = {name: ir.tensor(v) if isinstance(v, np.ndarray) else v for name, v in attributes.items()}
    values = [ir.Value(name=f"i{i}", type=ir.TensorType(ir.DataType.from_numpy(a.dtype))) for i, a in enumerate(inputs)]
    node = ir.node(op_type, values, tensors, num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name = f"o{index}"
    return evaluate_node(node, inputs, opset)


def test_every_kernel_is_compared():
    assert {case[0] for case in CASES} == kernels.OPERATORS


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "opset", "outputs"),
    CASES,
    ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)],
)
def test_kernels_compute_what_the_runtime_computes(op_type, inputs, attributes, opset, outputs):
    wanted = in_runtime(op_type, inputs, attributes, opset, outputs)
    assert wanted is not None, "the case itself must be valid"
    found = kernels.compute(op_type, call(inputs, attributes, outputs, opset))
    assert found is not None
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # Bits, so that the sign of zero counts.
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "opset"),
    [
        ("Exp", [X], {}, 17),
        ("Gather", [X, ints(2)], {}, 17),
        ("Concat", [X, N], {"axis": 0}, 17),
        ("Slice", [X, ints(0), ints(1), ints(0), ints(0)], {}, 17),
        ("Split", [X], {"axis": 1}, 17),
        ("Squeeze", [X, np.zeros(0, I)], {}, 17),
        ("Reshape", [X, ints(5, -1)], {}, 17),
        ("Range", [np.array(0), np.array(3), np.array(0)], {}, 17),
        ("Range", [np.array(0.0, F), np.array(3.0, F), np.array(0.5, F)], {}, 17),
        ("Div", [N, np.zeros(1, I)], {}, 17),
        ("Div", [ints(-(2**63)), ints(-1)], {}, 17),
        ("Mod", [N, np.zeros(1, I)], {}, 17),
        ("Mod", [X, X], {}, 17),
        ("Add", [X, N], {}, 17),
        ("Add", [X, X], {}, 6),
        ("Add", [X, X[:, :2]], {}, 17),
        ("Max", [X, X], {}, 17),
        ("ReduceSum", [X], {}, 17),
        ("ReduceMax", [N[:0]], {}, 17),
        ("Cast", [np.array([np.inf], F)], {"to": TO[np.dtype(I)]}, 17),
        ("Cast", [np.array([2.0**63])], {"to": TO[np.dtype(I)]}, 17),
        ("Cast", [np.array([-129.0])], {"to": TO[np.dtype(np.int8)]}, 17),
        ("Cast", [X], {"to": onnx.TensorProto.STRING}, 17),
        ("Cast", [X], {"to": "FLOAT"}, 5),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_left_to_the_runtime(op_type, inputs, attributes, opset):
    assert kernels.compute(op_type, call(inputs, attributes, 2 if op_type == "Split" else 1, opset)) is None


@pytest.mark.parametrize(
    ("op_type", "inputs"),
    [
        ("ConstantOfShape", [ints(2**40, 2**40)]),
        ("Expand", [X[:1, :1, :1], ints(2**30, 2**30, 1)]),
        ("Tile", [X, ints(2**40, 1, 1)]),
        ("Range", [np.array(0), np.array(2**50), np.array(1)]),
        ("Gather", [X, np.zeros((2000, 2000), I)]),
        ("Add", [np.zeros((4000, 1), F), np.zeros((1, 4000), F)]),
        ("Where", [np.zeros((4000, 1), bool), np.zeros(4000, F), np.zeros(4000, F)]),
        ("Transpose", [np.zeros((1 << 20), F)]),
    ],
)
def test_large_results_are_not_computed(op_type, inputs):
    with pytest.raises(kernels.TooLargeError):
        kernels.compute(op_type, call(inputs, {}))


def test_views_are_free_however_large_they_are():
    big = np.zeros(1 << 20, F)
    (found,) = kernels.compute("Reshape", call([big, ints(2, -1)], {}))
    assert np.shares_memory(found, big)
