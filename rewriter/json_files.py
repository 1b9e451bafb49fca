"""Reads JSON that may come from a stranger: damaged, nested without end, or absurdly large is an error with a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewriter.errors import InvalidModelFile, first_line

LARGEST = 1 << 28
"""Bytes that are read at most; the index of a checkpoint of a trillion parameters takes a tenth of that."""


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises InvalidModelFile if the file cannot be read, or holds anything else.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it takes {file.stat().st_size:,} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the decoder recurses at every bracket
        raise InvalidModelFile(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InvalidModelFile(f"{file} is not a JSON object")
    return found
