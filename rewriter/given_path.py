"""Paths that a person gave: whether something lies there, told without an error of the system's own."""

from __future__ import annotations

import os
from pathlib import Path

from rewriter.errors import UsageError


def existing(path: str | os.PathLike[str]) -> Path:
    """`path`, where something lies; raises UsageError for anything else: no such file, or no name of a file at all."""
    if not os.path.exists(path):  # pathlib's own question raises where a name is too long
        raise UsageError(f"no such file: {os.fspath(path)}", hint="check the path")
    return Path(path)
