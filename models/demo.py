"""The main job on the MNIST CNN: optimize it twice, and count right answers before and after.

    python models/demo.py

First without loss, then with 8-bit weights, where the accuracy on the calibration images may drop by 1% at
most. The table is about the test images, which neither run has seen. Writes to out/ of the current folder.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from rich import box
from rich.console import Console
from rich.table import Table

MODELS = Path(os.path.relpath(Path(__file__).parent))  # relative, so that the commands read well
OUT = Path("out")
PASSES = "fold-constants,remove-identities,fuse-conv-bn,quantize-weights,remove-dead-code"


def optimize(*arguments: str | Path) -> None:
    """Show and run `onnxopt optimize`; end the demo with its exit code if it fails."""
    words = ["onnxopt", "optimize", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}\n", flush=True)
    # -P: the installed package, not a folder of that name in the current one.
    code = subprocess.run([sys.executable, "-P", "-m", *words]).returncode
    if code:
        raise SystemExit(code)


def right_answers(model: Path) -> tuple[int, int]:
    """Return how many test images the model classifies rightly, and how many there are."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with np.load(MODELS / "mnist_test.npz", allow_pickle=False) as data:
        images = data["image"]
    labels = np.load(MODELS / "mnist_test_labels.npy", allow_pickle=False)
    logits = [session.run(["logits"], {"image": images[i : i + 100]})[0] for i in range(0, len(images), 100)]
    return int((np.concatenate(logits).argmax(axis=1) == labels).sum()), len(labels)


def main() -> None:
    """Run both optimizations, then print the table."""
    OUT.mkdir(exist_ok=True)
    before = MODELS / "mnist_cnn_bn.onnx"
    lossless, lossy = OUT / "mnist_cnn_bn.onnx", OUT / "mnist_cnn_8bit.onnx"
    data, labels = MODELS / "mnist_calibration.npz", MODELS / "mnist_calibration_labels.npy"
    optimize(before, "-o", lossless, "--data", data, "--report", OUT / "report.json")
    budget = ("--max-drop", "1%", "--metric", "top1", "--labels", labels)
    optimize(before, "-o", lossy, "--data", data, "--passes", PASSES, *budget, "--report", OUT / "report_8bit.json")

    table = Table("Model", box=box.SIMPLE_HEAD)
    for heading in ("Right answers", "Accuracy", "Nodes", "Bytes"):
        table.add_column(heading, justify="right")
    for name, path in (("before", before), ("lossless", lossless), ("8-bit weights", lossy)):
        right, images = right_answers(path)
        nodes, size = len(onnx.load(path).graph.node), path.stat().st_size
        table.add_row(name, f"{right:,} of {images:,}", f"{right / images:.1%}", str(nodes), f"{size:,}")
    print("\nOn the test images")
    Console().print(table)


if __name__ == "__main__":
    main()
