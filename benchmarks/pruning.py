"""What prune-channels and prune-layers remove from real models, and what that brings.

    python benchmarks/pruning.py [--ratio R | --layers N] [--latency] [--quantized] [FOLDER or FILE ...]
    python benchmarks/pruning.py --analysis

Looks at every .onnx in the folders (models/ and models/fetched/ by default). Prints for each the part of the parameters
that is gone, how many groups of channels (or blocks) were removed and dropped by the gate, and the seconds; with
--latency also the time of the result by that of the original, interleaved. --layers leaves out so many residual blocks,
which learns from --samples generated inputs, and prints how many layers were fitted. --quantized prunes the static 8-bit forms
of each model: by onnxopt, and by onnxruntime.quantization as QDQ and QOperator. --analysis times the analysis of a made graph
with the layers of ResNet-152 instead.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import ort_forms
from synthetic import resnet

import onnxopt
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.goals import elements
from onnxopt.errors import OnnxOptError
from onnxopt.feeds import Data, generate_runnable
from onnxopt.runtime import open_session

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Prune every model and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5, help="of the channels that go")
    parser.add_argument("--layers", type=int, default=0, help="leave out so many residual blocks instead")
    parser.add_argument("--samples", type=int, default=8, help="generated inputs that --layers learns from")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--quantized", action="store_true", help="prune static 8-bit forms of the models")
    parser.add_argument("--analysis", action="store_true", help="time the analysis of a graph like ResNet-152")
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "models", ROOT / "models" / "fetched"])
    arguments = parser.parse_args()
    if arguments.analysis:
        analysis()
        return
    what = "blocks | layers fitted" if arguments.layers else "groups pruned"
    print(f"| model | parameters gone | {what} | dropped | time | seconds |")
    print(f"|---|---|---|---|---|---|{'---|' if arguments.layers else ''}")
    files = [f for path in arguments.paths for f in (sorted(path.glob("*.onnx")) if path.is_dir() else [path])]
    for file in files:
        try:
            for title, model in forms(file) if arguments.quantized else [(file.stem, onnxopt.load(file))]:
                print(line(title, model, arguments), flush=True)
        except OnnxOptError as error:
            print(f"| {file.stem} | {error} |", flush=True)


def line(title: str, model: ir.Model, arguments: argparse.Namespace) -> str:
    """Prune a model and say in a row of a table what came of it."""
    start = time.perf_counter()
    passes, data = f"prune-channels{{ratio={arguments.ratio}}}", None
    if arguments.layers:
        passes, data = f"prune-layers{{count={arguments.layers}}}", inputs(model, arguments.samples)
    try:
        result = onnxopt.optimize(model, passes=passes, data=data, max_error=math.inf, measure=arguments.latency)
    except OnnxOptError as error:
        return f"| {title} | {error} |"
    (report,) = result.report.passes[:1]
    if report.reason:
        return f"| {title} | {report.reason} |"
    gone = 1 - elements(result.model) / elements(model)
    measured = result.report.measurement
    ratio_text = "-" if measured is None else f"{measured.ratio:.3f}"
    removed = [edit for edit in report.applied if edit.removed is not None]
    fitted = [sum(edit.fit is not None for edit in report.applied)] if arguments.layers else []
    cells = [title, f"{gone:.1%}", len(removed), *fitted, len(report.dropped), ratio_text]
    for dropped in report.dropped:
        print(f"  {title}: {dropped.site}: {dropped.reason}")
    return f"| {' | '.join(map(str, cells))} | {time.perf_counter() - start:.1f} |"


def inputs(model: ir.Model, count: int) -> Data:
    """Return inputs that a model runs with."""
    with open_session(model, optimized=True) as session:
        feeds = generate_runnable(model, session.run, sets=count)
    return Data("generated", lambda: iter(feeds), len(feeds))


def forms(path: Path) -> Iterator[tuple[str, ir.Model]]:
    """Yield a model in 8 bits, by onnxopt and by the runtime's tools."""
    data, ours = inputs(onnxopt.load(path), 8), "quantize-static"
    made = onnxopt.optimize(
        path, passes=ours, target="cpu", data=data, max_error=math.inf, verify=False, measure=False
    ).model
    yield f"{path.stem}, {ours}", made
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ort QDQ", "ort QOperator"):
            file = Path(folder) / f"{name}.onnx"
            why = ort_forms.made(name, path, file, itertools.islice(data, 8))
            if why:
                print(f"  {path.stem}, {name}: {why}")
            else:
                yield f"{path.stem}, {name}", onnxopt.load(file)


def analysis() -> None:
    """Time the analysis of a graph with the layers of ResNet-152, the fastest of three runs."""
    model = onnxopt.load(resnet((3, 8, 36, 3)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        coupling = analyse(model)
        seconds.append(time.perf_counter() - start)
    print(f"analysis of a graph like ResNet-152: {min(seconds):.2f} s, {len(coupling.groups)} groups")


if __name__ == "__main__":
    main()
