"""What is left of accuracy when channels are removed, before and after the layers that are left are fitted.

    python benchmarks/repair.py [--ratios 0.3 0.5 0.7] [--seeds 5] [--samples 256] [--merge]

Removes channels of the classifiers of `models/`, fits the rest to the original on calibration images without their
labels, and scores the test images. Prints points of accuracy lost, mean and standard deviation over seeds, each with
other images to learn from. Ends with 1 when a mean is worse than `ALLOWED`. --merge sums up channels that do nearly the
same instead (merge-channels), by the images, and by the weights alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

import onnxopt
from onnxopt import manager
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import Context
from onnxopt.pipeline import Pipeline
from onnxopt.runtime import RunOptions, evaluate_node, open_session

MODELS = Path(__file__).parent.parent / "models"
ALLOWED = {0.3: 0.6, 0.5: 1.5, 0.7: 5.0}
"""Ratio of the channels that go -> points of accuracy that may be lost."""


def main() -> int:
    """Prune, repair, score, and print a table."""
    parser = argparse.ArgumentParser(description="Accuracy after pruning and repair.")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(ALLOWED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--merge", action="store_true", help="merge channels instead, which repairs nothing behind them"
    )
    arguments = parser.parse_args()
    if arguments.merge:
        merge(arguments)
        return 0
    print("| model | channels removed | importance | not repaired | repaired | seconds |\n|---|---|---|---|---|---|")
    missed = False
    for name in ("mnist_cnn", "mnist_cnn_bn"):
        original = onnxopt.load(MODELS / f"{name}.onnx")
        before = accuracy(original)
        for ratio in arguments.ratios:
            for importance in ("magnitude", "activation", "loss"):
                options = f"ratio={ratio},importance={importance}"
                plain, _ = runs(original, f"prune-channels{{{options},repair=false}}", arguments, arguments.samples)
                fitted, seconds = runs(original, f"prune-channels{{{options}}}", arguments, arguments.samples)
                lost = [100 * (before - score) for score in fitted]
                unrepaired = 100 * (before - statistics.mean(plain))
                cells = f"{unrepaired:.1f} | {spread(lost)} | {seconds:.1f}"
                print(f"| {name} | {ratio:.0%} | {importance} | {cells} |", flush=True)
                missed |= statistics.mean(lost) > ALLOWED.get(ratio, 100)
    return int(missed)


def merge(arguments: argparse.Namespace) -> None:
    """Merge channels, score, and print a table."""
    print(
        "| model | channels removed | pruned by norm, not repaired | merged | merged by weights |\n|---|---|---|---|---|"
    )
    for name in ("mnist_cnn", "mnist_cnn_bn"):
        original = onnxopt.load(MODELS / f"{name}.onnx")
        before = accuracy(original)
        for ratio in arguments.ratios:
            cells = []
            for passes, images in (
                (f"prune-channels{{ratio={ratio},repair=false}}", arguments.samples),
                (f"merge-channels{{ratio={ratio}}}", arguments.samples),
                (f"merge-channels{{ratio={ratio}}}", 0),
            ):
                scores, _ = runs(original, passes, arguments, images)
                cells.append(spread([100 * (before - score) for score in scores]))
            print(f"| {name} | {ratio:.0%} | {' | '.join(cells)} |", flush=True)


def runs(original: ir.Model, passes: str, arguments: argparse.Namespace, images_each: int) -> tuple[list[float], float]:
    """Return the accuracy for each seed, and the longest time it took; without images, nothing is learnt from any."""
    images = np.load(MODELS / "mnist_calibration.npz")["image"]
    scores, longest = [], 0.0
    for seed in range(arguments.seeds):
        chosen = np.random.default_rng(seed).choice(len(images), images_each, replace=False)
        data = calibration([{"image": images[i : i + 1]} for i in chosen], real=True) if images_each else None
        ctx = Context(target="portable", seed=seed, evaluate=evaluate_node, shapes=Shapes(original), calibration=data)
        start = time.perf_counter()
        pruned = manager.run(original, Pipeline.parse(passes).passes, ctx).model
        longest = max(longest, time.perf_counter() - start)
        scores.append(accuracy(pruned))
    return scores, longest


def accuracy(model: ir.Model) -> float:
    """Return the part of the test images that a model classifies rightly."""
    with open_session(model, RunOptions(), optimized=True) as session:
        (scores,) = session.run({"image": np.load(MODELS / "mnist_test.npz")["image"]}).values()
    return float((scores.argmax(axis=1) == np.load(MODELS / "mnist_test_labels.npy")).mean())


def spread(numbers: list[float]) -> str:
    """Return mean and standard deviation in words."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    sys.exit(main())
