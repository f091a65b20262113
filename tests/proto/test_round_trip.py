"""What is loaded and encoded again is what it was, for everything ONNX can express."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.descriptor import Descriptor
from onnx import TensorProto, helper, parser

from onnxopt.model import load, save
from onnxopt.proto.encode import encode

BACKEND = Path(onnx.__file__).parent / "backend" / "test" / "data"


def canonical(proto: onnx.ModelProto) -> bytes:
    """The bytes of a model with the few things normalized that `encode` normalizes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in nodes_of(copy.graph):
        clear_empty(node, "domain", "name", "overload")
    for function in copy.functions:
        for node in function.node:
            clear_empty(node, "domain", "name", "overload")
    for entry in copy.opset_import:
        entry.domain = entry.domain
    return copy.SerializeToString(deterministic=True)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
                yield from nodes_of(body)


def clear_empty(node: onnx.NodeProto, *fields: str) -> None:
    for field in fields:
        if not getattr(node, field):
            node.ClearField(field)


def assert_survives(proto: onnx.ModelProto) -> ir.Model:
    before = proto.SerializeToString()
    model = load(proto)
    for again in (encode(model), encode(model.clone())):
        assert canonical(again) == canonical(proto)
    assert proto.SerializeToString() == before
    return model


def test_models_that_onnx_ships(tmp_path: Path) -> None:
    paths = sorted(BACKEND.glob("*/*/model.onnx"))
    assert len(paths) > 100
    for path in paths:
        model = load(path)
        assert canonical(encode(model)) == canonical(onnx.load(path)), path
        save(model, tmp_path / "o.onnx")
        assert (tmp_path / "o.onnx").read_bytes() == path.read_bytes(), path


