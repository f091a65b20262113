from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt
from onnxopt.graft import RefusedError
from onnxopt.graft.interface import Slot, adapters
from onnxopt.graft.layout import channel_axis
from onnxopt.runtime import open_session

F32, F16, I64 = (ir.TensorType(d) for d in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64))


def chain(have, want, kinds=(F32, F32)):
    found = adapters(Slot("a", kinds[0], have), Slot("b", kinds[1], want))
    return None if found is None else [str(a) for a in found]


@pytest.mark.parametrize(
    ("have", "want", "expected"),
    [
        (("n", 3, 8, 8), ("batch", 3, 8, 8), []),
        ((1, 3, 8, 8), ("batch", 3, "h", "w"), []),
        (("n", 64, 7, 7), ("n", 7, 7, 64), ["Transpose [0, 2, 3, 1]"]),
        (("n", 7, 7, 64), ("n", 64, 7, 7), ["Transpose [0, 3, 1, 2]"]),
        (("n", 3, "h", "w"), ("n", "h", "w", 3), ["Transpose [0, 2, 3, 1]"]),
        (("n", 49, 64), ("n", 64, 49), ["Transpose [0, 2, 1]"]),
        (("n", 64, 1, 1), ("n", 64), ["Reshape to [0, 64]"]),
        (("n", 64), ("n", 64, 1, 1), ["Reshape to [0, 64, 1, 1]"]),
        (("n", 64, 14, 14), ("n", 64, 7, 7), ["Resize to [7, 7]"]),
        (("n", 64, 7, 7), ("n", 32, 7, 7), ["fitted 1x1 Conv from 64 to 32 channels"]),
        (("n", 64, 14, 14), ("n", 32, 7, 7), ["Resize to [7, 7]", "fitted 1x1 Conv from 64 to 32 channels"]),
        (("n", 64), ("n", 32), ["fitted Gemm from 64 to 32 channels"]),
        (("n", "s", 64), ("n", "t", 32), ["fitted Gemm from 64 to 32 channels"]),
        ((2, 64), (3, 64), None),
        (("n", 64, 7), ("n", 64), None),
        (None, ("n", 64), []),
    ],
)
def test_the_fewest_adapters(have, want, expected):
    assert chain(have, want) == expected


def test_types():
    assert chain((2,), (2,), (F16, F32)) == ["Cast to float32"]
    assert chain((2,), (2,), (F32, I64)) is None
    assert chain((2, 3, 4, 4), (2, 4, 4, 3), (F32, F16)) == ["Cast to float16", "Transpose [0, 2, 3, 1]"]
    assert chain((2, 3), (2, 4), (I64, I64)) is None


SIZES = st.lists(st.sampled_from([1, 2, 3, 5, "n", "m", None]), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES)
def test_what_comes_out_has_the_wanted_shape(have, want):
    """Followed symbolically, the adapters lead from the one shape to the other."""
    found = adapters(Slot("a", F32, tuple(have)), Slot("b", F32, tuple(want)))
    if found is None:
        return
    dims = list(have)
    for adapter in found:
        if adapter.kind == "Transpose":
            dims = [dims[i] for i in adapter.perm]
        elif adapter.kind == "Reshape":
            dims = [dims[0], *adapter.shape[1:]]
        elif adapter.kind == "Resize":
            dims = [*dims[:2], *adapter.shape]
        elif adapter.kind == "Conv":
            dims[1] = adapter.channels[1]
        elif adapter.kind == "Gemm":
            dims[-1] = adapter.channels[1]
    assert len(dims) == len(want)
    assert all(a == b for a, b in zip(dims, want, strict=True) if isinstance(a, int) and isinstance(b, int))


def parsed(text, **weights):
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnxopt.load(proto)


def run(model, **feed):
    with open_session(model, optimized=False) as session:
        return session.run(feed)


