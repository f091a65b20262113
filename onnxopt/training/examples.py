"""Samples with labels, in memory, and batches of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError, UsageError
from onnxopt.feeds import Data, Feed, load_data, load_labels
from onnxopt.probe.folds import stratified
from onnxopt.registry import nearest

Source: TypeAlias = str | os.PathLike[str] | Data | Mapping[str, np.ndarray]
"""An .npz, a folder of them or module:function; samples that were opened; or input -> array, samples first."""

_LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys of an .npz that are taken for labels when none are named and no input is called so."""


@dataclasses.dataclass(frozen=True, slots=True)
class Examples:
    """Samples, each with its label where there are labels.

    Attributes:
        feeds: Inputs of each sample, as the model takes them.
        labels: One per sample along the first axis.
        stackable: Whether samples of equal shapes can be put together along the first axis.
    """

    feeds: tuple[Feed, ...]
    labels: np.ndarray | None
    stackable: bool

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.feeds)

    def select(self, numbers: Sequence[int] | np.ndarray) -> Examples:
        """Return the samples of these numbers."""
        labels = None if self.labels is None else self.labels[np.asarray(numbers, np.int64)]
        return Examples(tuple(self.feeds[i] for i in numbers), labels, self.stackable)

    def batches(self, numbers: Sequence[int] | np.ndarray, size: int) -> Iterator[tuple[Feed, np.ndarray]]:
        """Yield feeds of at most `size` samples, and which samples these are.

        Args:
            numbers: The samples, in this order as far as their shapes allow.
            size: The most samples in a feed.
        """
        if not self.stackable:
            for number in numbers:
                yield self.feeds[number], np.array([number])
            return
        alike: dict[Any, list[int]] = {}
        for number in numbers:
            shapes = tuple((name, np.shape(value)) for name, value in self.feeds[number].items())
            alike.setdefault(shapes, []).append(int(number))
        for group in alike.values():
            for start in range(0, len(group), size):
                part = group[start : start + size]
                names = self.feeds[part[0]]
                yield {n: np.concatenate([self.feeds[i][n] for i in part]) for n in names}, np.array(part)


def load_examples(model: ir.Model, data: Source, labels: str | os.PathLike[str] | np.ndarray | None) -> Examples:
    """Read samples and labels.

    Args:
        model: The model that they are for.
        data: The samples.
        labels: An array or a file of labels, or the key of an .npz `data` that holds them. By default the key
            "labels", "label", "targets", "target" or "y", where there is one that is no input.

    Raises:
        DataError: If they cannot be read or do not fit the model or each other.
    """
    inputs = {v.name or "": v for v in model.graph.inputs if not v.is_initializer()}
    if isinstance(data, (str, os.PathLike)) and Path(data).is_file():
        data, labels = _taken_apart(Path(data), inputs, labels)
    elif isinstance(labels, (str, os.PathLike)):
        labels = load_labels(labels)
    assert labels is None or isinstance(labels, np.ndarray)
    if isinstance(data, Mapping):
        feeds = _rows(data, inputs)
    else:
        samples = data if isinstance(data, Data) else load_data(data, model)
        feeds = list(samples)
    if not feeds:
        raise DataError("The data holds no sample.")
    stackable = all(
        v.shape is not None and len(v.shape) > 0 and not isinstance(v.shape[0], int) for v in inputs.values()
    )
    arrays = all(isinstance(value, np.ndarray) and value.ndim > 0 for feed in feeds for value in feed.values())
    if labels is not None and len(labels) != len(feeds):
        raise DataError(f"There are {len(feeds)} samples and {len(labels)} labels; give one label per sample.")
    return Examples(tuple(feeds), labels, stackable and arrays)


