"""The training loop: AdamW on a warm-up and a cosine, early stopping, the best state restored, resumable."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxopt.contract import Progress
from onnxopt.errors import DataError, NothingDoneError, UsageError
from onnxopt.training import safetensors
from onnxopt.training.normalizing import Normalizing
from onnxopt.training.problem import Key, Problem
from onnxopt.training.recipe import Recipe
from onnxopt.training.trainable import Trainable
from onnxopt.training.values import on_device, to_array


@dataclasses.dataclass(frozen=True, slots=True)
class Epoch:
    """What came out of an epoch.

    Attributes:
        number: Counted from 1; 0 is the state before training.
        loss: Mean loss of its batches; NaN for number 0.
        key: How good the state after it is; empty when nothing judges.
    """

    number: int
    loss: float
    key: Key


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """A finished training.

    Attributes:
        values: The best parameters.
        epochs: What came out of each epoch.
        best: The number of the epoch they are of; 0 when none was better than what was there.
        resumed: Epochs that a checkpoint had done already.
    """

    values: dict[str, torch.Tensor]
    epochs: tuple[Epoch, ...]
    best: int
    resumed: int


class _State:
    """What changes from epoch to epoch."""

    def __init__(self, trained: Mapping[str, Trainable], normalizing: Normalizing, recipe: Recipe) -> None:
        self.trained = trained
        self.normalizing = normalizing
        self.learnt = {n: each for n, each in trained.items() if n not in normalizing.idle} | normalizing.leaves
        groups: dict[tuple[int, bool], list[torch.Tensor]] = {}
        for each in self.learnt.values():
            groups.setdefault((each.depth, each.decays), []).append(each.leaf)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": leaves,
                    "scale": recipe.learning_rate * recipe.layer_decay**depth,
                    "weight_decay": recipe.weight_decay if decays else 0.0,
                }
                for (depth, decays), leaves in groups.items()
            ],
            lr=recipe.learning_rate,
        )
        self.epochs: list[Epoch] = []
        self.best = 0
        self.blend = recipe.blend
        self.start = {name: value.clone() for name, value in self.reached().items()}
        self.best_values = self.values()

    def reached(self) -> dict[str, torch.Tensor]:
        """Return what the constants of the model are now, what was learnt beside them folded in."""
        values = {name: each.value().detach() for name, each in self.trained.items()}
        return values | self.normalizing.values(values)

    def values(self) -> dict[str, torch.Tensor]:
        """Return what the result would be made of now: constants on the way from the start to where they are."""
        return {name: torch.lerp(self.start[name], value, self.blend) for name, value in self.reached().items()}

    def note(self, epoch: Epoch) -> None:
        """Add an epoch; keep its values when they are the best so far, or when nothing judges."""
        best = next((e for e in self.epochs if e.number == self.best), None)
        self.epochs.append(epoch)
        if best is None or not epoch.key or epoch.key > best.key:
            self.best, self.best_values = epoch.number, self.values()

    def save(self, path: Path, key: str) -> None:
        arrays: dict[str, np.ndarray] = {}
        for name, each in self.learnt.items():
            arrays[f"value/{name}"] = to_array(each.leaf)
            for part, tensor in self.optimizer.state[each.leaf].items():
                arrays[f"adam/{part}/{name}"] = to_array(tensor)
        arrays |= {f"best/{name}": to_array(value) for name, value in self.best_values.items()}
        arrays |= {f"running/{name}": to_array(value) for name, value in self.normalizing.buffers.items()}
        epochs = [[e.number, e.loss, list(e.key)] for e in self.epochs]
        text = {"run": key, "best": str(self.best), "epochs": json.dumps(epochs)}
        safetensors.write(path, arrays, text)

    def load(self, path: Path, key: str) -> None:
        """Go on from a checkpoint of this run.

        Raises:
            UsageError: If it belongs to another run.
            DataError: If it cannot be read.
        """
        arrays, text = _own(path, key)
        try:
            self.best_values = {n: _like(arrays[f"best/{n}"], value) for n, value in self.best_values.items()}
            for name, buffer in self.normalizing.buffers.items():
                buffer.copy_(_like(arrays[f"running/{name}"], buffer))
            for name, each in self.learnt.items():
                each.leaf.data = _like(arrays[f"value/{name}"], each.leaf)
                state = {
                    p: arrays[f"adam/{p}/{name}"]
                    for p in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam/{p}/{name}" in arrays
                }
                if state:
                    self.optimizer.state[each.leaf] = {p: on_device(a.copy()) for p, a in state.items()}
            self.epochs = [Epoch(int(n), float(loss), tuple(k)) for n, loss, k in json.loads(text["epochs"])]
            self.best = int(text["best"])
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"The checkpoint {path} is damaged: {error}.") from error


def require_own(path: Path, key: str) -> None:
    """See that a checkpoint, if there is one, is of this run.

    Raises:
        UsageError: If it belongs to another run.
        DataError: If it cannot be read.
    """
    if path.exists():
        _own(path, key)


def _own(path: Path, key: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and strings of a checkpoint of this run."""
    arrays, text = safetensors.read(path)
    if text.get("run") != key:
        raise UsageError(
            f"The checkpoint {path} belongs to a run with another model, data or options; name another file or "
            "remove it.",
            "checkpoint",
        )
    return arrays, text


