import collections
import dataclasses

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, Guarantee, Refusal
from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights


def context(model):
    return Context(target="portable", seed=0, evaluate=lambda node, inputs, opset: None, shapes=Shapes(model))


def declare(text, arrays):
    """Build a model from ONNX text and give it initializers of this content."""
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        data = np.ascontiguousarray(array).tobytes()
        proto.graph.initializer.append(onnx.helper.make_tensor(name, dtype, array.shape, data, raw=True))
    return ir.from_proto(with_output_shapes(proto))


def with_output_shapes(proto):
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def initializers(model):
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def apply(model, **options):
    """Apply every edit; return the summaries and the reasons of refusals."""
    edits, refusals = {}, {}
    for found in QuantizeWeights(**options).run(model, context(model)):
        if isinstance(found, Edit):
            found.apply()
            edits[str(found.site)] = found.summary
        else:
            assert isinstance(found, Refusal)
            refusals[found.site.output] = found.reason
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return edits, refusals


def ops(model):
    return collections.Counter(node.op_type for node in all_nodes(model))


def session(model, *, optimized=True, path=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, **kwargs):
    opened = session(model)
    feed = {
        k: v.astype({"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(i.type, v.dtype))
        for (k, v), i in zip(kwargs.items(), opened.get_inputs(), strict=True)
    }
    return opened.run(None, feed)[0].astype(np.float64)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative_error(got, expected):
    return float(np.max(np.abs(got - expected)) / np.ptp(expected))


CONSUMERS = {
    "Conv": ("float[1,16,8,8] x", "y = Conv(x, w)", "float[32,16,3,3]", 0),
    "grouped Conv": ("float[1,64,8,8] x", "y = Conv<group = 4>(x, w)", "float[32,16,3,3]", 0),
    "ConvTranspose": ("float[1,16,8,8] x", "y = ConvTranspose(x, w)", "float[16,32,3,3]", 1),
    "MatMul": ("float[5,64] x", "y = MatMul(x, w)", "float[64,48]", 1),
    "left MatMul": ("float[64,5] x", "y = MatMul(w, x)", "float[48,64]", 0),
    "stacked MatMul": ("float[3,5,64] x", "y = MatMul(x, w)", "float[3,64,48]", 2),
    "Gemm": ("float[5,64] x", "y = Gemm(x, w)", "float[64,48]", 1),
    "Gemm transB": ("float[5,64] x", "y = Gemm<transB = 1>(x, w)", "float[48,64]", 0),
    "left Gemm": ("float[64,5] x", "y = Gemm(w, x)", "float[48,64]", 0),
    "left Gemm transA": ("float[64,5] x", "y = Gemm<transA = 1>(w, x)", "float[64,48]", 1),
    "Gather": ("int64[6] x", "y = Gather(w, x)", "float[50,40]", 0),
    "Gather of columns": ("int64[6] x", "y = Gather<axis = -1>(w, x)", "float[40,50]", 1),
    "LSTM": ("float[5,2,24] x", "y = LSTM<hidden_size = 16>(x, w, r)", "float[1,64,24]", 1),
    "Transpose and MatMul": ("float[5,64] x", "t = Transpose(w) y = MatMul(x, t)", "float[48,64]", 0),
    "Identity and Gemm": ("float[5,64] x", "t = Identity(w) y = Gemm(x, t)", "float[64,48]", 1),
}


def consumer_model(case, opset=17, dtype="float"):
    x, body, declared, axis = CONSUMERS[case]
    text = f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        agraph ({x}) => (float y) {{ {body} }}
    """.replace("float", dtype)
    shape = [int(size) for size in declared[6:-1].split(",")]
    arrays = {"w": random(*shape)}
    # Channels of very different size, so that the right axis shows in the error.
    sizes = np.geomspace(1, 1000, shape[axis]).astype(np.float32)
    arrays["w"] *= sizes.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if case == "LSTM":
        arrays["w"] /= 1000
        arrays["r"] = random(1, 64, 16, seed=1)
    numpy_type = {"float": np.float32, "float16": np.float16, "double": np.float64}.get(dtype)
    return declare(text, {k: v.astype(numpy_type or ml_dtypes.bfloat16) for k, v in arrays.items()}), axis


def feed_for(case):
    x = CONSUMERS[case][0]
    shape = [int(size) for size in x[x.index("[") + 1 : x.index("]")].split(",")]
    return np.arange(4, 50, 9) if x.startswith("int64") else random(*shape, seed=2)


def test_promises_what_it_keeps():
    assert QuantizeWeights.guarantee is Guarantee.APPROXIMATE
    assert QuantizeWeights().caveat() == ""


@pytest.mark.parametrize("mode", ["symmetric", "minmax"])
@pytest.mark.parametrize("form", ["fold", "dequantize"])
@pytest.mark.parametrize("case", CONSUMERS)
def test_every_consumer(case, form, mode):
    original, axis = consumer_model(case)
    model, _ = consumer_model(case)
    edits, refusals = apply(model, form=form, mode=mode)
    assert len(edits) == len(original.graph.initializers)
    assert not refusals
    assert not any(t.const_value.dtype in (ir.DataType.FLOAT,) and t.const_value.size > 64 for t in initializers(model))
    scale = model.graph.initializers["w_scale"].const_value
    assert scale.size == original.graph.initializers["w"].const_value.shape[axis]
    got, expected = run(model, x=feed_for(case)), run(original, x=feed_for(case))
    assert 0 < relative_error(got, expected) < 0.02
    assert "w" not in model.graph.initializers


@pytest.mark.parametrize("mode", ["symmetric", "minmax"])
@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
@pytest.mark.parametrize("case", ["MatMul", "Gemm", "Gather", "LSTM"])
def test_the_runtime_folds_the_default_form_away(case, dtype, mode, tmp_path):
    """The claim of "same speed": what runs has the operators of the original."""
    original, _ = consumer_model(case, dtype=dtype)
    model, _ = consumer_model(case, dtype=dtype)
    edits, _ = apply(model, mode=mode)
    assert edits
    left = []
    for name, each in (("before", original), ("after", model)):
        path = tmp_path / f"{name}.onnx"
        session(each, path=path)
        left.append(collections.Counter(node.op_type for node in onnx.load(path).graph.node))
    assert left[0] == left[1]


def test_the_runtime_folds_the_default_form_before_conv_and_keeps_its_layout(tmp_path):
    model, _ = consumer_model("Conv")
    apply(model)
    path = tmp_path / "optimized.onnx"
    session(model, path=path)
    left = {node.op_type for node in onnx.load(path).graph.node}
    assert not left & {"Cast", "Mul", "Sub", "DequantizeLinear"}


@pytest.mark.parametrize("dtype", ["float16", "double"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_other_float_types(dtype, granularity):
    original, _ = consumer_model("MatMul", dtype=dtype)
    model, _ = consumer_model("MatMul", dtype=dtype)
    edits, _ = apply(model, granularity=granularity)
    assert len(edits) == 1
    got, expected = run(model, x=feed_for("MatMul")), run(original, x=feed_for("MatMul"))
    assert relative_error(got, expected) < 0.02


@pytest.mark.parametrize("case", ["MatMul", "Gather"])
def test_bfloat16(case):
    """The CPU multiplies no bfloat16, so the weight is looked at and not run."""
    original, _ = consumer_model(case, dtype="bfloat16")
    model, _ = consumer_model(case, dtype="bfloat16")
    edits, _ = apply(model, mode="symmetric")
    assert "bfloat16" in next(iter(edits.values()))
    last = next(node for node in model.graph if node.op_type == case).inputs[case == "MatMul"].producer()
    assert (last.op_type, last.outputs[0].dtype) == ("Cast", ir.DataType.BFLOAT16)
    weight = original.graph.initializers["w"].const_value.numpy().astype(np.float32)
    values = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    restored = values["w_int8"] * values["w_scale"]
    assert np.all(np.abs(restored - weight) <= values["w_scale"] * 0.5001)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_dequantize_form_of_float16_keeps_the_type(granularity):
    original, _ = consumer_model("Gather", dtype="float16", opset=19)
    model, _ = consumer_model("Gather", dtype="float16", opset=19)
    edits, _ = apply(model, form="dequantize", granularity=granularity)
    assert len(edits) == 1
    assert model.graph.initializers["w_scale"].const_value.dtype == ir.DataType.FLOAT16
    got, expected = run(model, x=feed_for("Gather")), run(original, x=feed_for("Gather"))
    assert relative_error(got, expected) < 0.02


@pytest.mark.parametrize(
    ("opset", "dtype", "options", "reason"),
    [
        (6, "float", {}, "Mul broadcasts from opset 7 on, and this graph has 6"),
        (
            12,
            "float",
            {"form": "dequantize"},
            "DequantizeLinear of float32 per channel needs opset 13, and this graph",
        ),
        (
            9,
            "float",
            {"form": "dequantize", "granularity": "tensor"},
            "per tensor needs opset 10, and this graph has 9",
        ),
        (18, "float16", {"form": "dequantize"}, "DequantizeLinear of float16 per channel needs opset 19"),
        (17, "double", {"form": "dequantize"}, 'DequantizeLinear makes no float64; use form="fold"'),
    ],
)
def test_what_the_opset_lacks_is_refused_with_the_reason(opset, dtype, options, reason):
    model, _ = consumer_model("MatMul", opset=opset, dtype=dtype)
    edits, refusals = apply(model, **options)
    assert not edits
    assert reason in refusals["w"]


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor", "form": "dequantize"}])
def test_what_old_opsets_have_is_used(options):
    model, _ = consumer_model("MatMul", opset=10)
    assert apply(model, **options)[0]


def test_the_summary_states_type_shape_bytes_and_error():
    model = declare(
        """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[1,32,8,8] x) => (float y) { y = Conv(x, w) }""",
        {"w": random(64, 32, 3, 3)},
    )
    edits, _ = apply(model, mode="symmetric")
    assert list(edits) == ["quantize-weights at w"]
    summary = edits["quantize-weights at w"]
    assert summary.startswith("float32[64,32,3,3] to int8 per channel, 73,728 to 18,688 bytes, worst weight error 0.")
    assert summary.endswith("% of its channel's range")
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert stored == 18_688


@pytest.mark.parametrize("form", ["fold", "dequantize"])
@pytest.mark.parametrize("mode", ["symmetric", "minmax"])
def test_bytes_in_the_summary_are_the_bytes_stored(form, mode):
    for granularity in ("tensor", "channel"):
        model, _ = consumer_model("Gemm")
        edits, _ = apply(model, form=form, mode=mode, granularity=granularity)
        stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        assert f"to {stored:,} bytes" in next(iter(edits.values()))


@pytest.mark.parametrize("form", ["fold", "dequantize"])
@pytest.mark.parametrize("mode", ["symmetric", "minmax"])
def test_a_second_run_changes_nothing(form, mode):
    for case in CONSUMERS:
        model, _ = consumer_model(case)
        apply(model, form=form, mode=mode)
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        for again in ("fold", "dequantize"):
            assert apply(model, form=again, mode=mode) == ({}, {})
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_finding_changes_nothing_and_is_repeatable():
    model, _ = consumer_model("LSTM")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    once = [(e.site, e.summary) for e in QuantizeWeights().run(model, context(model))]
    twice = [(e.site, e.summary) for e in QuantizeWeights().run(model, context(model))]
    assert once == twice
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_clone_is_not_touched():
    model, _ = consumer_model("Conv")
    clone = model.clone()
    before = ir.to_proto(clone).SerializeToString(deterministic=True)
    assert apply(model)[0]
    assert ir.to_proto(clone).SerializeToString(deterministic=True) == before


def test_a_tied_weight_is_stored_once():
    text = """
        <ir_version: 10, opset_import: ["" : 17]>
        agraph (int64[6] x) => (float y) {
            h = Gather(w, x)
            t = Transpose(w)
            y = MatMul(h, t)
        }
    """
    original, model = declare(text, {"w": random(64, 32)}), declare(text, {"w": random(64, 32)})
    edits, _ = apply(model, mode="symmetric")
    assert len(edits) == 1
    assert sorted(model.graph.initializers) == ["w_int8", "w_scale"]
    assert model.graph.initializers["w_scale"].const_value.shape == (64, 1)
    assert ops(model)["Mul"] == 1
    assert relative_error(run(model, x=np.arange(6)), run(original, x=np.arange(6))) < 0.02


def test_constants_in_nested_graphs_and_functions():
    array = random(32, 40)
    text = """
        <ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        agraph (float[5,32] x, bool c) => (float y) {
            h = local.layer(x)
            outer = Identity(x)
            z = If (c) <
                then_branch = thens () => (float[5,40] a) { a = MatMul(outer, w) },
                else_branch = elses () => (float[5,40] b) { m = Constant<value = float[32,40] {VALUES}>() b = MatMul(x, m) }
            >
            y = Add(h, z)
        }
        <domain: "local", opset_import: ["" : 17]>
        layer (x) => (y) { k = Constant<value = float[32,40] {VALUES}>() y = MatMul(x, k) }
    """.replace("VALUES", ",".join(str(v) for v in array.reshape(-1)))

    def build():
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
        return ir.from_proto(with_output_shapes(proto))

    original, model = build(), build()
    edits, refusals = apply(model)
    assert refusals == {}
    assert len(edits) == 3
    assert any("else_branch" in site for site in edits)
    assert any("function local::layer" in site for site in edits)
    assert ops(model)["Cast"] == 3
    x = random(5, 32, seed=1)
    for choice in (True, False):
        feed = {"x": x, "c": np.array(choice)}
        for optimized in (True, False):
            got = session(model, optimized=optimized).run(None, feed)[0]
            expected = session(original, optimized=optimized).run(None, feed)[0]
            assert 0 < relative_error(got, expected) < 0.02
    assert apply(model) == ({}, {})


def test_an_initializer_of_a_branch():
    body = onnx.parser.parse_graph("b () => (float[5,40] a) { a = MatMul(x, inner) }")
    body.initializer.append(onnx.numpy_helper.from_array(random(32, 40), "inner"))
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,32] x, bool c) => (float y) { y = Identity(x) }"""
    )
    node = onnx.helper.make_node("If", ["c"], ["y"], name="choice", then_branch=body, else_branch=body)
    proto.graph.node[0].CopyFrom(node)
    model = ir.from_proto(with_output_shapes(proto))
    edits, _ = apply(model)
    assert set(edits) == {
        "quantize-weights at inner (in choice.then_branch)",
        "quantize-weights at inner (in choice.else_branch)",
    }
    names = [name for graph in model.graphs() for name in graph.initializers]
    assert len(names) == len(set(names)) == 4
    assert session(model).run(None, {"x": random(5, 32), "c": np.array(True)})[0].shape == (5, 40)


