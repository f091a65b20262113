"""ONNX Runtime's messages, as they come, and what is made of them."""

from __future__ import annotations

import pytest

from onnxopt.session.diagnosis import missing_kernel, sentence

MESSAGES = [
    (
        "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Mul(14) node with name 'm'",
        'there is no kernel for Mul (version 14) (node "m").',
    ),
    (
        "[ONNXRuntimeError] : 1 : FAIL : Failed to find kernel for Swish(24) (node:'' ep:'CPUExecutionProvider'). "
        "Kernel not found.",
        "there is no kernel for Swish (version 24).",
    ),
    (
        '[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model. In Node, ("", Foo, "", -1) : ("s": '
        'tensor(float),) -> ("z": tensor(float),) , Error No Op registered for Foo with domain_version of 21',
        "Foo is not known in this opset.",
    ),
    (
        "[ONNXRuntimeError] : 1 : FAIL : Fatal error: my.dom:Foo(-1) is not a registered function/op",
        "Foo of the domain my.dom is neither a known operator nor a function of the model; a library that has it can "
        "be registered with --custom-ops.",
    ),
    (
        '[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model. In Node, ("n", If, "", -1) : ("c": '
        'tensor(bool),) -> ("y": tensor(float),) , Error Mismatched output count.',
        'If (node "n") is invalid: Mismatched output count.',
    ),
    (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Mul node. Name:'foo' Status Message: "
        "/onnxruntime_src/onnxruntime/core/providers/cpu/math/element_wise_ops.h:563 void "
        "onnxruntime::BroadcastIterator::Init(ptrdiff_t, ptrdiff_t) axis == 1 || axis == largest was false. Attempting to "
        "broadcast an axis by a dimension other than 1. 2 by 3\n",
        'Mul (node "foo") failed: Attempting to broadcast an axis by a dimension other than 1. 2 by 3.',
    ),
    (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running If node. Name:'i' Status Message: "
        "Non-zero status code returned while running MatMul node. Name:'' Status Message: matmul_helper.h:59 Compute "
        "MatMul dimension mismatch",
        'If (node "i") failed: MatMul failed: MatMul dimension mismatch.',
    ),
    (
        "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/graph/model.cc:256 "
        "onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::PathString&, const "
        "onnxruntime::IOnnxRuntimeOpSchemaRegistryList*, const onnxruntime::logging::Logger&, const "
        "onnxruntime::ModelOptions&) Unsupported model IR version: 99, max supported IR version: 14\n",
        "Unsupported model IR version: 99, max supported IR version: 14.",
    ),
    (
        "Error in execution: Non-zero status code returned while running Identity node. Name:'' Status Message: "
        "/onnxruntime_src/include/onnxruntime/core/framework/ort_value.h:97 const T& OrtValue::Get() const [with T = "
        "onnxruntime::TensorSeq] IsTensorSequence() was false. Trying to get a TensorSeq, but got: (null)\n",
        "Identity failed: Trying to get a TensorSeq, but got: (null).",
    ),
    (
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid rank for input: s Got: 1 Expected: 2 Please fix either the "
        "inputs/outputs or the model.",
        'input "s" has 1 dimensions, but 2 are expected.',
    ),
    (
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: s for the following indices\n index: "
        "1 Got: 4 Expected: 3\n Please fix either the inputs/outputs or the model.",
        'input "s" has size 4 along axis 1, but 3 is expected.',
    ),
    (
        "[ONNXRuntimeError] : 1 : FAIL : Deserialize tensor w failed.tensorprotoutils.cc:2201 GetExtDataFromTensorProto "
        "External initializer: w offset: 500 size to read: 256 given file_length: 259 are out of bounds or can not be read "
        "in full.",
        "Deserialize tensor w failed. External initializer: w offset: 500 size to read: 256 given file_length: 259 are "
        "out of bounds or can not be read in full.",
    ),
    (
        "[ONNXRuntimeError] : 1 : FAIL : Node () Op (Mul) [ShapeInferenceError] Incompatible dimensions",
        "Node () Op (Mul) [ShapeInferenceError] Incompatible dimensions.",
    ),
    (
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: "
        "/onnxruntime_src/onnxruntime/core/providers/cpu/nn/string_normalizer.cc:42 "
        "onnxruntime::string_normalizer::Locale::Locale(const std::string&)::<lambda()> Failed to construct locale",
        "Exception during initialization: Failed to construct locale.",
    ),
    ("", "ONNX Runtime gave no reason."),
]


@pytest.mark.parametrize(("message", "expected"), MESSAGES)
def test_says_it_in_one_sentence(message: str, expected: str) -> None:
    assert sentence(message) == expected


def test_missing_kernel() -> None:
    assert missing_kernel(MESSAGES[0][0]) == ("Mul", "14", "m")
    assert missing_kernel("anything else") is None