RNG = np.random.default_rng(0)
KERNEL = (RNG.standard_normal((4, 4, 1, 1)) / 2).astype(np.float32)
NCHW = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y) { a = Relu(x)  b = Conv(a, k)  y = Neg(b) }
"""


def test_half_precision_into_single():
    host = parsed(NCHW, k=KERNEL)
    donor = parsed(NCHW.replace("float[", "float16["), k=KERNEL.astype(np.float16))
    with pytest.raises(RefusedError, match=r"Cast to float16 between .a. \(float32 \[n, 4, 6, 6\]\)") as refused:
        onnxopt.graft(host, donor, replace="a->b", with_="a->b")
    assert refused.value.reason == "adapter"
    asked = []
    done = onnxopt.graft(host, donor, replace="a->b", with_="a->b", adapters=lambda texts: not asked.extend(texts))
    assert len(asked) == 2
    assert [n.op_type for n in done.model.graph] == ["Relu", "Cast", "Conv", "Cast", "Neg"]
    assert [m.adapters for m in done.certificate.inputs] == [("Cast to float16",)]
    x = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(done.model, x=x)["y"], run(host, x=x)["y"], atol=5e-3)


def test_layouts_that_shapes_do_not_tell_apart_are_told_by_operators():
    """Channels, height and width are equally many: only the Transposes say that the donor has channels last."""
    host = parsed(NCHW.replace("6, 6", "4, 4"), k=KERNEL)
    donor = parsed(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, 4, 4] p) => (float[n, 4, 4, 4] q) {
            r = Abs(p)  first = Transpose<perm = [0, 3, 1, 2]>(r)  c = Conv(first, k)
            last = Transpose<perm = [0, 2, 3, 1]>(c)  q = Neg(last)
        }
        """,
        k=KERNEL,
    )
    done = onnxopt.graft(host, donor, replace="a->b", with_="r->last", adapters="allow")
    assert [m.adapters for m in done.certificate.inputs] == [("Transpose [0, 2, 3, 1]",)]
    assert [m.adapters for m in done.certificate.outputs] == [("Transpose [0, 3, 1, 2]",)]
    x = RNG.standard_normal((2, 4, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(run(done.model, x=x)["y"], run(host, x=x)["y"], atol=1e-5)
    with pytest.raises(RefusedError, match="Transpose"):
        onnxopt.graft(host, donor, replace="a->b", with_="r->last")


def values(text, **arrays):
    model = parsed(text, **arrays)
    return {v.name: v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))}


def test_the_axis_of_channels():
    found = values(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, 4, 4] x, float[n, 4, 4, 4] p) => (float[n, 4, 4, 4] y, float[n, 4, 4, 4] z) {
            a = Relu(x)  b = Conv(a, k)  s = Sigmoid(b)  m = Mul(b, s)  t = Transpose<perm = [0, 2, 3, 1]>(m)
            y = LayerNormalization<axis = -1>(t, w)  z = Softmax(p)
        }
        """,
        k=KERNEL,
        w=np.ones(4, np.float32),
    )
    assert [channel_axis(found[name], 4) for name in "xbmtyp"] == [1, 1, 1, 3, 3, None]
    disputed = values(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, 4, 4] x) => (float[n, 4, 4, 4] y, float[n, 4, 4, 4] z) {
            y = Conv(x, k)  z = LayerNormalization(x, w)
        }
        """,
        k=KERNEL,
        w=np.ones(4, np.float32),
    )
    assert channel_axis(disputed["x"], 4) is None


def test_an_output_of_the_model_keeps_its_type_where_an_adapter_can():
    host = parsed(NCHW, k=KERNEL)
    donor = parsed(NCHW.replace("float[", "float16["), k=KERNEL.astype(np.float16))
    with pytest.raises(RefusedError) as refused:
        onnxopt.graft(host, donor, replace="a->y", with_="a->y")
    assert refused.value.reason == "adapter"
    done = onnxopt.graft(host, donor, replace="a->y", with_="a->y", adapters="allow")
    (output,) = done.model.graph.outputs
    assert (output.name, output.dtype, [str(d) for d in output.shape]) == ("y", ir.DataType.FLOAT, ["n", "4", "6", "6"])
    x = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(done.model, x=x)["y"], run(host, x=x)["y"], atol=5e-3)


