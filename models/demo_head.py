"""A digit classifier becomes a classifier of digits it has never seen: one command, no training framework.

    python models/demo_head.py

The network knows the digits 0 to 4. It gets a head for 5 to 9 from 250 labelled images, 50 of each, and is judged by
500 others. Writes to out/ of the current folder; out/head.html and out/head.svg have the picture of accuracy against
labelled images.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from onnxopt.probe.validation import Step
from onnxopt.report.curve import Line, picture, standalone

MODELS = Path(os.path.relpath(Path(__file__).parent))  # relative, so that the command reads well
OUT = Path("out")


def unseen(split: str) -> Path:
    """Write the images of the digits 5 to 9 with their labels into one .npz, and return its path."""
    labels = np.load(MODELS / f"mnist_{split}_labels.npy", allow_pickle=False)
    with np.load(MODELS / f"mnist_{split}.npz", allow_pickle=False) as data:
        images = data["image"]
    path = OUT / f"5to9_{split}.npz"
    np.savez_compressed(path, image=images[labels >= 5], labels=labels[labels >= 5])
    return path


def main() -> None:
    """Make the data, then show and run the command."""
    OUT.mkdir(exist_ok=True)
    arguments = [
        *("head", MODELS / "mnist_cnn_0to4.onnx", "--classes", "5", "--at", "auto", "--method", "ridge"),
        *("--data", unseen("calibration"), "--test", unseen("test")),
        *("-o", OUT / "mnist_5to9.onnx", "--report", OUT / "head.html", "--report", OUT / "head.json"),
    ]
    words = ["onnxopt", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}\n", flush=True)
    # -P: the installed package, not a folder of that name in the current one.
    code = subprocess.run([sys.executable, "-P", "-m", *words]).returncode
    if code:
        raise SystemExit(code)
    report = json.loads((OUT / "head.json").read_text(encoding="utf-8"))
    steps = [Step(**step) for step in report["curve"]]
    drawn = picture([Line("new head", steps, "better")], guessing=report["majority"])
    (OUT / "head.svg").write_text(standalone(drawn), encoding="utf-8")


if __name__ == "__main__":
    main()
