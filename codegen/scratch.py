"""Folders that last for one call, where temporary files go; what killed processes left goes with the next call.

A folder carries the number of its process, so that a later call can tell whether that lives.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"rewriter-(\d+)-\w{8}")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder that only this user may read, gone when the block ends."""
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=f"rewriter-{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(home: Path) -> None:
    """Others share this place: only folders of this user's go, and no link is followed."""
    for left in home.glob("rewriter-*"):
        found = _NAME.fullmatch(left.name)
        if found is not None and _is_own_folder(left) and not is_alive(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)


def _is_own_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:  # gone meanwhile
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OSError, OverflowError):
        return True
    return True