def _like(array: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    if array.shape != tuple(tensor.shape):
        raise ValueError(f"an array of shape {list(array.shape)} stands for one of {list(tensor.shape)}")
    return on_device(array.copy()).to(tensor.dtype)


def fit(
    problem: Problem,
    trained: Mapping[str, Trainable],
    normalizing: Normalizing,
    recipe: Recipe,
    progress: Progress,
    *,
    checkpoint: Path | None = None,
    key: str = "",
) -> Fit:
    """Optimize parameters.

    A run that goes on from a checkpoint gives the same as one that was never interrupted.

    Args:
        problem: What is learnt.
        trained: The parameters; their leaves are changed.
        normalizing: What goes by the statistics of batches meanwhile.
        recipe: How.
        progress: Told of each epoch.
        checkpoint: Where the state is kept after each epoch, and taken from when it exists.
        key: Tells runs apart, so that none goes on from the checkpoint of another.

    Raises:
        UsageError: If the checkpoint belongs to another run.
        DataError: If the loss is not finite, or the checkpoint cannot be read.
        NothingDoneError: If the gradient is zero on all samples.
    """
    state = _State(trained, normalizing, recipe)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, key)
    else:
        with torch.no_grad():
            state.note(Epoch(0, math.nan, problem.judge(state.values()) or ()))
    done = state.epochs[-1].number
    for number in range(done + 1, recipe.epochs + 1):
        if state.epochs[-1].key and number - 1 - state.best >= recipe.patience:
            break
        progress.stage(f"epoch {number} of {recipe.epochs}{_told(state.epochs[-1])}")
        loss = _epoch(problem, state, recipe, number, progress)
        with torch.no_grad():
            state.note(Epoch(number, loss, problem.judge(state.values()) or ()))
        if checkpoint is not None:
            state.save(checkpoint, key)
    return Fit(state.best_values, tuple(state.epochs), state.best, done)


def _epoch(problem: Problem, state: _State, recipe: Recipe, number: int, progress: Progress) -> float:
    """Go over all samples once; return the mean loss."""
    rng = np.random.default_rng([recipe.seed, number])
    order = rng.permutation(len(problem))
    starts = range(0, len(order), recipe.batch)
    steps = recipe.epochs * len(starts)
    total, steepest = 0.0, 0.0
    for index, start in enumerate(starts):
        step = (number - 1) * len(starts) + index
        for group in state.optimizer.param_groups:
            group["lr"] = group["scale"] * recipe.rate(step, steps)
        numbers = order[start : start + recipe.batch]
        loss, norm = _step(problem, state, numbers, rng, recipe.clip)
        total, steepest = total + loss * len(numbers), max(steepest, norm)
        progress.advance()
    if number == 1 and steepest == 0:
        raise NothingDoneError(
            "The gradient of the loss is zero for all parameters that are trained, on every sample: changing them a "
            "little changes no output, as behind a ReLU or a Clip that is at its end, or the loss is as low as can be. "
            "Train others as well, or begin with other weights."
        )
    return total / len(order)


def _step(
    problem: Problem, state: _State, numbers: np.ndarray, rng: np.random.Generator, clip: float
) -> tuple[float, float]:
    """Take a step; return the loss and the norm of its gradient."""
    state.optimizer.zero_grad()
    mean = 0.0
    # computed anew for every part, because going backwards frees what led to them
    parts = problem.losses(numbers, _Fresh(state.trained), state.normalizing.operators(), rng)
    for loss, weight in parts:
        (loss * weight).backward()
        mean += float(loss.detach()) * weight
    if not math.isfinite(mean):
        raise DataError("The loss is not finite any more; lower the learning rate, or look for NaN in the data.")
    leaves: Sequence[Any] = [each.leaf for each in state.learnt.values()]
    norm = torch.nn.utils.clip_grad_norm_(leaves, clip)
    state.optimizer.step()
    return mean, float(norm)


class _Fresh(dict[str, torch.Tensor]):
    """The values of parameters, each computed when it is asked for."""

    def __init__(self, trained: Mapping[str, Trainable]) -> None:
        super().__init__(dict.fromkeys(trained))
        self._trained = trained

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._trained[name].value()


def _told(epoch: Epoch) -> str:
    if not epoch.key:
        return "" if math.isnan(epoch.loss) else f", loss {epoch.loss:.4g}"
    return f", last {epoch.key[0]:.4g} on validation"