def test_models_of_the_operator_tests(tmp_path: Path) -> None:
    """Nearly every operator, control flow, sequences, optionals, strings and low-bit types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = [case for case in collect_testcases(None) if case.model is not None]
    assert len(cases) > 1000
    for number, case in enumerate(cases):
        assert canonical(encode(load(case.model))) == canonical(case.model), case.name
        if number % 10 == 0:
            (tmp_path / "m.onnx").write_bytes(case.model.SerializeToString())
            save(load(tmp_path / "m.onnx"), tmp_path / "o.onnx")
            assert (tmp_path / "o.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes(), case.name


def base() -> onnx.ModelProto:
    return parser.parse_model(
        """<ir_version: 13, opset_import: ["": 21, "com.example": 3], producer_name: "p", producer_version: "1",
        domain: "d", model_version: 7, doc_string: "doc", metadata_props: ["z": "1", "a": "2"]>
        g (float[N, 3] x, bool c) => (float[N, 3] y) <float[3] w = {1, 2, 3}, float[N, 3] t> {
            t = Add(x, w)
            u = com.example.Unknown <mode = "fast", sizes = [1, 2]> (t)
            y = Relu(u)
        }"""
    )


def test_metadata_and_docs() -> None:
    proto = base()
    graph = proto.graph
    graph.doc_string = "graph"
    for target in (
        graph,
        graph.node[0],
        graph.input[0],
        graph.output[0],
        graph.value_info[0],
        graph.initializer[0],
    ):
        target.metadata_props.add(key="z", value="1")
        target.metadata_props.add(key="a", value="2")
        target.doc_string = "doc"
    graph.node[1].attribute[0].doc_string = "doc"
    assert_survives(proto)


def test_empty_texts_are_stated_or_not() -> None:
    proto = base()
    for field in ("producer_name", "producer_version", "domain", "doc_string"):
        setattr(proto, field, "")
    proto.graph.node[0].doc_string = ""
    assert encode(load(proto)).HasField("producer_name")
    assert_survives(proto)
    proto.ClearField("producer_name")
    assert not encode(load(proto)).HasField("producer_name")


def test_map_opaque_and_incomplete_types() -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["ai.onnx.ml": 3, "": 17]> g (float[N] x) => (float y) { y = a.B(x) z = a.C(y) }'
    )
    proto.graph.ClearField("output")
    zipped = proto.graph.output.add(name="y").type.sequence_type.elem_type.map_type
    zipped.key_type = TensorProto.INT64
    zipped.value_type.tensor_type.elem_type = TensorProto.FLOAT
    proto.graph.value_info.add(name="z").type.opaque_type.name = "thing"
    info = proto.graph.input.add(name="untyped")
    info.type.tensor_type.shape.dim.add(dim_value=3)
    info = proto.graph.input.add(name="mapped")
    info.type.map_type.key_type = TensorProto.STRING
    info.type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    model = assert_survives(proto)
    assert model.graph.outputs[0].type is None
    # The output keeps its type when another node comes to compute it.
    old = model.graph.outputs[0]
    new = ir.node("Other", [model.graph.inputs[0]], domain="a", name="new")
    model.graph.append(new)
    old.name = "old"
    new.outputs[0].name = "y"
    model.graph.outputs[0] = new.outputs[0]
    assert encode(model).graph.output[0].type == proto.graph.output[0].type


def test_sequence_optional_and_denotations() -> None:
    proto = base()
    kind = proto.graph.input.add(name="s").type
    kind.denotation = "outer"
    kind.optional_type.elem_type.sequence_type.elem_type.CopyFrom(
        helper.make_tensor_type_proto(TensorProto.FLOAT, ["a", 2, None], ["DATA_BATCH", "DATA_CHANNEL", "OTHER"])
    )
    kind.optional_type.elem_type.denotation = "inner"
    sparse = proto.graph.input.add(name="sparse").type.sparse_tensor_type
    sparse.elem_type = TensorProto.FLOAT
    sparse.shape.dim.add(dim_param="k")
    proto.graph.input.append(helper.make_tensor_value_info("scalar", TensorProto.INT64, []))
    proto.graph.input.append(helper.make_tensor_value_info("anything", TensorProto.INT64, None))
    proto.graph.input.append(helper.make_tensor_value_info("unknown", TensorProto.INT64, [-1, 0]))
    assert_survives(proto)


def test_sparse_tensors() -> None:
    proto = base()
    for name, dims, indices in (
        ("linear", [2, 3], np.array([1, 5])),
        ("pairs", [2, 3], np.array([[0, 1], [1, 2]])),
    ):
        sparse = proto.graph.sparse_initializer.add(dims=dims)
        sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.array([7, 8], np.float32), name))
        sparse.indices.CopyFrom(onnx.numpy_helper.from_array(indices, f"{name}_indices"))
        proto.graph.node.append(helper.make_node("Identity", [name], [f"{name}_out"]))
    constant = helper.make_node("Constant", [], ["k"], sparse_value=proto.graph.sparse_initializer[0])
    proto.graph.node.append(constant)
    many = proto.graph.node.add(op_type="Custom", domain="com.example", output=["m"]).attribute.add(name="all")
    many.type = onnx.AttributeProto.SPARSE_TENSORS
    many.sparse_tensors.extend(proto.graph.sparse_initializer)
    model = assert_survives(proto)
    for name in ("linear", "pairs"):
        tensor = model.graph.initializers[name].const_value
        np.testing.assert_array_equal(tensor.numpy(), [[0, 7, 0], [0, 0, 8]])
        assert np.frombuffer(tensor.tobytes(), np.float32).sum() == 15


def test_every_type_of_attribute() -> None:
    proto = base()
    node = proto.graph.node[1]
    tensor = onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), "inner")
    tensor.metadata_props.add(key="k", value="v")
    body = parser.parse_graph("b () => (float[1] o) { o = Constant<value = float[1] {1}>() }")
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1, "n"])
    values = {
        "i": 3, "f": 0.1, "s": "text", "ints": [1, -2], "floats": [0.5, float("inf")], "strings": ["a", "b"],
        "t": tensor, "ts": [tensor, tensor], "g": body, "gs": [body], "tp": kind, "tps": [kind, kind],
    }  # fmt: skip
    for name, value in values.items():
        node.attribute.append(helper.make_attribute(name, value))
    node.attribute.append(helper.make_attribute("bytes", b"\xff\xfe"))
    node.attribute.append(helper.make_attribute("more_bytes", [b"\xff", b"text"]))
    node.attribute.append(helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.INTS))
    assert_survives(proto)


def test_attributes_without_a_type_get_one() -> None:
    """As files before IR version 2 have them."""
    proto = base()
    node = proto.graph.node[1]
    for attribute in node.attribute:
        attribute.ClearField("type")
    model = load(proto)
    assert list(model.graph)[1].attributes["sizes"].as_ints() == (1, 2)
    assert encode(model).graph.node[1].attribute[0].type == onnx.AttributeProto.STRING


@pytest.mark.parametrize("dtype", [d for d in ir.DataType if d not in (ir.DataType.UNDEFINED, ir.DataType.STRING)])
def test_every_element_type(tmp_path: Path, dtype: ir.DataType) -> None:
    """As raw data, in typed fields and in the file."""
    rng = np.random.default_rng(0)
    for shape in ((3,), (0, 2), (), (5, 4000)):
        packed = rng.integers(0, 2 if dtype == ir.DataType.BOOL else 256, -(-int(np.prod(shape)) * dtype.bitwidth // 8))
        tensor = TensorProto(name="new", dims=shape, data_type=dtype.value, raw_data=packed.astype(np.uint8).tobytes())
        if dtype.bitwidth < 8 and shape != (5, 4000):
            tensor.raw_data = bytes(len(tensor.raw_data))
        proto = base()
        proto.ir_version = 14
        proto.graph.initializer.append(tensor)
        expected = assert_survives(proto).graph.initializers["new"].const_value.numpy()
        (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
        found = load(tmp_path / "m.onnx").graph.initializers["new"].const_value
        assert (found.dtype, found.shape) == (dtype, ir.Shape(shape))
        assert found.numpy().tobytes() == expected.tobytes()
        assert found.tobytes() == tensor.raw_data
        for external in (False, True):
            save(load(tmp_path / "m.onnx"), tmp_path / "o.onnx", external_data=external)
            saved = load(tmp_path / "o.onnx").graph.initializers["new"].const_value
            assert saved.numpy().tobytes() == expected.tobytes()


def test_typed_fields(tmp_path: Path) -> None:
    proto = base()
    large = helper.make_tensor("large", TensorProto.FLOAT, [5000], np.arange(5000, dtype=np.float32))
    assert large.float_data
    for dtype in (
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT4,
        TensorProto.UINT64,
        TensorProto.COMPLEX64,
    ):
        proto.graph.initializer.append(helper.make_tensor(f"t{dtype}", dtype, [3], np.array([1, 2, 3])))
    proto.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"\xff"]))
    proto.graph.initializer.append(large)
    assert_survives(proto)
    save(load(proto), tmp_path / "o.onnx", external_data=True)
    array = load(tmp_path / "o.onnx").graph.initializers["large"].const_value
    assert isinstance(array, ir.ExternalTensor)
    np.testing.assert_array_equal(array.numpy(), np.arange(5000))


def test_functions() -> None:
    proto = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21, "f": 1]> g (float[N] x) => (float[N] y) { y = f.Scale<by = 2.0>(x) }
        <opset_import: ["": 21], domain: "f", doc_string: "doc">
        Scale <by, bias: float = 0.5> (a) => (b) <float[N] c> {
            k = Constant<value_float: float = @by>() c = Mul(a, k) d = Constant<value_float: float = @bias>() b = Add(c, d) }"""
    )
    function = proto.functions[0]
    function.overload = "v2"
    proto.graph.node[0].overload = "v2"
    function.metadata_props.add(key="k", value="v")
    assert_survives(proto)


