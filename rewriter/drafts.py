"""Half-written files and folders: their names, whose they are, removing what killed processes left, and full disks.

A draft of `NAME` lies beside it as `.NAME.PROCESS-TOKEN.tmp`, so that a later call can tell whether its writer lives.
Of a long name a draft has the beginning and a hash, since names end at 255 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from codegen.scratch import is_alive
from rewriter.errors import CannotWrite, UsageError, first_line

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_PLACE = {
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
    errno.ELOOP: ("it is a link that leads to itself", "remove it, or name another place"),
    errno.ENOTDIR: ("a part of its path is no folder", "name another place"),
    errno.EISDIR: ("it is a folder", "name another place"),
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DATA_SUFFIX = ".01234567.data"
"""The longest that the name of a data file has behind the name of its model: a token and a suffix."""

_NEARLY_NOTHING = 1 << 20
_LONG, _KEPT = 180, 100
"""Bytes of a name from which drafts shorten it, and bytes that they keep of it."""


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
    return target.with_name(f".{_stem(target.name)}.{os.getpid()}-{token}{middle}.tmp")


def _stem(name: str) -> str:
    encoded = os.fsencode(name)
    if len(encoded) <= _LONG:
        return name
    return f"{encoded[:_KEPT].decode(errors='ignore')}~{hashlib.sha256(encoded).hexdigest()[:16]}"


def drafts_of(target: Path) -> list[Draft]:
    """All drafts of `target` beside it, by whomever."""
    pattern = re.compile(rf"\.{re.escape(_stem(target.name))}\.(\d+)-([0-9a-f]{{8}})(?:\.([a-z]+))?\.tmp")
    found = ((file, pattern.fullmatch(file.name)) for file in sorted(target.parent.iterdir()))
    return [Draft(file, int(match[1]), match[2], match[3] or "") for file, match in found if match is not None]


def sweep(target: Path) -> None:
    """Remove what killed writers of `target` left beside it."""
    for draft in drafts_of(target):
        if draft.is_stale:
            draft.remove()


def sync_folder(folder: Path) -> None:
    """What was renamed in it is on disk; some file systems cannot do that for folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------- what the system refuses


def require_place(target: Path, *, longer: int = 0) -> None:
    """What is written replaces what is there: that must be a file, a folder or nothing.

    Args:
        longer: bytes by which the longest name that is written beside `target` is longer than its own.

    Raises:
        UsageError: it is a device, a pipe or a socket, which would be gone; it lies among these; or the system takes no
            such name.
    """
    try:
        os.lstat(os.fspath(target) + "x" * longer)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        refusal = _refusal(error, target)
        raise refusal or UsageError(
            f"{target} cannot be written: {first_line(error)}", hint="name another place"
        ) from error
    if _belongs_to_the_system(target):  # where /dev/stdout is a link, and to a file if output is redirected
        raise UsageError(f"{target} is no place for a file", hint="name one in a folder of your own")
    try:
        kind = target.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refusal(error, target) or error from error
        return  # nothing is there, or a link to nothing
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise UsageError(
            f"{target} is a device or a pipe, which a file would take the place of", hint="name a file or a folder"
        )


def _belongs_to_the_system(target: Path) -> bool:
    folder = os.path.realpath(target.absolute().parent)
    return folder in {"/dev", "/proc", "/sys"} or folder.startswith(("/proc/", "/sys/"))


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Failures of the system on the way to `target` become errors that say what to do.

    Raises:
        UsageError: the place may not be written to.
        CannotWrite: the disk is full, or failed.
    """
    require_place(target)
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
    if number in _NO_PLACE:
        reason, hint = _NO_PLACE[number]
        return UsageError(f"{target} cannot be written: {reason}", hint=hint)
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
