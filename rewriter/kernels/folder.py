"""The folder that `rewriter kernels` writes: its names, its manifest, and finding the library in it again."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from codegen.registry import Choice
from rewriter.errors import InvalidModelFile, UsageError
from rewriter.whole_file import write_whole

MANIFEST = "manifest.json"
LIBRARY = "rewriter_ops.so"


def library_in(folder: Path) -> Path:
    """The onnxruntime library of a folder that `rewriter kernels` wrote, unchanged since.

    Raises:
        UsageError: there is no such folder, no library in it, or everybody may write to it.
        InvalidModelFile: the manifest is broken, or the library is not the one it describes.
    """
    if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
        raise UsageError(
            f"every user may write to {folder}, and what lies there is run", hint=f"chmod o-w {folder}, and build anew"
        )
    manifest = read_manifest(folder)
    library = manifest.get("library")
    if not isinstance(library, dict):
        raise UsageError(f"{folder} holds no library for onnxruntime", hint="make it from an .onnx file")
    path = folder / LIBRARY
    if not path.is_file() or digest(path) != library.get("sha256"):
        raise InvalidModelFile(f"{path} is not the library that was built", hint="run rewriter kernels again")
    return path.absolute()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UsageError if there is none, InvalidModelFile if it is broken."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} is no folder of kernels", hint="name one that rewriter kernels wrote, or off")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidModelFile(f"{path} is broken: {error}") from error
    if not isinstance(found, dict):
        raise InvalidModelFile(f"{path} is broken")
    return found


def described(choice: Choice) -> dict[str, Any]:
    """A kernel's spec as a manifest has it; enums by their values."""
    found = {n: f.value if isinstance(f, Enum) else f for n, f in asdict(choice.spec).items()}
    return {"op": type(choice.spec).__name__, **found, "dtype": choice.dtype.value}


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy(source: Path, target: Path) -> Path:
    """Copy a file and its mode so that `target` appears whole."""
    return write_whole(source.read_bytes(), target, mode=stat.S_IMODE(source.stat().st_mode))
