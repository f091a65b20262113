"""The lossless recipe on real models: nodes saved, nodes executed, size, seconds, memory.

Usage: python benchmarks/lossless.py [--latency] [FOLDER ...]

Looks at every .onnx in the folders (models/ and models/fetched/ by default). "Executed" counts the nodes left after
ONNX Runtime's own extended optimization of the file: what is really run. Each model is optimized in a process of its
own, after a warm-up on a tiny model; its outputs are verified in this one. --latency adds the time of the result by
that of the original, interleaved, with the runtime's optimizations on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime as ort
from synthetic import mixed_graph

import onnxopt
from onnxopt.graph import all_nodes

ROOT = Path(__file__).parent.parent
TARGETS = ("portable", "cpu")

WORKER = """
import sys, time, onnxopt
source, out, target, warm = sys.argv[1:]
def run(path):
    done = onnxopt.optimize(path, target=target, verify=False, measure=False)
    onnxopt.save(done.model, out)
run(warm)
start = time.perf_counter()
run(source)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(time.perf_counter() - start, peak)
"""


def executed(path: Path, folder: Path) -> int | None:
    """Return how many nodes the runtime runs; None when it cannot load the model."""
    optimized = folder / "executed.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimized)
    for key, value in (("file_name", "executed.data"), ("min_size_in_bytes", "1024")):
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever the runtime raises means the same here, and is printed
        print(f"  the runtime cannot load {path.name}: {str(error)[:100]}", file=sys.stderr)
        return None
    return nodes(optimized)


def nodes(path: Path) -> int:
    """Return the nodes of a file, nested graphs and functions included."""
    return sum(1 for _ in all_nodes(onnxopt.load(path)))


def optimized(source: Path, target: str, folder: Path) -> tuple[Path, float, float]:
    """Optimize in a process of its own; return the result, seconds and peak MB."""
    out, warm = folder / f"{source.stem}.{target}.onnx", folder / "warm.onnx"
    onnx.save(mixed_graph(10), warm)
    command = [sys.executable, "-c", WORKER, str(source), str(out), target, str(warm)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.split())
    return out, seconds, peak


def main() -> None:
    """Print one row per model and target; exit 1 when a result does not verify or has more nodes."""
    latency = "--latency" in sys.argv
    folders = [Path(f) for f in sys.argv[1:] if f != "--latency"] or [ROOT / "models", ROOT / "models" / "fetched"]
    failed = False
    print(f"{'model':36} {'target':8} {'saved':>13} {'executed':>13} {'bytes':>6} {'s':>6} {'MB':>6} {'deviation':>9}")
    for source in sorted(p for folder in folders for p in folder.glob("*.onnx")):
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                before = nodes(source), executed(source, folder)
                out, seconds, peak = optimized(source, target, folder)
                after = nodes(out), executed(out, folder)
                verification = onnxopt.verify(source, out)
                speed = f" {onnxopt.measure(source, out, memory=False).ratio:6.3f}" if latency else ""
                growth = out.stat().st_size / source.stat().st_size
            failed |= not verification.ok or after[0] > before[0]
            print(
                f"{source.stem[:36]:36} {target:8} {before[0]:>5} > {after[0]:<5} {before[1] or '-':>5} > "
                f"{after[1] or '-':<5} {growth:6.3f} {seconds:6.2f} {peak:6.0f} {verification.worst:9.1e}{speed}"
                f"{'' if verification.ok else '  FAILED: ' + verification.reason}",
                flush=True,
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
