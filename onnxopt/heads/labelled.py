"""Labelled samples: inputs with a class each, from files or arrays."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError
from onnxopt.feeds import Data, load_data, load_labels
from onnxopt.probe.classifier import Array

Source = str | os.PathLike[str] | Mapping[str, Any] | Data
"""An .npz or what else `load_data` takes; an array per input; or samples."""

KEYS = ("labels", "label", "y")
"""Under these the labels may lie in the .npz of the inputs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Labelled:
    """Samples and their classes.

    Attributes:
        data: The inputs.
        labels: What each sample is, as it was given: whole numbers or strings.
        name: Where the labels come from, for messages.
    """

    data: Data
    labels: Array
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Classes:
    """The classes of some labels.

    Attributes:
        names: Their names, in the order of the scores.
        values: What they are among the labels.
    """

    names: tuple[str, ...]
    values: Array

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.names)

    def numbers(self, labelled: Labelled) -> Array:
        """Return the number of each sample's class.

        Raises:
            DataError: If a label is none of the classes.
        """
        unknown = labelled.labels[~np.isin(labelled.labels, self.values)]
        if unknown.size:
            raise DataError(f"{labelled.name} holds the class {unknown[0]}, of which the training data has no sample.")
        return np.searchsorted(self.values, labelled.labels)


def load_labelled(source: Source, labels: str | os.PathLike[str] | Array | None, model: ir.Model) -> Labelled:
    """Open labelled samples.

    Args:
        source: The inputs.
        labels: The labels, or the path of an .npy; None when they lie in the .npz of the inputs.
        model: The model the inputs are for.

    Raises:
        DataError: If there are none, they do not fit the model, or are no classes.
    """
    inside, data = _key_inside(source, model), load_unlabelled(source, model)
    if labels is None:
        if inside is None:
            raise DataError(
                f'There are no labels for {data.name}; put them into the .npz as "labels", or give --labels.'
            )
        found, name = _inside(source, inside), f'the key "{inside}" of {data.name}'
    elif isinstance(labels, np.ndarray):
        found, name = labels, "labels"
    else:
        found, name = load_labels(labels), str(labels)
    checked = _checked(found, name)
    if not len(data):
        raise DataError(f"{data.name} holds no samples.")
    if len(checked) % len(data) or not len(checked):
        raise DataError(f"{_start(name)} holds {len(checked)} labels, but {data.name} has {len(data)} samples.")
    return Labelled(data, checked, name)


def load_unlabelled(source: Source, model: ir.Model) -> Data:
    """Open samples; labels that lie with them are left out.

    Raises:
        DataError: If there are none, or they do not fit the model.
    """
    inside = _key_inside(source, model)
    if isinstance(source, Data):
        return source
    if isinstance(source, Mapping):
        return _from_arrays(source, inside)
    return load_data(source, model, ignore=(inside,) if inside else ())


def classes_of(labelled: Labelled, expected: int | None) -> Classes:
    """Return the classes among labels.

    Args:
        labelled: The samples.
        expected: How many classes the user says there are; None to take what the labels hold.

    Raises:
        DataError: If there are fewer or more, or only one.
    """
    values = np.unique(labelled.labels)
    listed = ", ".join(str(v) for v in values[:8]) + (", ..." if len(values) > 8 else "")
    if expected is not None and len(values) != expected:
        missing = ""
        if len(values) < expected and values.dtype.kind in "iu" and values.min() >= 0 and values.max() < expected:
            missing = f"; there is no sample of class {next(i for i in range(expected) if i not in values)}"
        raise DataError(
            f"{_start(labelled.name)} holds {len(values)} classes ({listed}), but --classes is {expected}{missing}."
        )
    if len(values) < 2:
        raise DataError(f"All labels of {labelled.name} are {listed}; a classifier needs two classes or more.")
    return Classes(tuple(str(v) for v in values), values)


def require_enough(classes: Array, names: Classes, folds: int) -> None:
    """Check that every class has a sample in each fold.

    Raises:
        DataError: If one has fewer.
    """
    counts = np.bincount(classes, minlength=len(names))
    rarest = int(counts.argmin())
    if counts[rarest] < folds:
        fewer = f"give more, or --folds {counts[rarest]}" if counts[rarest] > 1 else "give more"
        raise DataError(
            f"Class {names.names[rarest]} has {counts[rarest]} of the samples, fewer than the {folds} folds; {fewer}."
        )


def _key_inside(source: Source, model: ir.Model) -> str | None:
    """Return the key under which the labels lie with the inputs."""
    inputs = {v.name for v in model.graph.inputs}
    keys: set[str] = set()
    if isinstance(source, Mapping):
        keys = set(source)
    elif not isinstance(source, Data) and Path(source).is_file() and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
    return next((key for key in KEYS if key in keys and key not in inputs), None)


def _inside(source: Source, key: str) -> Array:
    if isinstance(source, Mapping):
        return np.asarray(source[key])
    assert not isinstance(source, Data)
    try:
        with np.load(source, allow_pickle=False) as archive:
            return np.asarray(archive[key])
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        raise DataError(f'{source}: the key "{key}" cannot be read without pickles: {error}') from error


def _from_arrays(arrays: Mapping[str, Any], labels: str | None) -> Data:
    """Return samples of arrays that have one row each along the first axis.

    Raises:
        DataError: If they have different numbers of rows.
    """
    inputs = {name: np.asarray(array) for name, array in arrays.items() if name != labels}
    counts = {len(array) for array in inputs.values() if array.ndim}
    if len(counts) != 1:
        raise DataError(f"The arrays {', '.join(inputs) or '(none)'} need as many samples each, along the first axis.")
    count = counts.pop()
    return Data("arrays", lambda: ({k: a[i : i + 1] for k, a in inputs.items()} for i in range(count)), count)


def _checked(labels: Array, name: str) -> Array:
    """Return labels as one whole number or string per sample.

    Raises:
        DataError: If they are neither.
    """
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1:
        raise DataError(f"{_start(name)} has the shape {list(labels.shape)}; one class per sample is needed.")
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.round(labels)).all():
        return labels.astype(np.int64)
    if labels.dtype.kind not in "iubUS":
        raise DataError(f"{_start(name)} holds {labels.dtype} numbers; classes are whole numbers or strings.")
    if labels.dtype.kind == "S":
        return np.char.decode(labels, "utf-8")
    return labels.astype(np.int64) if labels.dtype.kind in "iub" else labels


def _start(name: str) -> str:
    return name[:1].upper() + name[1:] if name.startswith("the key") else name
