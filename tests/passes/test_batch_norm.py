import numpy as np
import onnx
import pytest
from onnx import numpy_helper

SPEC = "fuse-batch-norm"
CHANNELS = 3


def graph(body, *, inputs="float[n,3,4,4] x", outputs="float[a,b,c,d] y", opset=17, **constants):
    proto = onnx.parser.parse_model(f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({outputs})
    {{ {body} }}
    """)
    rng = np.random.default_rng(0)
    arrays = {n: rng.uniform(0.5, 2, CHANNELS) for n in ("scale", "bias", "mean", "var")}
    arrays |= {"k": rng.uniform(0.5, 2, (CHANNELS, 1, 1)), **constants}
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
    return proto


BN = "b = BatchNormalization(x, scale, bias, mean, var)"


@pytest.mark.parametrize("opset", [9, 14, 17])
@pytest.mark.parametrize(
    "operation", ["Mul(b, k)", "Mul(k, b)", "Div(b, k)", "Add(b, k)", "Add(k, b)", "Sub(b, k)", "Sub(k, b)"]
)
def test_an_operation_per_channel(rewritten, operation, opset):
    assert rewritten(graph(f"{BN} y = {operation}", opset=opset), SPEC).ops == {"BatchNormalization": 1}


def test_a_chain_goes_in_one_run(rewritten):
    body = f"{BN} c = Mul(b, k) d = Add(c, k) e = Div(d, s) y = Sub(e, one)"
    found = rewritten(graph(body, s=2.0, one=np.ones((1, CHANNELS, 1, 1))), SPEC)
    assert found.ops == {"BatchNormalization": 1}
    assert len([v for v in found.model.graph.initializers.values() if v.uses()]) == 4


def test_other_ranks(rewritten):
    body = f"{BN} y = Mul(b, v)"
    two = graph(body, inputs="float[n,3] x", outputs="float[a,b] y", v=np.arange(1, 4))
    assert rewritten(two, SPEC).ops == {"BatchNormalization": 1}
    three = graph(body, inputs="float[n,3,3] x", outputs="float[a,b,c] y", v=np.arange(1, 4))
    found = rewritten(three, SPEC)
    assert found.ops == {"BatchNormalization": 1, "Mul": 1}
    assert found.refusals == {"the other operand is not one number per channel"}


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        (f"{BN} y = Div(k, b)", {}),
        (f"{BN} c = Mul(b, k) y = Add(b, c)", {}),
        (f"{BN} y = Mul(b, b)", {}),
        (f"{BN} y = Div(b, zero)", {"zero": np.zeros((3, 1, 1))}),
        (f"{BN} y = Mul(b, map)", {"map": np.ones((1, 1, 4, 4))}),
        (f"{BN} y = Mul(b, row)", {"row": np.ones(4)}),
        (f"{BN} y = Mul(b, batch)", {"batch": np.ones((2, 3, 1, 1))}),
        (f"{BN} y = Mul(b, given)", {}),
    ],
    ids=["divides", "used twice", "squared", "by zero", "per pixel", "per column", "per image", "not constant"],
)
def test_other_operations_stay(rewritten, body, constants):
    proto = graph(body, inputs="float[1,3,4,4] x, float[3,1,1] given", **constants)
    assert not rewritten(proto, SPEC).edits


def test_a_norm_in_training_stays(rewritten):
    proto = graph("b, m, v = BatchNormalization <training_mode = 1> (x, scale, bias, mean, var) y = Mul(b, k)")
    found = rewritten(proto, SPEC)
    assert found.refusals == {"the normalization is in training mode"}


def test_parameters_that_would_overflow_stay(rewritten):
    found = rewritten(graph(f"{BN} c = Mul(b, huge) y = Mul(c, k)", huge=3e38), SPEC, verify=False)
    assert found.ops == {"BatchNormalization": 1, "Mul": 2}
    assert found.refusals == {"the fused parameters do not fit into the element type"}


def filled(channels):
    """Conv, BatchNormalization, Mul and Add whose parameters are all filled in, as in test models without weights."""
    return f"""
    <ir_version: 8, opset_import: ["" : 9]>
    g (float[1,{channels},4,4] x) => (float[a,b,c,d] y)
    <int64[4] shape = {{{channels}, {channels}, 3, 3}}, int64[1] size = {{{channels}}}>
    {{
        w = ConstantOfShape <value = float[1] {{0.01}}> (shape)
        v = ConstantOfShape <value = float[1] {{0.5}}> (size)
        u = Unsqueeze <axes = [1, 2]> (v)
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        n = BatchNormalization(c, v, v, v, v)
        m = Mul(n, u)
        y = Add(m, u)
    }}
    """


def test_filled_parameters_are_not_stored(rewritten):
    found = rewritten(filled(64), f"{SPEC},fuse-conv-bn,remove-dead-code")
    assert found.ops == {"ConstantOfShape": 1, "Conv": 1}
    assert sum(v.const_value.nbytes for v in found.model.graph.initializers.values()) < 512


def test_a_filled_weight_that_could_not_be_filled_in_any_more_stays(rewritten):
    proto = onnx.parser.parse_model(filled(64).replace("m = Mul(n, u)", "m = Mul(n, k)"))
    numbers = np.linspace(0.5, 1.5, 64, dtype=np.float32).reshape(64, 1, 1)
    proto.graph.initializer.append(numpy_helper.from_array(numbers, "k"))
    found = rewritten(proto, f"{SPEC},fuse-conv-bn,remove-dead-code")
    assert found.ops["BatchNormalization"] == 1
    assert "the weight is filled in with one number, and the fused weight would have to be stored" in found.refusals
