"""A sample of what benchmarks/backend.py checks in full, and that it would notice."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxopt
from onnxopt import model as models

SAMPLE = 200


@pytest.fixture(scope="module")
def backend():
    path = Path(__file__).parent.parent / "benchmarks" / "backend.py"
    spec = importlib.util.spec_from_file_location("backend", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["backend"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["backend"]


@pytest.fixture(scope="module")
def variants(backend):
    return list(backend.variants())


@pytest.mark.parametrize("target", ["portable", "cpu"])
def test_a_sample_of_the_backend_tests_passes(backend, variants, tmp_path, target):
    chosen = random.Random(0).sample(variants, SAMPLE)
    findings = {v.name: backend.check(v, target, tmp_path) for v in chosen}
    assert {name: f.failures for name, f in findings.items() if f.failures} == {}
    assert sum(f.ran for f in findings.values()) > SAMPLE / 2
    assert any(f.edits for f in findings.values())


def test_variants_make_inputs_constant(backend, variants):
    found = {v.name: v for v in variants if v.name.startswith("test_add (")}
    free = {form: [i.name for i in found[f"test_add ({form})"].model.graph.input] for form in backend.FORMS}
    assert free == {"as shipped": ["x", "y"], "first input free": ["x"], "all constant": []}
    assert all(sorted(v.feed) == sorted(i.name for i in v.model.graph.input) for v in found.values())
    assert len(variants) > 5000


def variant(backend):
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { a = Identity(x) y = Exp(a) }'
    return backend.Variant("made", onnx.parser.parse_model(text), {"x": np.array([1, 2], np.float32)})


def spoiled(spoil):
    """An optimize that does something to every result."""
    optimize = onnxopt.optimize

    def run(*args, **kwargs):
        result = optimize(*args, **kwargs)
        spoil(result.model)
        return result

    return run


def test_other_outputs_are_noticed(backend, monkeypatch, tmp_path):
    def spoil(model):
        for node in model.graph:
            node.op_type = "Abs"

    assert backend.check(variant(backend), "portable", tmp_path).failures == ()
    monkeypatch.setattr(onnxopt, "optimize", spoiled(spoil))
    failures = backend.check(variant(backend), "portable", tmp_path).failures
    assert any('output "y" deviates' in f for f in failures)


def test_other_bytes_are_noticed(backend, monkeypatch, tmp_path):
    numbers = iter(range(9))

    def spoil(model):
        model.doc_string = str(next(numbers))

    monkeypatch.setattr(onnxopt, "optimize", spoiled(spoil))
    failures = backend.check(variant(backend), "portable", tmp_path).failures
    assert failures == ("two runs give different bytes", "a second run makes 0 more edits")


def test_a_changed_output_is_noticed_without_running(backend, monkeypatch, tmp_path):
    made = variant(backend)
    made.model.graph.node[1].op_type = "Unheard"

    def spoil(model):
        model.graph.outputs[0].name = "z"

    monkeypatch.setattr(onnxopt, "optimize", spoiled(spoil))
    found = backend.check(made, "portable", tmp_path)
    assert not found.ran
    assert 'the output "y" is missing' in found.failures


def test_a_crash_is_noticed(backend, monkeypatch, tmp_path):
    def save(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(models, "save", save)
    assert backend.check(variant(backend), "portable", tmp_path).failures == ("ValueError: no",)