def test_channels_last_into_channels_first():
    host = parsed(NCHW, k=KERNEL)
    donor = parsed(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 6, 6, 4] p) => (float[n, 6, 6, 4] q) { t = MatMul(p, w)  q = Tanh(t) }
        """,
        w=KERNEL[:, :, 0, 0].T.copy(),
    )
    done = onnxopt.graft(host, donor, replace="a->b", with_="p->t", adapters="allow")
    assert [n.op_type for n in done.model.graph] == ["Relu", "Transpose", "MatMul", "Transpose", "Neg"]
    x = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(done.model, x=x)["y"], run(host, x=x)["y"], atol=1e-5)


def test_another_size_and_rank():
    host = parsed(NCHW.replace("y = Neg(b)", "y = Abs(b)"), k=KERNEL)
    donor = parsed("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, 3, 3] p) => (float[n, 4, 3, 3] q) { t = Relu(p)  q = Tanh(t) }
    """)
    done = onnxopt.graft(host, donor, replace="a->b", with_="p->q", adapters="allow")
    assert run(done.model, x=np.ones((2, 4, 6, 6), np.float32))["y"].shape == (2, 4, 6, 6)
    flat = parsed("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 144] p) => (float[n, 144] q) { q = Tanh(p) }
    """)
    done = onnxopt.graft(host, flat, replace="a->b", with_="p->q", adapters="allow")
    x = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(done.model, x=x)["y"], np.tanh(np.maximum(x, 0)), rtol=1e-5)


def test_no_adapter_leads_from_integers_to_numbers():
    host = parsed(NCHW, k=KERNEL)
    donor = parsed(
        '<ir_version: 8, opset_import: ["" : 17]> g (int64[n, 4, 6, 6] p) => (int64[n, 4, 6, 6] q) { q = Abs(p) }'
    )
    with pytest.raises(RefusedError, match="does not fit in the place of") as refused:
        onnxopt.graft(host, donor, replace="a->b", with_="p->q", adapters="allow")
    assert refused.value.reason == "shape"


def test_linear_adapters_are_fitted_to_the_activations_of_both_sides(tmp_path):
    """Donor and host are linear, so the fit must be exact."""
    mix, unmix = (RNG.standard_normal(s).astype(np.float32) for s in ((8, 6), (6, 8)))
    stem, head = (RNG.standard_normal(s).astype(np.float32) for s in ((5, 8), (8, 3)))
    host = parsed(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 5] x) => (float[n, 3] y) { a = MatMul(x, stem)  b = MatMul(a, middle)  y = MatMul(b, head) }
        """,
        stem=stem,
        middle=mix @ unmix,
        head=head,
    )
    donor = parsed(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 5] x) => (float[n, 6] z) { a = MatMul(x, stem)  c = MatMul(a, mix)  d = Neg(c)  z = Abs(d) }
        """,
        stem=stem,
        mix=mix,
    )
    np.savez(tmp_path / "data.npz", x=RNG.standard_normal((40, 5)).astype(np.float32))
    done = onnxopt.graft(host, donor, replace="a->b", with_="c->d", adapters="allow", data=str(tmp_path / "data.npz"))
    assert [f.adapter for f in done.certificate.fitted] == [
        "fitted Gemm from 8 to 6 channels",
        "fitted Gemm from 6 to 8 channels",
    ]
    assert all(f.explained > 0.999 and f.held_out == 10 for f in done.certificate.fitted)
    x = RNG.standard_normal((4, 5)).astype(np.float32)
    np.testing.assert_allclose(run(done.model, x=x)["y"], run(host, x=x)["y"], rtol=1e-2, atol=1e-1)


def test_convolutions_are_fitted_too(tmp_path):
    host = parsed(NCHW, k=KERNEL)
    narrow = (RNG.standard_normal((2, 4, 1, 1)) / 2).astype(np.float32)
    donor = parsed(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, 6, 6] x) => (float[n, 2, 6, 6] z) { a = Relu(x)  c = Conv(a, k)  d = Abs(c)  z = Neg(d) }
        """,
        k=narrow,
    )
    np.savez(tmp_path / "data.npz", x=RNG.standard_normal((8, 4, 6, 6)).astype(np.float32))
    done = onnxopt.graft(host, donor, replace="a->b", with_="c->d", adapters="allow", data=str(tmp_path / "data.npz"))
    assert [n.op_type for n in done.model.graph] == ["Relu", "Conv", "Abs", "Conv", "Neg"]
    assert done.certificate.fitted[0].explained > 0.999
    assert 0 < done.certificate.fitted[1].explained < 1
    fitted = next(n for n in done.model.graph if n.op_type == "Conv")
    np.testing.assert_allclose(fitted.inputs[1].const_value.numpy(), narrow, atol=1e-3)


def test_data_that_the_donor_does_not_take_is_told(tmp_path):
    host = parsed(NCHW, k=KERNEL)
    donor = parsed(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 2, 6, 6] p, float[n] q) => (float[n, 2, 6, 6] z) { r = Abs(p)  t = ReduceSum(q)  z = Add(r, t) }
        """
    )
    np.savez(tmp_path / "data.npz", x=RNG.standard_normal((8, 4, 6, 6)).astype(np.float32))
    with pytest.raises(RefusedError, match="does not take the host's") as refused:
        onnxopt.graft(host, donor, replace="a->b", with_="p->r", adapters="allow", data=str(tmp_path / "data.npz"))
    assert refused.value.reason == "data"
