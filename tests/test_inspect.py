import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.analysis.flops import IMAGE_SIDE, LENGTH, count
from onnxopt.analysis.inspect import ConstantFacts, FunctionFacts, TypeFacts, ValueFacts, inspect, summary_stats
from onnxopt.analysis.size import model_size
from onnxopt.model import load, model_bytes


def declare(text, **arrays):
    """Build a model from ONNX text and give it initializers of this content."""
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


HEAD = '<ir_version: 10, opset_import: ["" : 17]>'

EVERYTHING = """
    <
        ir_version: 10,
        opset_import: ["" : 17, "local" : 1, "com.microsoft" : 1, "ai.onnx.ml" : 3],
        producer_name: "maker", producer_version: "2.1",
        metadata_props: ["license" : "MIT", "author" : "someone"]
    >
    agraph (float[batch,4,H] x, float[batch,T] z, float[3] w0, bool c) => (float[batch,4,H] y, float[batch,?] u) {
        k = Constant<value = float[3] {1, 2, 3}>()
        s = Constant<value = int64[2] {0, 1}>()
        a = local.twice(x)
        b = local.twice(a)
        d = com.microsoft.QuickGelu(b)
        e = ai.onnx.ml.Scaler(z)
        y = If (c) <
            then_branch = t () => (float[batch,4,H] p) { p = Abs(d) },
            else_branch = f () => (float[batch,4,H] q) { v = Neg(d) q = Celebrate(v) }
        >
        u = Mul(e, e)
    }
    <domain: "local", opset_import: ["" : 17]>
    twice (i) => (o) { o = Add(i, i) }
"""


def everything():
    arrays = {"w0": zeros(3), "big": zeros(10, 20), "half": zeros(7, dtype=np.float16)}
    return declare(EVERYTHING, **arrays)


def test_facts():
    facts = inspect(everything())
    assert (facts.name, facts.ir_version, facts.producer) == ("agraph", 10, "maker 2.1")
    assert facts.opsets == (("ai.onnx", 17), ("ai.onnx.ml", 3), ("com.microsoft", 1), ("local", 1))
    assert facts.metadata == (("author", "someone"), ("license", "MIT"))
    assert facts.inputs == (
        ValueFacts("x", "float32", ("batch", 4, "H")),
        ValueFacts("z", "float32", ("batch", "T")),
        ValueFacts("c", "bool", ()),
    )
    assert facts.outputs[1] == ValueFacts("u", "float32", ("batch", "?"))
    assert facts.overridable == ("w0",)
    assert facts.dynamic_axes == (
        ("batch", ("x:0", "z:0", "y:0", "u:0")),
        ("H", ("x:2", "y:2")),
        ("T", ("z:1",)),
        ("?", ("u:1",)),
    )
    assert facts.nested_graphs == 2
    assert facts.functions == (FunctionFacts("local::twice", 1, 2),)


def test_operators():
    facts = inspect(everything())
    assert facts.ops[:2] == (("Constant", 2), ("local.twice", 2))
    assert dict(facts.ops)["com.microsoft.QuickGelu"] == 1
    assert dict(facts.ops)["Add"] == 1
    assert dict(facts.ops)["Abs"] == 1
    assert facts.custom_ops == (("com.microsoft.QuickGelu", 1),)
    assert facts.unknown_ops == (("Celebrate", 1),)
    assert sum(times for _, times in facts.ops) == facts.stats.nodes == 12


def test_an_operator_of_a_later_opset_is_unknown():
    text = '<ir_version: 10, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Gelu(x) }'
    assert inspect(declare(text)).unknown_ops == (("Gelu", 1),)
    assert inspect(declare(text.replace("17", "20"))).unknown_ops == ()


def test_an_operator_that_the_opset_has_dropped_is_unknown():
    text = f"{HEAD} g (float[1,1,2,2] x, float[4] s) => (float[1,1,4,4] y) {{ y = Upsample(x, s) }}"
    assert inspect(declare(text)).unknown_ops == (("Upsample", 1),)


def test_constants():
    facts = inspect(everything())
    assert facts.constants == (
        TypeFacts("float32", 3, 206, 824),
        TypeFacts("int64", 1, 2, 16),
        TypeFacts("float16", 1, 7, 14),
    )
    assert facts.largest[0] == ConstantFacts("big", "", "float32", (10, 20), 800)
    assert [(c.name, c.bytes) for c in facts.largest] == [
        ("big", 800),
        ("s", 16),
        ("half", 14),
        ("w0", 12),
        ("k", 12),
    ]
    assert facts.stats.parameters == 213
    assert facts.stats.initializer_bytes == 800 + 12 + 14


