"""The store of built kernels: built once, whole or not at all, and only from a folder that is the user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from codegen import cache
from codegen.errors import CorruptBinary, UnsafeCache, UnusableCache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write(text: str, calls: list[str] | None = None) -> cache.Build:
    def build(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "kernel.so").write_text(text)

    return build


def test_built_once_and_found_again(home: Path) -> None:
    calls: list[str] = []
    first = cache.load_or_build("k-1", _write("one", calls))
    again = cache.load_or_build("k-1", _write("two", calls))
    assert calls == ["one"] and first.built and not again.built
    assert again.file("kernel.so").read_text() == "one"
    assert home.stat().st_mode & 0o777 == 0o700


def test_the_address_depends_on_every_part() -> None:
    parts = {"source": "a", "compiler": "b", "flags": "c"}
    found = {cache.address("k", parts)} | {cache.address("k", {**parts, name: "x"}) for name in parts}
    assert len(found) == 4 and all(a.startswith("k-") for a in found)
    assert cache.address("k", dict(reversed(parts.items()))) == cache.address("k", parts)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(home: Path, mode: int) -> None:
    home.mkdir()
    home.chmod(mode)
    with pytest.raises(UnsafeCache) as refused:
        cache.load_or_build("k-1", _write("one"))
    assert "chmod 700" in refused.value.hint and not list(home.iterdir())
    home.chmod(0o700)
    cache.load_or_build("k-1", _write("one"))
    (home / "k-1").chmod(mode)
    with pytest.raises(UnsafeCache):
        cache.load_or_build("k-1", _write("one"))


def test_a_folder_of_somebody_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(UnsafeCache, match="another user"):
        cache.root()


def test_a_folder_that_anybody_may_replace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private folder in one that everybody may write to can be swapped for another; with the sticky bit it cannot."""
    above = tmp_path / "above"
    above.mkdir()
    monkeypatch.setenv("REWRITER_CACHE", str(above / "cache"))
    above.chmod(0o777)
    with pytest.raises(UnsafeCache, match="every user may replace"):
        cache.root()
    above.chmod(0o1777)
    assert cache.root() == (above / "cache").resolve()


def test_links_are_followed_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may turn the link later has no say: what it led to was checked, and that is used."""
    link = tmp_path / "link"
    home.mkdir(mode=0o700)
    link.symlink_to(home)
    monkeypatch.setenv("REWRITER_CACHE", str(link))
    entry = cache.load_or_build("k-1", _write("one"))
    assert entry.folder.parent == home.resolve()
    (home / "k-2").symlink_to(home / "k-1")
    again = cache.load_or_build("k-2", _write("two"))
    assert again.built and not again.folder.is_symlink() and again.file("kernel.so").read_text() == "two"


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("REWRITER_CACHE", str(place))
        with pytest.raises(UnusableCache) as refused:
            cache.root()
        assert "REWRITER_CACHE" in refused.value.hint


def test_what_a_killed_build_left_goes_with_the_next(home: Path) -> None:
    home.mkdir(mode=0o700)
    for name in (".k-1.abcd1234", ".k-10.abcd1234"):
        (home / name).mkdir()
        (home / name / "kernel.so").write_text("half")
    cache.load_or_build("k-1", _write("one"))
    assert not (home / ".k-1.abcd1234").exists() and (home / ".k-10.abcd1234").exists()


def test_a_changed_binary_is_built_anew_and_never_handed_out(home: Path) -> None:
    entry = cache.load_or_build("k-1", _write("one"))
    (entry.folder / "kernel.so").write_text("evil")
    with pytest.raises(CorruptBinary):
        entry.file("kernel.so")
    again = cache.load_or_build("k-1", _write("one"))
    assert again.built and again.file("kernel.so").read_text() == "one"
    (again.folder / cache.MANIFEST).write_text("{")
    assert cache.load_or_build("k-1", _write("one")).built


def test_a_file_that_the_manifest_does_not_name_is_not_handed_out(home: Path) -> None:
    entry = cache.load_or_build("k-1", _write("one"))
    (entry.folder / "other.so").write_text("evil")
    with pytest.raises(CorruptBinary):
        entry.file("other.so")


def test_a_failed_build_leaves_nothing_behind(home: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "kernel.so").write_text("half")
        raise RuntimeError("compiler died")

    with pytest.raises(RuntimeError):
        cache.load_or_build("k-1", fail)
    assert [p.name for p in home.iterdir()] == ["k-1.lock"]
    assert cache.load_or_build("k-1", _write("one")).built


_PROCESS = """
import json, sys, time
from pathlib import Path
from codegen import cache
def build(folder):
    with open(sys.argv[1], "a") as log: log.write("built\\n")
    time.sleep(0.5)
    (folder / "kernel.so").write_text("one")
entry = cache.load_or_build("k-1", build)
print(json.dumps([entry.built, entry.file("kernel.so").read_text()]))
"""


def test_of_two_processes_one_builds_and_the_other_waits(home: Path, tmp_path: Path, project_root: Path) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    command = [sys.executable, "-c", _PROCESS, str(log)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert sorted(built for built, _ in answers) == [False, False, True]
    assert all(text == "one" for _, text in answers) and log.read_text() == "built\n"