def test_what_the_caller_can_override_stays():
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,64] x, float[64,48] w) => (float y) { y = MatMul(x, w) }"""
    model = declare(text, {"w": random(64, 48)})
    edits, refusals = apply(model)
    assert not edits
    assert refusals == {"w": "it is also an input of the graph, so the caller can override it"}


def test_an_initializer_that_is_an_output_stays():
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,64] x) => (float y, float[64,48] w) { y = MatMul(x, w) }"""
    model = declare(text, {"w": random(64, 48)})
    assert apply(model) == ({}, {"w": "it is an output of the graph"})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad):
    model, _ = consumer_model("MatMul")
    array = random(64, 48)
    array[3, 5] = bad
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    assert apply(model) == ({}, {"w": "it holds NaN or infinity"})


@pytest.mark.parametrize("mode", ["symmetric", "minmax"])
def test_channels_of_zeros_stay_zeros(mode):
    array = random(64, 48)
    array[:, 7] = 0
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,64] x) => (float y) { y = MatMul(x, w) }"""
    model = declare(text, {"w": array})
    assert apply(model, mode=mode)[0]
    got = run(model, x=random(5, 64))
    assert np.isfinite(got).all()
    assert np.all(got[:, 7] == 0)


def test_weights_of_zeros_only():
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,64] x) => (float y) { y = MatMul(x, w) }"""
    model = declare(text, {"w": np.zeros((64, 48), np.float32)})
    edits, _ = apply(model)
    assert next(iter(edits.values())).endswith("worst weight error 0.00% of its channel's range")
    assert not run(model, x=random(5, 64)).any()


