"""What distillation gives back to a pruned model, from 256 unlabelled images.

    python benchmarks/distillation.py [--seeds 5] [--epochs 20] [--ratios 0.5 0.7] [--model models/mnist_cnn.onnx]

For each seed, 256 of the calibration images of models/ are drawn, whose labels are not looked at. The channels go with
prune-channels, which fits what is left to the same images, and the pruned model then learns from the original. Prints the
accuracy on the 1,000 test images, which nothing else has seen, and per ratio the mean of the points lost and its spread
over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import onnxopt
from onnxopt.runtime import open_session

MODELS = Path(__file__).parent.parent / "models"
IMAGES = 256


def main() -> None:
    """Distill for every seed and ratio, and print a line each."""
    parser = argparse.ArgumentParser(description="Distill pruned models.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--model", type=Path, default=MODELS / "mnist_cnn.onnx")
    arguments = parser.parse_args()
    original = onnxopt.load(arguments.model)
    whole = accuracy(original)
    images = np.load(MODELS / "mnist_calibration.npz")["image"]
    lost: dict[float, list[float]] = {ratio: [] for ratio in arguments.ratios}
    for seed in range(arguments.seeds):
        chosen = np.random.default_rng(seed).permutation(len(images))[:IMAGES]
        for ratio in arguments.ratios:
            student = pruned(arguments.model, ratio, images[chosen])
            start = time.perf_counter()
            found = onnxopt.distill(
                original,
                student,
                {"image": images[chosen]},
                epochs=arguments.epochs,
                learning_rate=5e-4,
                shift=2,
                seed=seed,
            )
            after = accuracy(found.model)
            lost[ratio].append(100 * (whole - after))
            seconds = time.perf_counter() - start
            print(
                f"{ratio:.0%} of the channels, seed {seed}: {whole:.1%}, pruned {accuracy(student):.1%}, distilled "
                f"{after:.1%} (epoch {found.best}), {lost[ratio][-1]:.1f} points lost, {seconds:.0f} s",
                flush=True,
            )
    for ratio, points in lost.items():
        spread = statistics.stdev(points) if len(points) > 1 else math.nan
        print(
            f"{ratio:.0%}: {statistics.mean(points):.2f} points lost, standard deviation {spread:.2f}, n={len(points)}"
        )


def pruned(path: Path, ratio: float, images: np.ndarray) -> ir.Model:
    """Return the model without this part of its channels, exactly so many, and what is left fitted to the images."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "images.npz", image=images)
        passes = f"prune-channels{{ratio={ratio},multiple=1}}"
        options: dict[str, Any] = {"data": Path(folder) / "images.npz", "max_error": math.inf}
        return onnxopt.optimize(path, passes=passes, measure=False, verify=False, **options).model


def accuracy(model: ir.Model) -> float:
    """Return the share of the test images that a model classifies right."""
    images, labels = np.load(MODELS / "mnist_test.npz")["image"], np.load(MODELS / "mnist_test_labels.npy")
    with open_session(model, optimized=True) as session:
        (scores,) = session.run({"image": images}).values()
    return float((np.argmax(scores, axis=1) == labels).mean())


if __name__ == "__main__":
    main()
