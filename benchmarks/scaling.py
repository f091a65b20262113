"""Ten times the nodes cost at most 13 times the time; 2.6 GB pass in 6 s and 400 MB.

Usage: python benchmarks/scaling.py [nodes|big]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
from synthetic import big_model, mixed_graph

SIZES = (1_000, 10_000, 100_000)
MAX_FACTOR = 13.0
MAX_SECONDS, MAX_MB = 6.0, 400.0

WORKER = """
import sys, time, onnxopt
source, target, warm = sys.argv[1:]
run = lambda path: onnxopt.save(onnxopt.optimize(path, verify=False, measure=False).model, target)
run(warm)
start = time.perf_counter()
run(source)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(time.perf_counter() - start, peak)
"""


def cost(source: Path, folder: Path) -> tuple[float, float]:
    """Load, optimize and save in a fresh process; return seconds after a warm-up, and peak MB."""
    warm = folder / "warm.onnx"
    onnx.save(mixed_graph(10), warm)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(source), str(folder / "out.onnx"), str(warm)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def scaling(folder: Path) -> bool:
    """Time three sizes of the same kind of graph."""
    print(f"{'nodes':>8} {'seconds':>8} {'factor':>7} {'peak MB':>8}")
    before, met = None, True
    for nodes in SIZES:
        source = folder / f"mixed{nodes}.onnx"
        onnx.save(mixed_graph(nodes), source)
        seconds, peak = min(cost(source, folder) for _ in range(2))
        factor = seconds / before if before else None
        met &= factor is None or factor <= MAX_FACTOR
        print(f"{nodes:8,} {seconds:8.2f} {f'{factor:.1f}' if factor else '':>7} {peak:8.0f}")
        before = seconds
    return met


def big(folder: Path) -> bool:
    """Time the model with 2.6 GB of weights."""
    start = time.perf_counter()
    source = big_model(folder)
    print(
        f"(made {sum(p.stat().st_size for p in folder.glob('big*')) / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s)"
    )
    seconds, peak = cost(source, folder)
    print(f"big: load, lossless passes and save in {seconds:.2f} s with a peak of {peak:.0f} MB")
    return seconds <= MAX_SECONDS and peak <= MAX_MB


def main() -> None:
    """Run what is asked for; exit 1 when a target is missed."""
    wanted = sys.argv[1:] or ["nodes", "big"]
    with tempfile.TemporaryDirectory() as folder:
        results = [{"nodes": scaling, "big": big}[name](Path(folder)) for name in wanted]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
