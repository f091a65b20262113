"""The most memory that `onnxopt quantize --mode static` takes with a thousand images: at most the model's and 500 MB.

    python benchmarks/calibration_memory.py [MODEL] [--images 1000] [--pixels 224]

The images are made, as float32, and lie in an .npz of about 600 MB; a model of one input of four axes takes them, with
--pixels where its height and width are free. Without a model it is a made network like ResNet-50. The peak is that of the
whole process. Linux alone says what it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from synthetic import resnet

import onnxopt

ALLOWED_MB = 500.0

WORKER = """
import sys, onnxopt
source, data, target = sys.argv[1:]
done = onnxopt.quantize(source, mode="static", target="cpu", data=data)
onnxopt.save(done.model, target)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)
"""


def write_images(model: Path, file: Path, count: int, pixels: int) -> None:
    """Write images that a model takes.

    Raises:
        SystemExit: If the model takes something else.
    """
    (value, *others) = (v for v in onnxopt.load(model).graph.inputs if not v.is_initializer())
    if others or value.shape is None or len(value.shape) != 4:
        sys.exit(f"{model} takes something else than one input of four axes.")
    sides = [size if isinstance(size, int) else pixels for size in value.shape.dims[2:]]
    channels = value.shape[1] if isinstance(value.shape[1], int) else 3
    random = np.random.default_rng(0)
    images = random.random((count, channels, *sides), dtype=np.float32)
    np.savez(file, **{value.name or "": images})
    print(f"{count} images, {images.nbytes / 1e6:.0f} MB")


def main() -> int:
    """Quantize in a process of its own, and compare its peak with what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pixels", type=int, default=224)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), arguments.model
        if model is None:
            model = folder / "resnet.onnx"
            onnx.save(resnet((3, 4, 6, 3)), model)
        write_images(model, folder / "images.npz", arguments.images, arguments.pixels)
        command = [sys.executable, "-c", WORKER, str(model), str(folder / "images.npz"), str(folder / "out.onnx")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        peak, size = float(done.stdout), model.stat().st_size / 1e6
    print(f"{model.stem}, {size:.0f} MB: peak {peak:.0f} MB, allowed {size + ALLOWED_MB:.0f} MB")
    return int(peak > size + ALLOWED_MB)


if __name__ == "__main__":
    sys.exit(main())
