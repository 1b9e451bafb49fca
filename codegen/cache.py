"""A content-addressed store of built kernels: one folder per build, made once, whole, and checked before use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from codegen.errors import CorruptBinary, UnsafeCache, UnusableCache

MANIFEST = "manifest.json"

Build = Callable[[Path], None]
"""Writes all files of an entry into an empty folder."""


@dataclass(frozen=True)
class Entry:
    """A finished build.

    Attributes:
        folder: holds its files and their manifest.
        built: whether this call made it.
    """

    folder: Path
    built: bool

    def file(self, name: str) -> Path:
        """A file of the entry, once its content is known to be what was built.

        Raises:
            CorruptBinary: it is not.
        """
        path = self.folder / name
        if _manifest(self.folder).get(name) != _digest(path):
            raise CorruptBinary(f"{path} is not what was built", hint=f"remove {self.folder} and try again")
        return path


def root() -> Path:
    """The cache's folder: REWRITER_CACHE, else rewriter/ below XDG_CACHE_HOME or ~/.cache; made if it is missing.

    Links on the way to it are followed once, here: whoever could turn one elsewhere later has no say in what is loaded.

    Raises:
        UnsafeCache: it belongs to somebody else, others may write to it, or anybody may replace a folder above it.
        UnusableCache: it cannot be made.
    """
    given = os.environ.get("REWRITER_CACHE")
    named = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rewriter"
    with _usable(named):
        named.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = named.resolve(strict=True)
    _require_private(folder)
    for above in folder.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise UnsafeCache(
                f"every user may replace what lies in {above}, where the cache of kernels is",
                hint="name a folder of your own in REWRITER_CACHE",
            )
    return folder


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """What the system refuses becomes an error that says what to do."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error.strerror)
        raise UnusableCache(
            f"kernels cannot be kept in {folder}: {reason}",
            hint='name another folder in REWRITER_CACHE, or use kernels="off"',
        ) from error


def address(name: str, parts: Mapping[str, str]) -> str:
    """A readable name with a hash behind it of everything that the build depends on."""
    return f"{name}-{hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:16]}"


def load_or_build(name: str, build: Build) -> Entry:
    """The entry of this name, built if it is not there; of several processes only one builds.

    An entry whose files are not those of its manifest is built anew.

    Raises:
        UnsafeCache, UnusableCache: see `root`; and whatever `build` raises, in which case nothing is left behind.
    """
    home = root()
    folder = home / name
    if _whole(folder):
        return Entry(folder, built=False)
    with _usable(home), _locked(home / f"{name}.lock"):
        if _whole(folder):
            return Entry(folder, built=False)
        _make(home, folder, build)
    return Entry(folder, built=True)


def _make(home: Path, folder: Path, build: Build) -> None:
    """Only one process is here at a time for one entry, so older drafts of it are of builds that were killed."""
    prefix = f".{folder.name}."
    for left in home.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(dir=home, prefix=prefix))
    try:
        build(draft)
        digests = {path.name: _digest(path) for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _whole(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    _require_private(folder)
    digests = _manifest(folder)
    return bool(digests) and all(
        Path(name).name == name and (folder / name).is_file() and _digest(folder / name) == digest
        for name, digest in digests.items()
    )


def _manifest(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _require_private(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise UnsafeCache(f"{folder} belongs to another user", hint="name a folder of your own in REWRITER_CACHE")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeCache(f"other users may write to {folder}, and what lies there is run", hint=f"chmod 700 {folder}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for whoever builds the same entry."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
