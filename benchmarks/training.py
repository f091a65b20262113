"""Does torch compute what ONNX Runtime computes, and can real models be trained?

    python benchmarks/training.py [--backend] [FOLDER or FILE ...]

For every .onnx in the folders (models/ and models/fetched/ by default): how far torch is from the runtime, as a fraction
of the output's range; how many parameters there are; and whether a step against the gradient brings its scores (its first
floating-point output, before a final softmax) nearer to others that were drawn at random around them. With --backend also every test of the onnx package that both can run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

import onnxopt
from onnxopt import runtime
from onnxopt.analysis.task import main_output
from onnxopt.errors import OnnxOptError
from onnxopt.feeds import Feed, generate_runnable
from onnxopt.runtime import RunOptions
from onnxopt.training.forward import agreement, distance
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.objective import scores_before
from onnxopt.training.parameters import find_parameters

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Print a line for every model."""
    parser = argparse.ArgumentParser(description="Run real models in torch.")
    parser.add_argument("--backend", action="store_true")
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "models", ROOT / "models" / "fetched"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | deviation | allowed | parameters | a step lowers the loss | seconds |\n|---|---|---|---|---|---|")
    for path in arguments.paths:
        for file in sorted(path.glob("*.onnx")) if path.is_dir() else [path]:
            print(line(file), flush=True)
    if arguments.backend:
        backend()


def line(path: Path) -> str:
    """Run a model in torch, train it one step, and say in a row of a table what came of it."""
    start = time.perf_counter()
    try:
        model = onnxopt.load(path)
        with runtime.open_session(model, optimized=False) as session:
            feeds = generate_runnable(model, session.run, sets=1)
        interpreter = Interpreter(model, runtime.evaluate_node)
        found = agreement(model, interpreter, feeds, RunOptions())
        count, learns = step(model, interpreter, feeds[0])
    except OnnxOptError as error:
        return f"| {path.stem} | {error} |"
    outside = f", {len(interpreter.outside)} nodes by the runtime" if interpreter.outside else ""
    cells = (path.stem, f"{found.worst:.1e}{outside}", f"{found.allowed:.1e}", f"{count:,}", learns)
    return f"| {' | '.join(cells)} | {time.perf_counter() - start:.1f} |"


def step(model: ir.Model, interpreter: Interpreter, feed: Feed) -> tuple[int, str]:
    """Return how many numbers can be trained, and whether a small step down the gradient makes the loss smaller."""
    leaves = {name: p.initial.requires_grad_() for name, p in find_parameters(model).items()}
    value = main_output(model)
    count = sum(leaf.numel() for leaf in leaves.values())
    if not leaves or value is None or value.name is None:
        return count, "no parameters"
    name, _ = scores_before(model, value)
    with torch.no_grad():
        start = interpreter.run(feed, leaves, [name])[name].double()
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(start.shape)))
    wanted = start + (float(start.abs().mean()) or 1.0) * noise

    def loss() -> torch.Tensor:
        return ((interpreter.run(feed, leaves, [name])[name].double() - wanted) ** 2).mean()

    before = loss()
    if not before.requires_grad:
        return count, "no gradient"
    gradients = torch.autograd.grad(before, list(leaves.values()), allow_unused=True)
    reached = [(leaf, g) for leaf, g in zip(leaves.values(), gradients, strict=True) if g is not None]
    square = sum(float((g.double() ** 2).sum()) for _, g in reached)
    if square == 0:
        return count, "the gradient is zero"
    with torch.no_grad():
        for part in (1e-2, 1e-3, 1e-4, 1e-5):
            # by the first order, such a step takes this part of the loss away
            size = part * float(before.detach()) / square
            for leaf, gradient in reached:
                leaf -= size * gradient
            after = float(loss())
            for leaf, gradient in reached:
                leaf += size * gradient
            if abs(after - float(before.detach())) < 1e-6 * float(before.detach()):
                return count, "the output does not depend on them"
            if after < float(before.detach()):
                return count, f"yes, {len(reached)} of {len(leaves)} tensors"
    return count, "no"


def backend() -> None:
    """Compare all tests of the onnx package, and print what differs."""
    sys.path.insert(0, str(Path(__file__).parent))
    import backend as tests

    same, unable, different = 0, 0, []
    for name, proto, inputs in tests._tests():
        feed = dict(zip((i.name for i in proto.graph.input), inputs, strict=False))
        try:
            model = onnxopt.load(proto)
            with runtime.open_session(model, optimized=False) as session:
                expected = session.run(feed)
            with torch.no_grad():
                found = Interpreter(model).run(feed)
        except OnnxOptError:
            unable += 1
            continue
        worst = max((_apart(found[n], value) for n, value in expected.items()), default=0.0)
        same += worst < 1e-3
        different += [] if worst < 1e-3 else [f"{name} ({worst:.2g})"]
    print(
        f"{same} tests of the onnx package agree, {unable} cannot be run by both, {len(different)} differ: {different}"
    )


def _apart(ours: object, theirs: object) -> float:
    """Return the distance, where the runtime hides by the smallest number instead of by minus infinity."""
    if isinstance(theirs, np.ndarray) and theirs.dtype.kind == "f":
        theirs = np.where(theirs < -1e38, -np.inf, theirs)
        if theirs.dtype.itemsize == 2 and isinstance(ours, torch.Tensor):
            ours = ours.half()
    return distance(ours, theirs)


if __name__ == "__main__":
    main()
