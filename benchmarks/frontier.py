"""What pruning costs at several speeds, beside quantization alone and with both.

    python benchmarks/frontier.py MODEL LEARN.npz FRESH.npz [--timed ONE.npz] [--left 0.9 0.8] [--blocks 1 2]

Channels, heads and neurons go by importance=loss, to parts of the original's time, and residual blocks by prune-layers. All
is repaired on LEARN, and the lossless passes for cpu run behind it. Prints the speed of each, timed in turns with the
original on the first sample of --timed (of FRESH by default), and what metrics say on FRESH.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

import onnxopt
from onnxopt import manager, metrics
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import Context
from onnxopt.feeds import Data, Feed, load_data
from onnxopt.measure import measure
from onnxopt.pipeline import Pipeline
from onnxopt.runtime import RunOptions, evaluate_node


def main() -> None:
    """Build, time and judge, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("learn", type=Path)
    parser.add_argument("fresh", type=Path)
    parser.add_argument("--timed", type=Path)
    parser.add_argument("--left", nargs="*", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--blocks", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--metrics", nargs="*", default=["spearman", "cosine"])
    arguments = parser.parse_args()
    model = onnxopt.load(arguments.model)
    fresh = load_data(str(arguments.fresh), model)
    feed = next(iter(fresh if arguments.timed is None else load_data(str(arguments.timed), model)))
    learn = load_data(str(arguments.learn), model)
    print(f"| what is done | speed | {' | '.join(arguments.metrics)} |\n|---|---|{'---|' * len(arguments.metrics)}")
    for name, passes in pipelines(arguments.left, arguments.blocks):
        result = run(model, passes, learn, feed)
        speed = 1 / measure(model, result, feed=feed, memory=False).ratio
        found = [metrics.evaluate(model, result, fresh, None, metric) for metric in arguments.metrics]
        print(f"| {name} | {speed:.2f}x | {' | '.join(f'{one.candidate:.3f}' for one in found)} |", flush=True)


def pipelines(left: list[float], blocks: list[int]) -> Iterator[tuple[str, str]]:
    """Yield what is done, in words and as a pipeline."""
    lossless = str(Pipeline.recipe("lossless"))
    int8 = f"{lossless},smooth-activations,quantize-dynamic,quantize-static,quantize-weights"
    yield "lossless", lossless
    yield "int8", int8
    pruned = [
        (f"channels, to {part:.0%} of the time", f"prune-channels{{latency={part},importance=loss}}") for part in left
    ]
    pruned += [(f"blocks left out: {count}", f"prune-layers{{count={count}}}") for count in blocks]
    for name, passes in pruned:
        yield name, f"{passes},{lossless}"
        yield f"{name}, int8 behind it", f"{passes},{int8}"


def run(model: ir.Model, passes: str, learn: Data, feed: Feed) -> ir.Model:
    """Run passes that learn from data, and time models on a sample."""
    times: dict[str, float] = {}

    def timed(key: str, make: Callable[[], ir.Model]) -> float:
        if key not in times:
            times[key] = measure(model, make(), feed=feed, budget_seconds=3.0, precision=0.05, memory=False).ratio
        return times[key]

    ctx = Context(
        target="cpu",
        seed=0,
        evaluate=evaluate_node,
        shapes=Shapes(model),
        calibration=calibration(learn, RunOptions(), real=True),
        timed=timed,
    )
    return manager.run(model, Pipeline.parse(passes).passes, ctx).model


if __name__ == "__main__":
    main()
