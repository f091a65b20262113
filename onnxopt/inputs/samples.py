"""The user's own inputs and labels.

Three forms: an .npz with one array per input and the samples along the first axis; an .npz with keys such as
`0000/input`, one group per sample; a folder of such files. Or a function of the user's that yields dicts. Pickles
are never loaded.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError
from onnxopt.inputs.archives import DAMAGED, open_archive
from onnxopt.inputs.data import Data
from onnxopt.inputs.functions import from_function
from onnxopt.inputs.slots import slots_of

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_data(source: str | os.PathLike[str], model: ir.Model, *, ignore: Collection[str] = ()) -> Data:
    """Open the user's inputs and check that they fit the model.

    Args:
        source: An .npz, a folder of .npz, or "module:function" where the function yields one dict per sample. The
            module is looked for in the current folder too.
        model: The model they are for.
        ignore: Keys of an .npz that are no inputs, such as labels.

    Raises:
        DataError: If there is nothing there, or it does not fit. The message names file, key and what is expected.
    """
    slots = slots_of(model)
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix == ".npz"), key=lambda f: _natural(f.name))
        if not files:
            raise DataError(f"The folder {path} holds no .npz files.")
        return _joined(str(path), [open_archive(f, slots, ignore) for f in files])
    if path.is_file():
        return _joined(str(path), [open_archive(path, slots, ignore)])
    if _FUNCTION.fullmatch(text):
        return from_function(text, slots)
    raise DataError(
        f"There is no data {text}; give an .npz, a folder of .npz, or module:function for a function that yields dicts."
    )


def load_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """Read labels, one per sample along the first axis, from an .npy or from an .npz with a single array.

    Raises:
        DataError: If the file cannot be read, or holds another number of arrays.
    """
    path = Path(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            labels = loaded
        else:
            with loaded:
                if len(loaded.files) != 1:
                    raise DataError(f"{path} holds {len(loaded.files)} arrays; labels are an .npy or an .npz of one.")
                labels = loaded[loaded.files[0]]
    except FileNotFoundError as error:
        raise DataError(f"There is no file of labels {path}.") from error
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read as an .npy or .npz of labels without pickles: {error}") from error
    if labels.ndim == 0:
        raise DataError(f"{path} holds a single number; labels need one entry per sample.")
    return labels


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which 2.npz comes before 10.npz."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _joined(name: str, parts: list[Data]) -> Data:
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return Data(name, lambda: itertools.chain.from_iterable(parts), sum(len(p) for p in parts), tuple(notes))