def test_biases_and_normalization_parameters_are_not_weights():
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,2048] x) => (float y) {
            n = LayerNormalization(x, scale, bias)
            m = Add(n, position)
            y = Gemm(m, w, c)
        }"""
    arrays = {"scale": random(2048), "bias": random(2048), "position": random(5, 2048)}
    model = declare(text, {**arrays, "w": random(2048, 40), "c": random(1, 40)})
    edits, refusals = apply(model, min_elements=1)
    assert list(edits) == ["quantize-weights at w"]
    assert set(refusals) == {"position"}
    assert "uses it as a weight" in refusals["position"]


def test_small_weights_stay():
    model, _ = consumer_model("MatMul")
    assert apply(model, min_elements=64 * 48 + 1) == ({}, {})
    assert len(apply(model, min_elements=64 * 48)[0]) == 1


def test_what_would_not_shrink_is_refused():
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,1] x) => (float y) { y = MatMul(x, w) }"""
    model = declare(text, {"w": random(1, 2000)})
    edits, refusals = apply(model)
    assert not edits
    assert refusals == {"w": "its integers and scales would not take less room than it does"}
    assert apply(model, granularity="tensor")[0]


def test_weights_without_elements_or_data_are_left():
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,0] x) => (float y) { y = MatMul(x, w) }"""
    model = declare(text, {"w": np.zeros((0, 48), np.float32)})
    assert apply(model, min_elements=1) == ({}, {})


def test_names_do_not_collide():
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,64] x) => (float y) { w_scale = Abs(x) y = MatMul(w_scale, w) }"""
    model = declare(text, {"w": random(64, 48), "w_int8": random(3)})
    edits, _ = apply(model, mode="symmetric")
    assert len(edits) == 1
    assert set(model.graph.initializers) == {"w_int8", "w_int8_1", "w_scale_1"}
    assert run(model, x=random(5, 64)).shape == (5, 48)


