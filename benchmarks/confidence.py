"""How often does a winner of the search miss its budget on fresh data?

    python benchmarks/confidence.py [MODEL --data D.npz [--labels L.npy] --metric M] [--draws 1000] [--samples 100]

Candidates are built once, with what they learn taken from half of the samples. The other half stands for all the inputs
there are: each draw takes some of them, with replacement, as evaluation samples, lets the search decide by these, and
looks at what the winner loses on all. Prints how often that is more than the budget, for two kinds of draws, and how
often it were if every candidate were tested for itself at 95%:

    likely    a budget between a tenth and three times the median loss, any of the candidates as the fastest
    hostile   a budget just below a candidate's true loss, and the worse a candidate the faster

Ends with 1 when more than 5% of the draws of a kind miss.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnxopt
from onnxopt import metrics
from onnxopt import model as models
from onnxopt.errors import OnnxOptError
from onnxopt.feeds import Data, load_data, load_labels
from onnxopt.pipeline import Pipeline
from onnxopt.runtime import open_session
from onnxopt.search import decision
from onnxopt.search.candidates import KEEP, propose, take_inventory
from onnxopt.search.decision import MOST_EFFORT, Limits, Record, Speed

ALLOWED = 0.05
MODELS = Path(__file__).parent.parent / "models"
PRUNED = tuple(f"prune-weights{{ratio={ratio}}}" for ratio in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9))
"""Stand for candidates whose losses lie close together."""

Outputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model, by its outputs for each sample of the population and what it loses on all of them."""

    name: str
    outputs: list[Outputs]
    loss: float


def outputs_of(model: Any, data: Data) -> list[Outputs]:
    """Run a model on all samples; the first output is what metrics look at."""
    with open_session(models.load(model), optimized=True) as session:
        return [dict([next(iter(session.run(feed).items()))]) for feed in data]


def build(model: Path, learning: Data, population: Data, labels: np.ndarray | None, metric: str) -> list[Candidate]:
    """Return the original as the first, and the candidates that can be made."""
    original = outputs_of(models.load(model), population)
    found = [Candidate(KEEP.name, original, 0.0)]
    lossless = str(Pipeline.recipe("lossless"))
    wanted = [p.passes for p in propose(take_inventory(models.load(model)), "cpu", learning=True) if p.passes]
    for passes in (*wanted, *PRUNED):
        try:
            result = onnxopt.optimize(
                model, passes=f"{lossless},{passes}", target="cpu", data=learning, verify=False, measure=False
            )
        except OnnxOptError as error:
            print(f"{passes}: {error}")
            continue
        outputs = outputs_of(result.model, population)
        loss = metrics.compare(original, outputs, labels, metric).drop
        found.append(Candidate(passes, outputs, loss))
        print(f"{passes}: loses {loss:.4g} of {metric}", flush=True)
    return found


def decide(
    candidates: Sequence[Candidate], order: Sequence[int], budget: float, chosen: np.ndarray, judge: Any
) -> tuple[Candidate, Candidate]:
    """Return what wins on some samples: as the search decides, and if each candidate were tested for itself.

    Args:
        candidates: The original first.
        order: Which of them is how fast, the fastest first.
        budget: What may be lost.
        chosen: The samples.
        judge: Compares a candidate on samples.
    """
    limits = Limits(None, budget)
    records = [Record("0", "", bytes=1000, speed=Speed(1.0, 1.0, 1.0, MOST_EFFORT))]
    for place, index in enumerate(order):
        ratio = 0.2 + 0.6 * place / len(order)
        speed = Speed(ratio, ratio, ratio, MOST_EFFORT)
        metric = judge(candidates[index], chosen)
        records.append(Record(str(index), "lossy", bytes=500, speed=speed, worst=0.1, metric=metric))
    winner = decision.choose(records, limits, "latency")
    alone = [r for r in records[1:] if decision.fit(r, limits) == "within"]
    return candidates[int(winner.name)], candidates[int((alone or records)[0].name)]


def draw(candidates: Sequence[Candidate], kind: str, rng: np.random.Generator) -> tuple[float, list[int]]:
    """Return a budget and the lossy candidates from the fastest to the slowest."""
    lossy = [i for i, c in enumerate(candidates) if i]
    losses = np.array([candidates[i].loss for i in lossy])
    if kind == "likely":
        median = max(float(np.median(losses)), 1e-6)
        return median * math.exp(rng.uniform(math.log(0.1), math.log(3))), list(rng.permutation(lossy))
    aim = rng.choice(losses[losses > 0]) if (losses > 0).any() else 1e-6
    return float(aim) * 0.999, [lossy[i] for i in np.argsort(-losses)]


def main() -> int:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=MODELS / "mnist_cnn_bn.onnx")
    parser.add_argument("--data", type=Path, default=MODELS / "mnist_test.npz")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--metric", default="top1")
    parser.add_argument("--draws", type=int, default=300, help="of each kind")
    parser.add_argument("--samples", type=int, nargs="+", default=[200], help="evaluation samples of a draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    data = load_data(str(args.data), models.load(args.model))
    order = rng.permutation(len(data))
    learning, rest = order[: len(data) // 2], order[len(data) // 2 :]
    labels = None if args.labels is None else load_labels(args.labels)[np.sort(rest)]
    population = data.select(sorted(int(i) for i in rest))
    candidates = build(args.model, data.select(sorted(int(i) for i in learning)), population, labels, args.metric)

    def judge(candidate: Candidate, chosen: np.ndarray) -> Any:
        sides = ([side[i] for i in chosen] for side in (candidates[0].outputs, candidate.outputs))
        return metrics.compare(*sides, None if labels is None else labels[chosen], args.metric)

    bad = 0
    for samples in args.samples:
        for kind in ("likely", "hostile"):
            missed = lossy = alone = 0
            for _ in range(args.draws):
                budget, fastest = draw(candidates, kind, rng)
                chosen = rng.integers(len(population), size=samples)
                winner, single = decide(candidates, fastest, budget, chosen, judge)
                lossy += winner is not candidates[0]
                missed += winner.loss > budget
                alone += single.loss > budget
            rate = missed / args.draws
            bad += rate > ALLOWED
            print(
                f"{kind}, {samples} samples: {missed} of {args.draws} winners miss their budget on fresh data "
                f"({rate:.1%}, allowed {ALLOWED:.0%}; {alone / args.draws:.1%} if each were tested for itself); "
                f"{lossy} are lossy",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
