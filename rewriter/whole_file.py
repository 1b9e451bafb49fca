"""Writes a file so that it appears whole or not at all: beside its place first, then moved there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(content: str | bytes, target: Path, *, mode: int = 0o644) -> Path:
    """Write text (as UTF-8) or bytes to `target` and return it; a failure leaves what was there before."""
    handle, draft = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(draft, mode)
        os.replace(draft, target)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return target
