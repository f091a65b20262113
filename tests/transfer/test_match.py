"""Matching looks at the graph alone: names, the order of nodes and of operands that commute say nothing."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt import model as models
from onnxopt.transfer.match import match
from onnxopt.transfer.view import Viewer

from .conftest import build
from .test_transfer import ATTENTION, ATTENTION_WEIGHTS, BATCH_NORM, BATCH_NORM_WEIGHTS, MATMUL, MATMUL_WEIGHTS

MNIST = Path(__file__).parent.parent.parent / "models"
COMMUTE = ("Add", "Mul")


def shuffled(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Return the same model with other names, another order of nodes and initializers, and swapped operands."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    chance = random.Random(seed)
    names = {n for node in copy.graph.node for n in [*node.input, *node.output]}
    names |= {i.name for i in copy.graph.initializer} | {v.name for v in [*copy.graph.input, *copy.graph.output]}
    numbers = list(range(len(names)))
    chance.shuffle(numbers)
    new = {name: f"t{number}" for name, number in zip(sorted(names - {""}), numbers, strict=False)} | {"": ""}
    for node in copy.graph.node:
        node.name = ""
        node.input[:] = [new[n] for n in node.input]
        node.output[:] = [new[n] for n in node.output]
        if node.op_type in COMMUTE and chance.random() < 0.5:
            node.input[:] = reversed(node.input)
    for named in [*copy.graph.initializer, *copy.graph.input, *copy.graph.output]:
        named.name = new[named.name]
    del copy.graph.value_info[:]
    nodes, initializers = list(copy.graph.node), list(copy.graph.initializer)
    chance.shuffle(nodes)
    chance.shuffle(initializers)
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(initializers)
    return copy


def contents(model: onnx.ModelProto) -> dict[str, bytes]:
    return {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in model.graph.initializer}


PROTOS = {
    "two layers": build(MATMUL, MATMUL_WEIGHTS),
    "attention": build(ATTENTION, ATTENTION_WEIGHTS),
    "normalization": build(BATCH_NORM, BATCH_NORM_WEIGHTS),
    "mnist": onnx.load(MNIST / "mnist_cnn_bn.onnx"),
}


@pytest.mark.parametrize("name", PROTOS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_names_and_orders_do_not_matter(name: str, seed: int) -> None:
    first, second = PROTOS[name], shuffled(PROTOS[name], seed)
    views = [Viewer(models.load(m)).view() for m in (first, second)]
    pairs = match(views[0], views[1])
    assert len(pairs) == len(views[0].layers) == len(views[1].layers)
    ours, theirs = contents(first), contents(second)
    for pair in pairs:
        assert pair.confidence == "exact"
        for a, b in zip(pair.source.leaves(), pair.target.leaves(), strict=True):
            assert ours[a.name or ""] == theirs[b.name or ""]


def stack(layers: int, head: int) -> onnx.ModelProto:
    """Return residual blocks of equal layers under a head."""
    steps, value = [], "x"
    weights: dict[str, tuple[int, ...]] = {"head": (8, head)}
    for i in range(layers):
        weights |= {f"up{i}": (8, 32), f"down{i}": (32, 8), f"scale{i}": (8,), f"shift{i}": (8,)}
        steps.append(
            f"n{i} = LayerNormalization({value}, scale{i}, shift{i})  u{i} = MatMul(n{i}, up{i})  r{i} = Relu(u{i})  "
            f"d{i} = MatMul(r{i}, down{i})  x{i} = Add(d{i}, {value})"
        )
        value = f"x{i}"
    body = "\n".join(steps)
    return build(f"g (float[n, 8] x) => (float[n, {head}] y) {{ {body} y = MatMul({value}, head) }}", weights)


def test_blocks_that_repeat_are_told_apart_under_another_head() -> None:
    first, second = (Viewer(models.load(stack(4, head))).view() for head in (3, 5))
    pairs = match(first, second)
    assert [(p.source.name, p.confidence) for p in pairs] == [(p.target.name, "aligned") for p in pairs]
    assert len(pairs) == 12


def test_a_shorter_stack_takes_a_prefix_and_the_layers_next_to_the_head() -> None:
    """No layer is taken twice, and those that correspond come in the same order."""
    first, second = Viewer(models.load(stack(5, 3))).view(), Viewer(models.load(stack(3, 3))).view()
    pairs = match(first, second)
    sources = [p.source.index for p in pairs]
    assert sources == sorted(set(sources))
    assert "exact" not in {p.confidence for p in pairs}


def test_networks_without_a_common_layer_do_not_match() -> None:
    first, second = (Viewer(models.load(PROTOS[n])).view() for n in ("two layers", "normalization"))
    assert match(first, second) == []
