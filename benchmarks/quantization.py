"""What the search makes of a model within a budget, beside ONNX Runtime's own quantization, all timed in turns.

    python benchmarks/quantization.py [MODEL LEARN.npz FRESH.npz] [--max-drop 1.5%] [--metric M] [--judge M ...]
    python benchmarks/quantization.py MODEL LEARN.npz FRESH.npz --passes quantize-weights "quantize-weights{mode=float8}"
    python benchmarks/quantization.py MODEL --generated 16 --max-error inf

Without a model, it is the MNIST CNN of models/ with its 500 labelled images, judged by its 1,000 test images. The search
learns from LEARN and decides by it; nothing but the judging sees FRESH. ONNX Runtime's tools learn from LEARN, with their
defaults. --passes asks for pipelines instead of the search (the lossless recipe runs before them). --generated makes
inputs, so that speed alone counts. --judge takes the metrics of onnxopt, and

    neighbour   share of samples whose nearest other sample, by the cosine of the outputs' means over all but the last
                axis, is the same as the original's
    iou         overlap of what lies above --threshold in both outputs, by what lies above it in one: text masks
    error       root of the mean square of the deviation by that of the original's output

Speeds are of the first sample of --timed (of FRESH by default): the fastest run of each round, median of rounds, in which all
models take turns in an order that changes. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import ort_forms

import onnxopt
from onnxopt import feeds as feeding
from onnxopt import metrics
from onnxopt.errors import OnnxOptError
from onnxopt.feeds import Data, Feed, load_data, load_labels
from onnxopt.metrics import main_output
from onnxopt.pipeline import Pipeline
from onnxopt.runtime import open_session
from onnxopt.timing import stopwatch

MODELS = Path(__file__).parent.parent / "models"
MNIST = (MODELS / "mnist_cnn.onnx", MODELS / "mnist_calibration.npz", MODELS / "mnist_test.npz")
MNIST_LABELS = (MODELS / "mnist_calibration_labels.npy", MODELS / "mnist_test_labels.npy")
TOOLS = {"quantize_dynamic": "ort dynamic", "quantize_static": "ort QDQ"}

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]


def neighbour(pairs: Pairs) -> float:
    """Return the share of samples whose nearest other sample is the same in both models."""
    sides = [
        np.stack([side.reshape(-1, side.shape[-1]).mean(axis=0) for side in one]) for one in zip(*pairs, strict=True)
    ]
    nearest = []
    for rows in sides:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        near = unit @ unit.T
        np.fill_diagonal(near, -np.inf)
        nearest.append(near.argmax(axis=1))
    return float((nearest[0] == nearest[1]).mean())


def iou(pairs: Pairs, threshold: float) -> float:
    """Return the mean overlap of the masks of both models."""
    masks = [(one > threshold, two > threshold) for one, two in pairs]
    return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in masks]))


def error(pairs: Pairs) -> float:
    """Return the root of the mean square of the deviation, by that of the original's output."""
    lost = sum(float(((one - two) ** 2).sum()) for one, two in pairs)
    return math.sqrt(lost / sum(float((one**2).sum()) for one, _ in pairs))


class Judge:
    """Says how good models are on samples that nothing saw."""

    def __init__(self, original: ir.Model, data: Data, labels: np.ndarray | None, threshold: float) -> None:
        self._original, self._data, self._labels, self._threshold = original, data, labels, threshold
        self._outputs = self._run(original)

    def _run(self, model: ir.Model | Path) -> list[np.ndarray]:
        with open_session(onnxopt.load(model), optimized=True) as session:
            return [main_output(session.run(feed)) for feed in self._data]

    def score(self, model: ir.Model | Path, metric: str) -> float:
        """Return a metric of a model."""
        own: dict[str, Callable[[Pairs], float]] = {
            "neighbour": neighbour,
            "iou": lambda pairs: iou(pairs, self._threshold),
            "error": error,
        }
        if metric in own:
            return own[metric](list(zip(self._outputs, self._run(model), strict=True)))
        return metrics.evaluate(self._original, onnxopt.load(model), self._data, self._labels, metric).candidate


def in_turns(models: dict[str, ir.Model | Path], feed: Feed, budget_seconds: float) -> dict[str, float]:
    """Return how many times as fast as the first each model is; all are timed in rounds, in an order that changes."""
    random, found = np.random.default_rng(0), {name: list[float]() for name in models}
    with contextlib.ExitStack() as stack:
        runs: dict[str, stopwatch.Run] = {}
        for name, model in models.items():
            session = stack.enter_context(open_session(onnxopt.load(model), optimized=True))
            runs[name] = lambda s=session: s.run(feed)
        counts = {name: stopwatch.repetitions(run) for name, run in runs.items()}
        end = time.perf_counter() + budget_seconds
        while time.perf_counter() < end or len(found[next(iter(found))]) < 5:
            for name in random.permutation(list(runs)):
                found[name].append(min(stopwatch.timing(runs[name], counts[name])))
    first = found[next(iter(found))]
    return {name: statistics.median(a / b for a, b in zip(first, each, strict=True)) for name, each in found.items()}


def searched(model: ir.Model, learn: Data, labels: np.ndarray | None, arguments: argparse.Namespace) -> onnxopt.Result:
    """Return what the search finds within the budget."""
    return onnxopt.optimize(
        model,
        target=arguments.target,
        data=learn,
        labels=None if arguments.max_drop is None else labels,
        max_drop=arguments.max_drop,
        max_error=arguments.max_error,
        metric=arguments.metric,
        objective=arguments.objective,
        opset=arguments.opset,
        prune=arguments.prune,
    )


