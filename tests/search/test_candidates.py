"""What is proposed depends on what the model contains and on the target."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.contract import TARGETS, Target
from onnxopt.registry import entries
from onnxopt.report.data import Objective
from onnxopt.search.candidates import KEEP, Inventory, Proposal, keeping, propose, take_inventory

CNN = Path(__file__).parents[2] / "models" / "mnist_cnn_bn.onnx"
ALL = Inventory(10**6, 10**6, 10**6, 10**6)


def names(found: list[Proposal]) -> list[str]:
    return [p.name for p in found]


def test_the_inventory_counts_weights_by_kind() -> None:
    found = take_inventory(onnxopt.load(CNN))
    assert found.convolution > 50_000
    assert found.product > 400_000
    assert (found.recurrent, found.table) == (0, 0)


def test_a_shared_weight_counts_for_each_kind() -> None:
    tied = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (int64[1] i, float[1, 2] x) => (float[1, 2] y, float[1, 3] z)'
        "<float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = Gather(w, i) t = Transpose(w) z = MatMul(x, t) }"
    )
    assert take_inventory(tied) == Inventory(0, 6, 0, 6)


HEADER = '<ir_version: 10, opset_import: ["" : 21]> g (float[1, 2] x) => (float[1, 2] y) <'


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("float[2, 2] w = {1, 2, 3, 4}, int64[1, 2] s = {1, 2}> { z = MatMul(x, w) y = Reshape(z, s) }", "keep fp32"),
        ("float16[2, 2] h = {1, 2, 3, 4}> { w = Cast<to = 1>(h) y = MatMul(x, w) }", "keep as given"),
        (
            "int8[2, 2] q = {1, 2, 3, 4}, float[2, 2] v = {1, 2, 3, 4}, float s = {0.1}>"
            "{ w = DequantizeLinear(q, s) z = MatMul(x, w) y = MatMul(z, v) }",
            "keep as given",
        ),
        (
            "float[2, 2] w = {1, 2, 3, 4}, float s = {0.1}>"
            "{ q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = MatMul(d, w) }",
            "keep as given",
        ),
        ("float[1] w = {1}> { y = Add(x, w) }", "keep as given"),
    ],
    ids=["float32", "float16 stored", "int8 weights", "QDQ with float weights", "no weights"],
)
def test_a_model_is_kept_as_what_it_is(body: str, name: str) -> None:
    assert keeping(ir.from_onnx_text(HEADER + body)) == name


@pytest.mark.parametrize("target", TARGETS)
def test_keeping_the_model_is_always_proposed_and_a_model_without_weights_gets_nothing_else(target: str) -> None:
    assert propose(Inventory(0, 0, 0, 0), target, learning=True) == [KEEP]  # type: ignore[arg-type]
    found = propose(ALL, target, learning=True)  # type: ignore[arg-type]
    assert found[0] is KEEP
    assert len(set(names(found))) == len({p.passes for p in found}) == len(found)


def test_a_convolutional_net_on_the_cpu() -> None:
    found = propose(Inventory(10**6, 0, 0, 0), "cpu", learning=True)
    assert names(found) == ["keep as given", "static int8", "8-bit weights", "16-bit weights"]


def test_gelu_between_convolutions_is_also_tried_with_integers() -> None:
    found = propose(Inventory(10**6, 0, 0, 0, gelu=True), "cpu", learning=True)
    assert names(found)[1:3] == ["static int8", "static int8, GELU by sigmoid"]
    assert found[2].passes == "approximate-gelu,quantize-static,quantize-weights,strip-metadata"
    mixed = names(propose(Inventory(10**6, 10**6, 0, 0, gelu=True), "cpu", learning=True))
    assert [n for n in mixed if "GELU" in n] == ["static and dynamic int8, GELU by sigmoid"]
    assert not any("GELU" in n for n in names(propose(Inventory(0, 10**6, 0, 0, gelu=True), "cpu", learning=True)))


def test_an_encoder_on_the_cpu() -> None:
    found = propose(Inventory(0, 10**6, 0, 10**6), "cpu", learning=True)
    assert found[1] == Proposal("dynamic int8", "quantize-dynamic,quantize-weights,strip-metadata")
    assert found[2].passes == "smooth-activations,quantize-dynamic{correct_bias=true},quantize-weights,strip-metadata"
    assert "quantize-static" not in {n for p in found for n in p.names}
    assert any("bits=4" in p.passes for p in found)


def test_both_kinds_of_layers_on_the_cpu() -> None:
    passes = [p.passes for p in propose(ALL, "cpu", learning=True)]
    both = "quantize-dynamic{correct_bias=true},quantize-static,quantize-weights,strip-metadata"
    assert "quantize-dynamic,quantize-weights,strip-metadata" in passes
    assert both in passes
    assert f"smooth-activations,{both}" in passes


def test_other_targets_get_what_they_have_kernels_for() -> None:
    cuda = {n for p in propose(ALL, "cuda", learning=True) for n in p.names}
    assert cuda == {"convert-float16", "quantize-matmul", "quantize-weights", "strip-metadata"}
    portable = {n for p in propose(ALL, "portable", learning=True) for n in p.names}
    assert "quantize-matmul" not in portable


def test_without_data_nothing_that_learns_is_proposed() -> None:
    found = {n for p in propose(ALL, "cpu", learning=False) for n in p.names}
    assert not found & {"quantize-static", "smooth-activations"}
    assert not any("gptq" in p.passes for p in propose(ALL, "cpu", learning=False))
    assert "quantize-dynamic" in found


@pytest.mark.parametrize("target", ["cpu", "cuda", "portable"])
def test_every_pass_that_is_proposed_exists(target: Target) -> None:
    for proposal in propose(ALL, target, learning=True):
        assert set(proposal.names) <= entries().keys()
        assert proposal.pipeline is not None


@pytest.mark.parametrize(
    ("objective", "end"), [("latency", "strip-metadata"), ("size", "shorten-names,strip-metadata")]
)
def test_names_are_shortened_only_for_size(objective: Objective, end: str) -> None:
    keep, *others = propose(ALL, "cpu", learning=True, objective=objective)
    assert not keep.passes
    assert all(p.passes.endswith(f",{end}") and p.passes.count("shorten") == end.count("shorten") for p in others)
