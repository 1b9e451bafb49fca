"""Folders for one call: gone at its end, and after a kill with the next call."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from codegen.scratch import scratch_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _killed() -> int:
    """The number of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


def test_it_is_private_and_goes(home: Path) -> None:
    with pytest.raises(KeyError), scratch_folder() as folder:
        assert folder.parent == home and stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "file").write_text("x")
        raise KeyError
    assert list(home.iterdir()) == []


def test_what_a_killed_process_left_goes_and_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, elsewhere = _killed(), home / "elsewhere"
    for name in (f"rewriter-{dead}-abcdefgh", f"rewriter-{os.getpid()}-abcdefgh", "rewriter-notes", "elsewhere"):
        (home / name).mkdir()
        (home / name / "file").write_text("x")
    (home / f"rewriter-{dead}-linkedto").symlink_to(elsewhere)
    (home / f"rewriter-{dead}-file1234").write_text("x")
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: os.geteuid() + 1)
        with scratch_folder():
            assert (home / f"rewriter-{dead}-abcdefgh").exists(), "it is another user's"
    with scratch_folder():
        pass
    left = {path.name for path in home.iterdir()}
    assert left == {
        f"rewriter-{os.getpid()}-abcdefgh", f"rewriter-{dead}-linkedto", f"rewriter-{dead}-file1234", "rewriter-notes",
        "elsewhere",
    }  # fmt: skip
    assert (elsewhere / "file").exists()
