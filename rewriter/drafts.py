"""Half-written files and folders: their names, whose they are, removing what killed processes left, and full disks.

A draft of `NAME` lies beside it as `.NAME.PROCESS-TOKEN.tmp`, so that a later call can tell whether its writer lives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rewriter.errors import CannotWrite, UsageError, first_line

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NEARLY_NOTHING = 1 << 20


@dataclass(frozen=True)
class Draft:
    """Something half-written that was found on disk.

    Attributes:
        path: where it lies; process: who writes it; token: of one call; kind: which of the call's drafts it is.
    """

    path: Path
    process: int
    token: str
    kind: str

    @property
    def is_stale(self) -> bool:
        return not is_alive(self.process)

    def remove(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def new_token() -> str:
    return secrets.token_hex(4)


def draft_path(target: Path, token: str, kind: str = "") -> Path:
    """Where a call with this token writes what is to become `target`; `kind` tells several drafts of it apart."""
    middle = f".{kind}" if kind else ""
    return target.with_name(f".{target.name}.{os.getpid()}-{token}{middle}.tmp")


def drafts_of(target: Path) -> list[Draft]:
    """All drafts of `target` beside it, by whomever."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-([0-9a-f]{{8}})(?:\.([a-z]+))?\.tmp")
    found = ((file, pattern.fullmatch(file.name)) for file in sorted(target.parent.iterdir()))
    return [Draft(file, int(match[1]), match[2], match[3] or "") for file, match in found if match is not None]


def sweep(target: Path) -> None:
    """Remove what killed writers of `target` left beside it."""
    for draft in drafts_of(target):
        if draft.is_stale:
            draft.remove()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OSError, OverflowError):
        return True
    return True


def sync_folder(folder: Path) -> None:
    """What was renamed in it is on disk; some file systems cannot do that for folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------- what the system refuses


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Failures of the system on the way to `target` become errors that say what to do.

    Raises:
        UsageError: the place may not be written to.
        CannotWrite: the disk is full, or failed.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # libraries in C++ wrap what the system told them
        refusal = _refusal(error, target)
        if refusal is None:
            raise
        raise refusal from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError" or (refusal := _refusal(error, target)) is None:
            raise
        raise refusal from error


def _refusal(error: Exception, target: Path) -> CannotWrite | UsageError | None:
    number = _errno(error, target)
    if number in _FORBIDDEN:
        return UsageError(f"{target} cannot be written", hint="check the folder's permissions")
    if number in _FULL:
        return CannotWrite(f"{target} cannot be written: the disk is full", hint="free some space, then run it again")
    if number == errno.EIO:
        return CannotWrite(f"{target} cannot be written: {first_line(error)}", hint="check the disk")
    return None


def _errno(error: Exception, target: Path) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    named = re.search(r"\bos error (\d+)\b", text)  # safetensors
    if named is not None:
        return int(named[1])
    if "PytorchStreamWriter" in text or "unexpected pos" in text:  # torch.save
        with contextlib.suppress(OSError):
            return errno.ENOSPC if shutil.disk_usage(target.parent).free < _NEARLY_NOTHING else errno.EIO
    return None
