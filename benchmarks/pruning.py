"""What prune-channels removes from real models, and what that brings.

Usage: python benchmarks/pruning.py [--ratio R] [--latency] [FOLDER or FILE ...]

Looks at every .onnx in the folders (models/ and models/fetched/ by default). Prints for each the part of the parameters
that is gone, how many groups of channels were pruned, dropped by the gate or left alone, and the seconds; with
--latency also the time of the result by that of the original, interleaved.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import onnxopt
from onnxopt.coupling.goals import elements
from onnxopt.errors import OnnxOptError

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Prune every model and print a line each."""
    parser = argparse.ArgumentParser(description="Prune real models.")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "models", ROOT / "models" / "fetched"])
    arguments = parser.parse_args()
    print("| model | parameters gone | groups pruned | dropped | time | seconds |\n|---|---|---|---|---|---|")
    for path in arguments.paths:
        for file in sorted(path.glob("*.onnx")) if path.is_dir() else [path]:
            print(line(file, arguments.ratio, arguments.latency), flush=True)


def line(path: Path, ratio: float, latency: bool) -> str:
    """Prune a model and say in a row of a table what came of it."""
    start = time.perf_counter()
    try:
        result = onnxopt.optimize(path, passes=f"prune-channels{{ratio={ratio}}}", max_error=math.inf, measure=latency)
    except OnnxOptError as error:
        return f"| {path.stem} | {error} |"
    (report,) = result.report.passes[:1]
    gone = 1 - elements(result.model) / elements(onnxopt.load(path))
    measured = result.report.measurement
    ratio_text = "-" if measured is None else f"{measured.ratio:.3f}"
    cells = [path.stem, f"{gone:.1%}", len(report.applied), len(report.dropped), ratio_text]
    for dropped in report.dropped:
        print(f"  {path.stem}: {dropped.site}: {dropped.reason}")
    return f"| {' | '.join(map(str, cells))} | {time.perf_counter() - start:.1f} |"


if __name__ == "__main__":
    main()