def candidates(
    path: Path, learn: Data, labels: np.ndarray | None, folder: Path, arguments: argparse.Namespace
) -> dict[str, ir.Model | Path]:
    """Return the original and what can be made of it; print why something cannot."""
    model = onnxopt.load(path)
    found: dict[str, ir.Model | Path] = {"original": model}
    lossless = Pipeline.recipe("lossless")
    for passes in arguments.passes:
        pipeline = f"{lossless},{passes}"
        options: dict[str, Any] = {"target": arguments.target, "data": learn, "max_error": math.inf}
        options["opset"] = arguments.opset
        result = onnxopt.optimize(model, passes=pipeline, measure=False, verify=False, **options)
        for done in result.report.passes:
            if done.status != "kept" and done.spec in passes:
                why = done.reason or next((reason for reason, _ in done.refusals), "nothing to do")
                print(f"{done.spec}: {done.status}, {why}")
        found[passes] = result.model
    if not arguments.passes:
        result = searched(model, learn, labels, arguments)
        assert result.report.search is not None
        found[f"search: {result.report.search.winner.name}"] = result.model
    for name, form in TOOLS.items() if arguments.tools else ():
        file = folder / f"{name}.onnx"
        why = ort_forms.made(form, path, file, learn)
        if why:
            print(f"{name}: {why}")
        else:
            found[name] = file
    return found


def bytes_of(model: ir.Model | Path, folder: Path) -> int:
    """Return the size of a model, saved."""
    file = folder / "size.onnx"
    onnxopt.save(onnxopt.load(model), file)
    return sum(f.stat().st_size for f in folder.glob("size.onnx*"))


def generated(path: Path, count: int) -> Data:
    """Return inputs that a model runs with."""
    model = onnxopt.load(path)
    with open_session(model, optimized=True) as session:
        feeds = feeding.generate_runnable(model, session.run, sets=count)
    return Data("generated", lambda: iter(feeds), len(feeds))


def fraction(text: str) -> float:
    """Return a number or a percentage as a fraction of one."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def parsed() -> argparse.Namespace:
    """Read the command line; without a model it is about the MNIST CNN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("learn", nargs="?", type=Path)
    parser.add_argument("fresh", nargs="?", type=Path)
    parser.add_argument("--labels", type=Path, help="of LEARN")
    parser.add_argument("--fresh-labels", type=Path, help="of FRESH")
    parser.add_argument("--timed", type=Path, help="speeds are of the first sample of this file")
    parser.add_argument("--generated", type=int, default=0, help="so many generated inputs instead of LEARN and FRESH")
    parser.add_argument("--max-drop", type=fraction)
    parser.add_argument("--max-error", type=fraction)
    parser.add_argument("--metric", help="of --max-drop")
    parser.add_argument("--judge", nargs="+", help="metrics on FRESH (default: that of --metric, and error)")
    parser.add_argument("--threshold", type=float, default=0.3, help="of iou")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--opset", type=int, help="convert to it first")
    parser.add_argument("--objective", default="latency")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--passes", nargs="+", default=[], help="these instead of the search")
    parser.add_argument("--no-tools", dest="tools", action="store_false", help="without ONNX Runtime's own tools")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, in all")
    arguments = parser.parse_args()
    if arguments.model is None:
        arguments.model, arguments.learn, arguments.fresh = MNIST
        arguments.labels, arguments.fresh_labels = MNIST_LABELS
        arguments.metric = arguments.metric or "top1"
        if arguments.max_drop is None and arguments.max_error is None:
            arguments.max_drop = 0.015
    elif not arguments.generated and arguments.fresh is None:
        parser.error("name the samples to learn from and fresh ones that judge, or give --generated")
    elif not arguments.passes and arguments.max_drop is None and arguments.max_error is None:
        parser.error("give the search a budget: --max-drop or --max-error")
    arguments.judge = arguments.judge or [*([arguments.metric] if arguments.metric else []), "error"]
    return arguments


def main() -> None:
    """Make, judge and time everything, and print a table."""
    arguments = parsed()
    path = arguments.model
    model = onnxopt.load(path)
    made = generated(path, arguments.generated) if arguments.generated else None
    learn = load_data(str(arguments.learn), model) if made is None else made
    fresh = load_data(str(arguments.fresh), model) if made is None else made
    labels, truth = (None if f is None else load_labels(f) for f in (arguments.labels, arguments.fresh_labels))
    timed = fresh if arguments.timed is None else load_data(str(arguments.timed), model)
    judge = Judge(model, fresh, truth, arguments.threshold)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = candidates(path, learn, labels, folder, arguments)
        speeds = in_turns(found, next(iter(timed)), arguments.seconds)
        before = bytes_of(model, folder)
        head = ["model", "speed", "smaller", *arguments.judge]
        print(f"{path.stem}, {len(learn)} samples to learn from, {len(fresh)} that judge")
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for title, each in found.items():
            scores = [f"{judge.score(each, metric):.4f}" for metric in arguments.judge]
            cells = [title, f"{speeds[title]:.2f}x", f"{before / bytes_of(each, folder):.2f}x", *scores]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except OnnxOptError as failure:
        sys.exit(str(failure))
