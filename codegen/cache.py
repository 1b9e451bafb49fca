"""A content-addressed store of built kernels: one folder per build, made once, whole, and checked before use."""

from __future__ import annotations

import contextlib
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

from codegen.errors import CorruptBinary, UnsafeCache

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

    Raises:
        UnsafeCache: it belongs to somebody else, or others may write to it.
    """
    given = os.environ.get("REWRITER_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rewriter"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_private(folder)
    return folder


def address(name: str, parts: Mapping[str, str]) -> str:
    """A readable name with a hash behind it of everything that the build depends on."""
    return f"{name}-{hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:16]}"


def load_or_build(name: str, build: Build) -> Entry:
    """The entry of this name, built if it is not there; of several processes only one builds.

    An entry whose files are not those of its manifest is built anew.

    Raises:
        UnsafeCache: see `root`; and whatever `build` raises, in which case nothing is left behind.
    """
    home = root()
    folder = home / name
    if _whole(folder):
        return Entry(folder, built=False)
    with _locked(home / f"{name}.lock"):
        if _whole(folder):
            return Entry(folder, built=False)
        _make(home, folder, build)
    return Entry(folder, built=True)


def _make(home: Path, folder: Path, build: Build) -> None:
    draft = Path(tempfile.mkdtemp(dir=home, prefix=f".{folder.name[:40]}."))
    try:
        build(draft)
        digests = {path.name: _digest(path) for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    _require_private(folder)
    digests = _manifest(folder)
    return bool(digests) and all(
        (folder / name).is_file() and _digest(folder / name) == digest for name, digest in digests.items()
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