def test_only_the_largest_constants_are_named():
    model = declare(f"{HEAD} g (float[2] x) => (float[2] y) {{ y = Abs(x) }}", **{f"w{i}": zeros(i) for i in range(15)})
    facts = inspect(model)
    assert [c.bytes for c in facts.largest] == [4 * i for i in range(14, 4, -1)]


def test_facts_can_be_written_as_json():
    import dataclasses

    text = json.dumps(dataclasses.asdict(inspect(everything())), allow_nan=False)
    assert json.loads(text)["stats"]["nodes"] == 12


def test_a_weight_of_two_nodes_counts_once():
    text = f"{HEAD} g (float[2,8] x) => (float[2,8] y) {{ h = MatMul(x, w) y = MatMul(h, w) }}"
    assert summary_stats(declare(text, w=zeros(8, 8))).parameters == 64


def test_external_data_is_counted_and_shared_regions_once(tmp_path):
    text = f"{HEAD} g (float[2,8] x) => (float[2,8] y) {{ h = MatMul(x, w) y = MatMul(h, v) }}"
    ir.save(
        declare(text, w=zeros(8, 8), v=zeros(8, 8)),
        tmp_path / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=0,
    )
    model = ir.load(tmp_path / "m.onnx")
    facts = inspect(model)
    assert facts.external_files == (("m.data", 512),)
    assert facts.stats.parameters == 128
    first = model.graph.initializers["w"].const_value
    second = ir.ExternalTensor(
        first.location, first.offset, first.length, first.dtype, shape=first.shape, name="v", base_dir=tmp_path
    )
    model.graph.initializers["v"].const_value = second
    assert summary_stats(model).parameters == 64
    on_disk = (tmp_path / "m.onnx").stat().st_size + (tmp_path / "m.data").stat().st_size
    assert abs(facts.stats.bytes - on_disk) < 64


def test_types_of_inputs():
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["a"], ["y"])],
            "g",
            [
                onnx.helper.make_tensor_sequence_value_info("a", onnx.TensorProto.INT64, None),
                onnx.helper.make_value_info(
                    "b",
                    onnx.helper.make_optional_type_proto(
                        onnx.helper.make_tensor_type_proto(onnx.TensorProto.DOUBLE, [2])
                    ),
                ),
                onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT8E4M3FN, None),
            ],
            [onnx.helper.make_tensor_sequence_value_info("y", onnx.TensorProto.INT64, None)],
        )
    )
    facts = inspect(ir.from_proto(proto))
    assert [v.type for v in facts.inputs] == ["sequence of int64", "optional float64", "float8e4m3fn"]
    assert facts.inputs[2].shape is None


# Size -----------------------------------------------------------------------------------------------------


def sizable():
    yield everything()
    yield declare(f"{HEAD} g (float[N,'a b'] x) => (float[N,M] y) {{ y = Abs(x) }}".replace("'a b'", "ab"))
    values = ",".join(["1.5"] * 200)
    yield declare(f"""{HEAD} g (float[2] x) => (float[2] y) {{
        k = Constant<value_floats = [1.0, 2.0]>()
        l = Constant<value_ints = [1, -1, 300]>()
        m = Constant<value_string = "text">()
        n = Constant<value_strings = ["a", "bc"]>()
        o = Constant<value = float[200] {{{values}}}>()
        y = Abs(x) }}""")
    ints = declare(
        f"{HEAD} g (float[2] x) => (float[2] y) {{ y = Abs(x) }}", w=zeros(300, 300), i=zeros(4, dtype=np.int64)
    )
    ints.graph.initializers["w"].doc_string = "the weight"
    ints.graph.metadata_props["key"] = "value"
    ints.graph.node(0).metadata_props["source"] = "line 3"
    ints.graph.node(0).doc_string = "x" * 200
    ints.doc_string, ints.model_version = "a model", 700
    yield ints


@pytest.mark.parametrize("model", list(sizable()))
def test_bytes_are_those_of_the_file(model):
    assert model_size(model).bytes == model_bytes(model)


@pytest.mark.parametrize("change", ["", "listed", "old"])
def test_bytes_are_those_of_a_file_whose_constants_are_declared(change, tmp_path):
    """In value_info, as some exporters do, or among the inputs, as the format once asked for."""
    proto = ir.to_proto(declare(f"{HEAD} g (float[2, 2] x) => (float[2, 2] y) {{ y = MatMul(x, w) }}", w=zeros(2, 2)))
    del proto.graph.value_info[:]
    info = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2, 2])
    if change == "listed":
        proto.graph.value_info.append(info)
        proto.graph.value_info.append(proto.graph.input[0])
    if change == "old":
        proto.ir_version = 3
        proto.graph.input.append(info)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    assert model_size(load(tmp_path / "model.onnx")).bytes == (tmp_path / "model.onnx").stat().st_size


