"""Training elsewhere than on the processor, with a device that is made up: it takes no tensor of the processor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from onnxopt.errors import UsageError
from onnxopt.training import devices
from onnxopt.training.finetune import finetune
from onnxopt.training.parameters import find_parameters

Blobs = tuple[dict[str, np.ndarray], np.ndarray]
MODELS = Path(__file__).parent.parent.parent / "models"
MADE_UP = torch.device("meta")
"""Its own kernels compute nothing, and are never reached."""


COMPUTING = devices.computing


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the made-up device; what it holds is on the processor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=MADE_UP
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class MadeUpDevice(TorchDispatchMode):
    """Makes tensors on the made-up device where they are asked for there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class FilledTensors(TorchFunctionMode):
    """Fills what torch.tensor makes, which it leaves empty on the device that stands in for the made-up one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tensor:
            return function(*args, **{**(kwargs or {}), "device": "cpu"}).to(torch.get_default_device())
        return function(*args, **(kwargs or {}))


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = any(isinstance(each, Elsewhere) for each in given)
    wanted = kwargs.get("device")
    copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    if there and not copies:
        here = [each for each in given if not isinstance(each, Elsewhere) and each.ndim > 0]
        assert not here, f"{function} is given tensors of both devices"
    if wanted is not None:
        there = torch.device(wanted) == MADE_UP
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda each: each.held if isinstance(each, Elsewhere) else each, (args, kwargs))
    found = function(*args, **kwargs)
    if function.overloadpacket is torch.ops.aten.copy_:
        return given[0]
    return tree_map(lambda each: Elsewhere(each) if isinstance(each, torch.Tensor) else each, found) if there else found


@contextlib.contextmanager
def made_up(device: str, threads: int) -> Iterator[None]:
    assert device == "cuda"
    with COMPUTING("cpu", threads), MadeUpDevice(), MADE_UP, FilledTensors():
        yield


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: p.tensor.numpy() for name, p in find_parameters(model).items()}


@pytest.mark.parametrize("batchnorm", ["frozen", "restored"])
def test_training_elsewhere_gives_the_same_and_nothing_stays_behind(
    network: onnx.ModelProto, blobs: Blobs, batchnorm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 4, "learning_rate": 0.02, "noise": 0.1, "mix": 0.3, "batchnorm": batchnorm}
    here = finetune(network, *blobs, **options)
    monkeypatch.setattr(devices, "computing", made_up)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = finetune(network, *blobs, **options, device="cuda", checkpoint=tmp_path / "run.safetensors")
    again = finetune(network, *blobs, **options, device="cuda", checkpoint=tmp_path / "run.safetensors")
    assert again.resumed == 4
    for found in (there, again):
        assert all(np.array_equal(array, weights(here.model)[name]) for name, array in weights(found.model).items())
        assert [(e.number, e.key) for e in found.epochs] == [(e.number, e.key) for e in here.epochs]


def test_images_are_moved_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.load(MODELS / "mnist_calibration.npz")["image"][:40]
    labels = np.load(MODELS / "mnist_calibration_labels.npy")[:40]
    options: dict[str, Any] = {"epochs": 1, "shift": 2, "validation": 0}
    here = finetune(MODELS / "mnist_cnn_bn.onnx", {"image": images}, labels, **options)
    monkeypatch.setattr(devices, "computing", made_up)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = finetune(MODELS / "mnist_cnn_bn.onnx", {"image": images}, labels, **options, device="cuda")
    assert all(np.array_equal(array, weights(here.model)[name]) for name, array in weights(there.model).items())


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (None, "device cuda cannot be used: torch .* was built without CUDA"),
        ("12.8", "torch finds no GPU that it can use"),
    ],
)
def test_without_cuda_what_is_missing_is_told(
    network: onnx.ModelProto, blobs: Blobs, built: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        finetune(network, *blobs, device="cuda")
    with pytest.raises(UsageError, match='device must be cpu or cuda, not "tpu"'):
        finetune(network, *blobs, device="tpu")


def test_settings_of_torch_are_as_before_afterwards() -> None:
    def now() -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn
        return (
            torch.are_deterministic_algorithms_enabled(),
            cudnn.deterministic,
            cudnn.allow_tf32,
            torch.get_num_threads(),
        )

    before = now()
    with devices.computing("cuda", 2):
        assert now() == (True, True, False, 2)
    assert now() == before