def test_types_of_function_values_before_ir_version_10() -> None:
    proto = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17, "f": 1]> g (float[N] x) => (float[N] y) { y = f.Twice(x) }
        <opset_import: ["": 17], domain: "f"> Twice (a) => (b) { b = Add(a, a) }"""
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("f::Twice/b", TensorProto.FLOAT, ["N"]))
    model = assert_survives(proto)
    model.functions.clear()
    assert not encode(model).graph.value_info


def test_quantization_annotations_training_info_and_devices() -> None:
    proto = base()
    for name in ("y", "x", "w"):
        annotation = proto.graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    training = proto.training_info.add()
    training.algorithm.CopyFrom(parser.parse_graph("t (float[3] w2) => (float[3] w3) { w3 = Add(w2, w2) }"))
    training.update_binding.add(key="w", value="w3")
    configuration = proto.configuration.add(name="two", num_devices=2, device=["a", "b"])
    device = proto.graph.node[0].device_configurations.add(configuration_id=configuration.name, pipeline_stage=0)
    spec = device.sharding_spec.add(tensor_name="t", device=[0, 1])
    spec.sharded_dim.add(axis=0).simple_sharding.add(dim_param="N", num_shards=2)
    model = assert_survives(proto)
    assert next(iter(model.graph)).device_configurations[0].configuration.num_devices == 2


def test_order_of_what_is_stated_about_values() -> None:
    """Also about initializers, outputs and inputs; entries about nothing go when something is edited."""
    proto = base()
    del proto.graph.value_info[:]
    for name in ("u", "w", "y", "t"):
        proto.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3] if name != "w" else [3])
        )
    assert_survives(proto)
    proto.graph.value_info.append(helper.make_tensor_value_info("gone", TensorProto.FLOAT, []))
    assert [i.name for i in encode(load(proto)).graph.value_info] == ["u", "w", "y", "t"]


def test_new_values_are_described_and_new_initializers_are_not() -> None:
    model = load(base())
    value = list(model.graph)[1].outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", 3])
    added = ir.tensor(np.ones(3, np.float32), name="new")
    model.graph.register_initializer(
        ir.Value(name="new", const_value=added, type=ir.TensorType(added.dtype), shape=ir.Shape([3]))
    )
    assert [i.name for i in encode(model).graph.value_info] == ["t", "u"]


def test_names_of_shared_tensors() -> None:
    """One tensor object under two names, as after merging equal initializers of a body and the main graph."""
    model = load(base())
    shared = model.graph.initializers["w"].const_value
    model.graph.register_initializer(ir.Value(name="second", const_value=shared))
    assert [t.name for t in encode(model).graph.initializer] == ["w", "second"]
    assert shared.name == "w"


def test_domains_of_standard_operators() -> None:
    proto = base()
    proto.graph.node[0].domain = "ai.onnx"
    proto.opset_import[0].domain = "ai.onnx"
    again = encode(load(proto))
    assert again.graph.node[0].domain == ""
    assert again.opset_import[0].domain == "ai.onnx"
    onnx.checker.check_model(again)


def test_models_that_onnx_ir_loaded_keep_their_annotations() -> None:
    proto = base()
    annotation = proto.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    assert encode(ir.from_proto(proto)).graph.quantization_annotation == proto.graph.quantization_annotation


# Fields that `decode` and `encode` know. A new version of onnx that adds one must not lose it silently.
KNOWN_FIELDS = {
    "ModelProto": "ir_version opset_import producer_name producer_version domain model_version doc_string graph "
    "metadata_props training_info functions configuration",
    "GraphProto": "node name initializer sparse_initializer doc_string input output value_info quantization_annotation "
    "metadata_props",
    "NodeProto": "input output name op_type domain overload attribute doc_string metadata_props device_configurations",
    "AttributeProto": "name ref_attr_name doc_string type f i s t g sparse_tensor tp floats ints strings tensors graphs "
    "sparse_tensors type_protos",
    "FunctionProto": "name input output attribute attribute_proto node doc_string opset_import domain overload value_info "
    "metadata_props",
    # Segments are refused, and so is everything that they would mean.
    "TensorProto": "dims data_type segment float_data int32_data string_data int64_data name doc_string raw_data "
    "external_data data_location double_data uint64_data metadata_props",
    "ValueInfoProto": "name type doc_string metadata_props",
    "TypeProto": "tensor_type sequence_type map_type optional_type sparse_tensor_type opaque_type denotation",
    "TensorShapeProto": "dim",
    "OperatorSetIdProto": "domain version",
    "TensorAnnotation": "tensor_name quant_parameter_tensor_names",
    "DeviceConfigurationProto": "name num_devices device",
    "NodeDeviceConfigurationProto": "configuration_id sharding_spec pipeline_stage",
}


@pytest.mark.parametrize("message", KNOWN_FIELDS)
def test_no_field_of_onnx_is_unknown(message: str) -> None:
    descriptor: Descriptor = getattr(onnx, message).DESCRIPTOR
    assert {field.name for field in descriptor.fields} == set(KNOWN_FIELDS[message].split())
