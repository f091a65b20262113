"""A/A: how often does measuring a model against itself call a difference?

    python benchmarks/aa.py [MODEL ...] [--comparisons 200] [--budget 2]

Prints one line per model and one with the figure for all. Ends with 1 when more than 5% call one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onnxopt import feeds
from onnxopt import model as models
from onnxopt.measure import measure
from onnxopt.runtime import open_session

ALLOWED = 0.05
MODELS = Path(__file__).parent.parent / "models"


def compare(path: Path, comparisons: int, budget_seconds: float) -> list[float]:
    """Return the ratios of the comparisons that call a difference."""
    model = models.load(path)
    with open_session(model, optimized=True) as session:
        feed = feeds.generate_runnable(model, session.run, sets=1)[0]
    called = []
    for number in range(comparisons):
        result = measure(model, model, feed=feed, budget_seconds=budget_seconds, seed=number, memory=False)
        if result.verdict != "no difference shown":
            called.append(result.ratio)
    found = "".join(f" {ratio:.3f}" for ratio in called)
    print(f"{path.name}: {len(called)} of {comparisons} call a difference{':' if called else ''}{found}", flush=True)
    return called


def main() -> int:
    """Compare every model with itself and print the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="model files; those in models/ by default")
    parser.add_argument("--comparisons", type=int, default=200, help="in all, shared among the models")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per comparison")
    args = parser.parse_args()
    paths = args.models or sorted(MODELS.glob("**/*.onnx"))
    if not paths:
        parser.error(f"there are no models in {MODELS}; name some")
    shares = [args.comparisons // len(paths) + (i < args.comparisons % len(paths)) for i in range(len(paths))]
    called = [r for path, share in zip(paths, shares, strict=True) for r in compare(path, share, args.budget)]
    rate = len(called) / args.comparisons
    print(
        f"A/A: {len(called)} of {args.comparisons} comparisons of a model with itself call a difference "
        f"({rate:.1%}, allowed {ALLOWED:.0%})"
    )
    return int(rate > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