# Cost -----------------------------------------------------------------------------------------------------

COSTS = {
    # 16 channels of 6 x 6, each from 8 x 3 x 3
    "Conv": ("float[2,8,8,8] x", "y = Conv(x, w)", {"w": zeros(16, 8, 3, 3)}, 2 * 16 * 36 * 72),
    "Conv with groups": (
        "float[2,8,8,8] x",
        "y = Conv<group = 8>(x, w)",
        {"w": zeros(16, 1, 3, 3)},
        2 * 16 * 36 * 9,
    ),
    "Conv with strides": (
        "float[2,8,8,8] x",
        "y = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w)",
        {"w": zeros(16, 8, 3, 3)},
        2 * 16 * 16 * 72,
    ),
    "ConvTranspose": ("float[2,8,5,5] x", "y = ConvTranspose(x, w)", {"w": zeros(8, 4, 3, 3)}, 2 * 8 * 25 * 36),
    "MatMul": ("float[5,64] x", "y = MatMul(x, w)", {"w": zeros(64, 48)}, 5 * 64 * 48),
    "stacked MatMul": ("float[3,5,64] x", "y = MatMul(x, w)", {"w": zeros(64, 48)}, 3 * 5 * 64 * 48),
    "Gemm": ("float[5,64] x", "y = Gemm(x, w)", {"w": zeros(64, 48)}, 5 * 64 * 48),
    "Gemm transposed": (
        "float[64,5] x",
        "y = Gemm<transA = 1, transB = 1>(x, w)",
        {"w": zeros(48, 64)},
        5 * 64 * 48,
    ),
    "LSTM": (
        "float[7,2,10] x",
        "y = LSTM<hidden_size = 16>(x, w, r)",
        {"w": zeros(1, 64, 10), "r": zeros(1, 64, 16)},
        7 * 2 * 64 * 26,
    ),
    "GRU in two directions": (
        "float[7,2,10] x",
        'y = GRU<hidden_size = 16, direction = "bidirectional">(x, w, r)',
        {"w": zeros(2, 48, 10), "r": zeros(2, 48, 16)},
        2 * 7 * 2 * 48 * 26,
    ),
    "Einsum": (
        "float[2,5,7] x",
        'y = Einsum<equation = "bij, jk -> bik">(x, w)',
        {"w": zeros(7, 9)},
        2 * 5 * 7 * 9,
    ),
    "Attention": (
        "float[2,6,32] x",
        "y = Attention<q_num_heads = 4, kv_num_heads = 4>(x, w, w)",
        {"w": zeros(2, 9, 32)},
        2 * 2 * 6 * 9 * 32,
    ),
    "com.microsoft.FusedMatMul": (
        "float[64,5] x",
        "y = com.microsoft.FusedMatMul<transA = 1>(x, w)",
        {"w": zeros(64, 48)},
        5 * 64 * 48,
    ),
    "com.microsoft.MultiHeadAttention": (
        "float[2,6,32] x",
        "y = com.microsoft.MultiHeadAttention<num_heads = 4>(x, w, w)",
        {"w": zeros(2, 9, 32)},
        2 * 2 * 6 * 9 * 32,
    ),
    "com.microsoft.MatMulNBits": (
        "float[5,64] x",
        "y = com.microsoft.MatMulNBits<K = 64, N = 48, bits = 4, block_size = 32>(x, w, s)",
        {"w": zeros(48, 2, 16, dtype=np.uint8), "s": zeros(96)},
        5 * 64 * 48,
    ),
}


@pytest.mark.parametrize("case", COSTS)
def test_multiply_accumulates(case):
    x, body, arrays, expected = COSTS[case]
    head = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    found = count(declare(f"{head} g ({x}) => (float y) {{ {body} }}", **arrays))
    assert (found.macs, found.not_counted) == (expected, ())
    assert found.total == 2 * expected
    assert len(found.by_op) == 1


def test_other_arithmetic_counts_once_an_element():
    found = count(
        declare(
            f"""{HEAD} g (float[2,8,8,8] x) => (float[2,8] y) {{
            a = Relu(x) b = Add(a, x) c = Transpose(b) d = Transpose(c)
            e = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)
            f = ReduceSum<keepdims = 0>(e, axes) y = Softmax(f) }}""",
            axes=np.array([2, 3]),
        )
    )
    assert found.elementwise == 2 * 1024 + 2 * 8 * 16 * 4 + 2 * 8 * 16 + 16
    assert (found.macs, found.not_counted, found.assumed) == (0, (), ())