def test_the_file_is_a_quarter(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[5,512] x) => (float y) { h = MatMul(x, w) y = MatMul(h, v) }"""
    model = declare(text, {"w": random(512, 512), "v": random(512, 512, seed=1)})
    before = len(ir.to_proto(model).SerializeToString())
    apply(model)
    assert len(ir.to_proto(model).SerializeToString()) < before * 0.256


def test_external_weights_are_read_from_their_file(tmp_path):
    original, _ = consumer_model("Conv")
    ir.save(original, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert len(apply(model)[0]) == 1
    assert relative_error(run(model, x=feed_for("Conv")), run(original, x=feed_for("Conv"))) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "maxmin"}, 'quantize-weights: mode is "maxmin"; use symmetric or minmax or float8.'),
        ({"granularity": "row"}, 'quantize-weights: granularity is "row"; use channel or tensor.'),
        ({"form": "qdq"}, 'quantize-weights: form is "qdq"; use fold or dequantize.'),
        ({"min_elements": 0}, "quantize-weights: min_elements is 0; use 1 or more."),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(UsageError) as error:
        QuantizeWeights(**options)
    assert str(error.value) == message


def test_options_are_documented():
    for field in dataclasses.fields(QuantizeWeights):
        assert f"        {field.name}: " in f"    {QuantizeWeights.__doc__}"
