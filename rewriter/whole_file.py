"""Writes a file so that it appears whole or not at all: beside its place first, then moved there."""

from __future__ import annotations

import os
from pathlib import Path

from rewriter.drafts import draft_path, new_token, sweep, sync_folder, writing


def write_whole(content: str | bytes, target: Path, *, mode: int = 0o644) -> Path:
    """Write text (as UTF-8) or bytes to `target` and return it; a failure leaves what was there before.

    Raises UsageError or CannotWrite if the system does not let it; see `rewriter.drafts.writing`.
    """
    place = target.absolute()
    draft = draft_path(place, new_token())
    with writing(target):
        sweep(place)
        try:
            with draft.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(draft, mode)
            os.replace(draft, place)
            sync_folder(place.parent)
        finally:
            draft.unlink(missing_ok=True)
    return target
