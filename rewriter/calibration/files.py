"""Calibration files of the command line: texts, token ids, or a model's named inputs."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from passes.dataflow import Array
from rewriter.calibration.batches import ROWS
from rewriter.errors import UsageError, first_line

_UNPACKED, _RATIO = 1 << 28, 100
"""Bytes, and times the size of the file, that an archive may take: masks and paddings shrink less."""

KINDS = ".txt or .jsonl (texts), .npy (token ids), .npz or .safetensors (named inputs)"


def read_calibration(path: Path, *, what: str = "calibration") -> Any:
    """What `optimize` takes as calibration; `what` names the file's purpose in errors.

    .txt: one text a line. .jsonl: one JSON value a line, a text or an object with a key "text". .npy: integer ids.
    .npz and .safetensors: the model's inputs by name; their first axis is cut into batches of 16 rows.

    Raises UsageError for a missing, broken, empty or unknown file.
    """
    if not os.path.isfile(path):
        raise UsageError(f"no such {what} file: {path}", hint="check the path")
    try:
        found = _read(path)
        count = len(found)
    except Exception as error:  # readers of arrays, archives and JSON raise in ways of their own, if memory ends too
        raise UsageError(f"the {what} file {path} cannot be read: {first_line(error)}", hint=f"give {KINDS}") from error
    if not count:
        raise UsageError(f"the {what} file {path} is empty", hint=f"give {KINDS}")
    return found


def _read(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        _require_proportion(path)
        with np.load(path, allow_pickle=False) as arrays:
            return _cut(dict(arrays))
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return _cut(load_file(path))
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        return [_text(line) for line in lines]
    if path.suffix == ".txt":
        return lines
    raise ValueError(f"unknown kind {path.suffix!r}")


def _require_proportion(path: Path) -> None:
    """A compressed archive of a few kilobytes can hold any number of zeros."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > _UNPACKED and unpacked > _RATIO * path.stat().st_size:
        raise ValueError(f"it holds {path.stat().st_size:,} bytes and would take {unpacked:,}")


def _text(line: str) -> str:
    value = json.loads(line)
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f'a line holds neither a text nor an object with a "text": {line[:60]}')
    text.encode()  # half a character, which JSON can write, is no text
    return text


def _cut(inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Batches of a few rows; arrays must have equally many."""
    if not all(isinstance(a, np.ndarray) for a in inputs.values()):
        raise ValueError("something in it is no array")
    if len({len(a) for a in inputs.values()}) != 1:
        raise ValueError("the arrays have different numbers of rows")
    rows = len(next(iter(inputs.values())))
    return [{k: a[i : i + ROWS] for k, a in inputs.items()} for i in range(0, rows, ROWS)]
