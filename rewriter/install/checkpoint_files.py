"""The files of a checkpoint: whether all are its own, which are its shards, and how much they hold."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rewriter.errors import InvalidModelFile
from rewriter.json_files import read_object

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_READ = (".json", ".safetensors", ".bin")
_A_PICKLED_TENSOR = 64
"""Bytes that a tensor takes at least in a pickle that is no zip file."""


def is_own(file: Path) -> bool:
    """Whether a file of a checkpoint lies in its folder, or where a download cache keeps what its folders link to."""
    folder = Path(os.path.realpath(file.parent))
    above = folder.parent.parent
    allowed = [folder, above / "blobs"]
    if above.name == "snapshots":  # a folder in a snapshot
        allowed.append(above.parent / "blobs")
    return Path(os.path.realpath(file)).parent in allowed


def require_own_files(folder: Path) -> None:
    """What is read of a checkpoint must be its own: a link or an index could carry any file into the output.

    Raises InvalidModelFile for links that lead elsewhere and indices that name files elsewhere, or are broken.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ:
            require_own(file)
    for name in INDICES:
        if (folder / name).is_file():
            shards(folder / name)


def require_own(file: Path) -> None:
    """Raises InvalidModelFile for a link that leads out of the checkpoint."""
    if file.is_symlink() and not is_own(file):
        raise InvalidModelFile(
            f"{file} is unsafe: it is a link that leads out of the checkpoint",
            hint="put the file itself there, or give the folder that it leads to",
        )


def shards(index: Path) -> tuple[str, ...]:
    """The file names of an index, sorted.

    Raises InvalidModelFile if it is broken, or names files outside its folder.
    """
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InvalidModelFile(f"{index} does not say where tensors lie", hint="download it again")
    names = {str(name) for name in places.values()}
    if any(Path(name).name != name or not name.endswith(_READ[1:]) for name in names):
        raise InvalidModelFile(f"{index} is unsafe: it names files outside its folder", hint="download it again")
    return tuple(sorted(names))


@dataclass(frozen=True)
class Holdings:
    """How much a checkpoint holds, told without reading it: tensors (at most), and bytes of the files with weights."""

    tensors: int
    bytes: int

    @staticmethod
    def of(folder: Path) -> Holdings:
        """Of all files with weights in a folder; what is damaged counts as empty, whoever loads it will say so."""
        files = [f for f in folder.iterdir() if f.suffix in _READ[1:] and f.is_file()]
        return Holdings(sum(map(_tensors, files)), sum(f.stat().st_size for f in files))


def _tensors(file: Path) -> int:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as content:
                return len(content.keys())
        except (OSError, SafetensorError):
            return 0
    try:
        with zipfile.ZipFile(file) as content:
            return len(content.namelist())
    except (OSError, zipfile.BadZipFile):
        return file.stat().st_size // _A_PICKLED_TENSOR