def _taken_apart(
    path: Path, inputs: Mapping[str, ir.Value], labels: str | os.PathLike[str] | np.ndarray | None
) -> tuple[Source, np.ndarray | None]:
    """Return samples and labels where both may lie in one file."""
    keys = _keys(path)
    named = os.fspath(labels) if isinstance(labels, (str, os.PathLike)) else None
    if named is None and labels is None:
        named = next((k for k in _LABEL_KEYS if k in keys and k not in inputs), None)
    if named is None or named not in keys:
        if named is not None and not Path(named).is_file():
            raise UsageError(
                f'labels "{named}" is neither a file nor a key of {path}, which has {", ".join(keys)}.', "labels"
            )
        if named is not None:
            return os.fspath(path), load_labels(named)
        assert not isinstance(labels, (str, os.PathLike)), "a name was taken above"
        return os.fspath(path), labels
    with np.load(path, allow_pickle=False) as archive:
        try:
            arrays = {key: archive[key] for key in keys}
        except ValueError as error:
            raise DataError(f"{path} cannot be read without pickles: {error}.") from error
    found = arrays.pop(named)
    if found.ndim == 0:
        raise DataError(f'The labels "{named}" of {path} are a single number; give one per sample.')
    return arrays, found


def _keys(path: Path) -> list[str]:
    """Return the keys of an .npz; none where it is something else, about which `load_data` has more to say."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files) if hasattr(archive, "files") else []
    except (OSError, ValueError, EOFError, NotImplementedError):
        return []


def _rows(data: Mapping[str, np.ndarray], inputs: Mapping[str, ir.Value]) -> list[Feed]:
    """Return one feed per row of arrays.

    Raises:
        DataError: If names, sizes or shapes do not fit.
    """
    for name in data:
        if name not in inputs:
            raise DataError(
                f'The model has no input "{name}".{nearest(name, list(inputs))} It has {", ".join(inputs)}.'
            )
    missing = [name for name in inputs if name not in data]
    if missing:
        raise DataError(f'The data has nothing for the input "{missing[0]}".')
    sizes = {name: len(array) for name, array in data.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{n} for {name}" for name, n in sizes.items())
        raise DataError(f"The arrays have different numbers of samples: {told}.")
    for name, value in inputs.items():
        wanted = value.shape
        given = data[name].shape
        if wanted is not None and len(wanted) != len(given):
            raise DataError(f'The input "{name}" has {len(wanted)} axes, and its data {len(given)}.')
        fixed = [] if wanted is None else list(zip(wanted, given, strict=True))[1:]
        if any(isinstance(w, int) and w != g for w, g in fixed):
            raise DataError(f'The input "{name}" has the shape {wanted}, which data of {list(given)} does not fit.')
    arrays = {}
    for name, array in data.items():
        dtype = inputs[name].dtype
        arrays[name] = array if dtype is None else array.astype(dtype.numpy(), copy=False)
    count = next(iter(sizes.values()), 0)
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples | None]:
    """Divide samples at random into those to learn from and those to judge by; classes keep their shares.

    Args:
        examples: All samples.
        share: The part to judge by; 0 for none.
        seed: The same seed gives the same division.

    Raises:
        DataError: If too few samples are left on a side.
    """
    if share == 0:
        return examples, None
    count = len(examples)
    order = np.random.default_rng([seed, count]).permutation(count)
    labels = _classes(examples)
    if labels is not None:
        ranks = np.zeros(count)
        for label in np.unique(labels):
            members = order[labels[order] == label]
            ranks[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(ranks[order], kind="stable")]
    judged = round(share * count)
    if judged < 1 or count - judged < 1:
        raise DataError(
            f"Of {count} samples, {judged} would judge and {count - judged} be learnt from; each needs at least one."
        )
    return examples.select(np.sort(order[judged:])), examples.select(np.sort(order[:judged]))


def folds(examples: Examples, count: int, seed: int) -> list[tuple[Examples, np.ndarray]]:
    """Divide samples at random into folds; classes keep their shares.

    Args:
        examples: All samples.
        count: How many folds.
        seed: The same seed gives the same division.

    Returns:
        For each fold the samples outside of it, to learn from, and the numbers of those in it. Each is in one.

    Raises:
        DataError: If there are fewer samples than folds.
    """
    if len(examples) < count:
        raise DataError(f"{len(examples)} samples cannot be divided into {count} folds; give fewer folds.")
    classes = _classes(examples)
    parts = stratified(np.zeros(len(examples)) if classes is None else classes, count, seed=seed)
    return [(examples.select(outside), inside) for outside, inside in parts]


def _classes(examples: Examples) -> np.ndarray | None:
    """Return the class of each sample; None where labels are something else."""
    labels = examples.labels
    return labels if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iub" else None