def test_maxima_of_integers_count_as_others_do():
    head = '<ir_version: 6, opset_import: ["" : 11, "com.microsoft" : 1]>'
    pool = "com.microsoft.NhwcMaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)"
    found = count(declare(f"{head} g (uint8[2,8,8,3] x) => (uint8[2,4,4,3] y) {{ y = {pool} }}"))
    assert (found.elementwise, found.not_counted) == (2 * 4 * 4 * 3 * 4, ())


def test_sizes_of_dynamic_axes_are_given_or_assumed():
    text = f"{HEAD} g (float[batch,seq,8] x) => (float[batch,seq,4] y) {{ y = MatMul(x, w) }}"
    model = declare(text, w=zeros(8, 4))
    found = count(model)
    assert found.assumed == (("batch", 1), ("seq", LENGTH))
    assert found.macs == LENGTH * 32
    found = count(model, {"batch": 3, "seq": 10})
    assert found.assumed == (("batch", 3), ("seq", 10))
    assert found.macs == 30 * 32


def test_images_and_axes_without_a_name():
    text = f"{HEAD} g (float[?,3,?,?] x) => (float[?,4,?,?] y) {{ y = Conv(x, w) }}"
    model = declare(text, w=zeros(4, 3, 1, 1))
    assert count(model).assumed == (("x:0", 1), ("x:2", IMAGE_SIDE), ("x:3", IMAGE_SIDE))
    assert count(model, {"x:0": 2, "x:2": 10, "x:3": 20}).macs == 2 * 12 * 200


def test_shapes_that_the_model_computes():
    """What exporters write for `x.view(x.shape[0], -1)` with dynamic axes."""
    text = f"""{HEAD} g (float[batch,4,6] x) => (float[batch,5] y) {{
        s = Shape(x) b = Gather(s, zero) u = Unsqueeze(b, axes) t = Concat<axis = 0>(u, minus)
        r = Reshape(x, t) y = MatMul(r, w) }}"""
    model = declare(text, zero=np.array(0), axes=np.array([0]), minus=np.array([-1]), w=zeros(24, 5))
    found = count(model, {"batch": 3})
    assert (found.macs, found.not_counted) == (3 * 24 * 5, ())


def test_what_is_unknown_is_listed():
    text = f"""{HEAD} g (float[n] x) => (float y) {{
        i = NonZero(x) f = Cast<to = 1>(i) a = Abs(f) b = Abs(a) y = there.Unknown(b) }}"""
    found = count(declare(text.replace('["" : 17]', '["" : 17, "there" : 1]')))
    assert found.not_counted == (("Abs", 2), ("there.Unknown", 1))


def test_functions_cost_at_each_call():
    text = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        g (float[5,8] x, float[8,8] w) => (float[5,8] y) { a = local.layer(x, w) y = local.layer(a, w) }
        <domain: "local", opset_import: ["" : 17]>
        layer (i, v) => (o) { p = MatMul(i, v) o = Relu(p) }"""
    model = declare(text)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = count(model)
    assert (found.macs, found.elementwise, found.not_counted) == (2 * 5 * 64, 2 * 40, ())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_of_two_branches_the_dearer_counts():
    text = f"""{HEAD} g (float[5,8] x, bool c) => (float[5,8] y) {{
        y = If (c) <
            then_branch = t () => (float[5,8] p) {{ p = MatMul(x, w) }},
            else_branch = f () => (float[5,8] q) {{ q = Abs(x) }}
        > }}"""
    found = count(declare(text, w=zeros(8, 8)))
    assert (found.macs, found.elementwise) == (5 * 64, 0)


@pytest.mark.parametrize(("trips", "runs", "loops"), [(np.array(7), 7, 0), (None, 1, 1)])
def test_loops(trips, runs, loops):
    text = f"""{HEAD} g (float[5,8] x, int64 n) => (float[5,8] y) {{
        y = Loop ({"n" if trips is None else "m"}, , x) <
            body = b (int64 i, bool c, float[5,8] s) => (bool d, float[5,8] t) {{ d = Identity(c) t = MatMul(s, w) }}
        > }}"""
    arrays = {"w": zeros(8, 8)} | ({} if trips is None else {"m": trips})
    found = count(declare(text, **arrays))
    assert (found.macs, found.loops) == (runs * 5 * 64, loops)


def test_scans_run_once_per_slice():
    text = f"""{HEAD} g (float[9,5,8] x) => (float[9,5,8] y) {{
        y = Scan<num_scan_inputs = 1, body = b (float[5,8] s) => (float[5,8] t) {{ t = MatMul(s, w) }}>(x) }}"""
    found = count(declare(text, w=zeros(8, 8)))
    assert (found.macs, found.loops, found.not_counted) == (9 * 5 * 64, 0, ())
