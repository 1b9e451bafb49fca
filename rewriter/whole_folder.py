"""Writes a folder so that it appears whole or not at all, and takes the place of an older one in one moment."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rewriter.drafts import draft_path, drafts_of, new_token, require_place, sync_folder, writing

_ASIDE = "old"
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_AT_CWD = -100


@contextlib.contextmanager
def whole_folder(target: Path, *, drop: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write into; when the block ends without an error, it is `target`.

    What an existing `target` holds goes along (as hard links, so nothing is copied), but for what the block wrote anew
    and for names that match a pattern of `drop`. On Linux the two folders are exchanged in one step. Where the file
    system cannot do that, the old one is moved aside for a moment, and put back by the next call after a kill.

    A mount point, a folder in one that may not be written to, and the working directory have to stay the folder that
    they are: there files are replaced one by one, and only each file is whole at any moment.

    Raises UsageError or CannotWrite if the system does not let it; see `rewriter.drafts.writing`.
    """
    require_place(target)
    place = Path(os.path.realpath(target))
    inside = _must_stay(place)
    base = place / place.name if inside else place
    with writing(target):
        recover(base)
        draft = draft_path(base, new_token())
        draft.mkdir()
        try:
            yield draft
            _sync(draft)
            if inside:
                _move_in(draft, place, drop)
            else:
                _put(draft, place, drop)
            sync_folder(base.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def recover(place: Path) -> None:
    """Remove drafts that killed calls left beside `place`, and put the old folder back if one was killed in between."""
    for draft in drafts_of(place):
        if not draft.is_stale:
            continue
        if draft.kind == _ASIDE and not place.exists():
            draft.path.rename(place)
        else:
            draft.remove()


def _must_stay(place: Path) -> bool:
    if not place.is_dir():
        return False
    return place.is_mount() or place.parent == place or not os.access(place.parent, os.W_OK) or _holds_cwd(place)


def _holds_cwd(place: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(place)
    except FileNotFoundError:  # the working directory is gone
        return False


def _put(draft: Path, place: Path, drop: Sequence[str]) -> None:
    if not place.exists():
        os.rename(draft, place)
        return
    _take_along(place, draft, drop)
    shutil.copymode(place, draft)
    if not _exchange(draft, place):
        aside = draft_path(place, new_token(), _ASIDE)
        os.rename(place, aside)
        os.rename(draft, place)
        shutil.rmtree(aside, ignore_errors=True)


def _take_along(old: Path, new: Path, drop: Sequence[str]) -> None:
    for entry in old.iterdir():
        other = new / entry.name
        if os.path.lexists(other) or _matches(entry.name, drop):
            continue
        if entry.is_symlink():
            other.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            shutil.copytree(entry, other, symlinks=True, copy_function=_link)
        elif entry.is_file():
            _link(entry, other)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # the file system has no hard links, or not across its parts
        shutil.copy2(source, target)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False if system or file system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    found = getattr(library, "renameat2", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return found


def _move_in(draft: Path, place: Path, drop: Sequence[str]) -> None:
    """File by file: weights first, then what says how to read them; then what is not wanted any more goes."""
    new = sorted(draft.iterdir(), key=lambda entry: (entry.suffix == ".json", entry.name))
    names = {entry.name for entry in new}
    for entry in new:
        old = place / entry.name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        os.replace(entry, old)
    for entry in place.iterdir():
        if entry.name not in names and _matches(entry.name, drop) and not entry.is_dir():
            entry.unlink()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
