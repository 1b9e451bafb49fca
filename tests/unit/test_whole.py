"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rewriter import drafts
from rewriter import whole_folder as module
from rewriter.drafts import writing
from rewriter.errors import CannotWrite, UsageError
from rewriter.whole_file import write_whole
from rewriter.whole_folder import recover, whole_folder

TOKEN = "0123abcd"


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "logs").mkdir(parents=True)
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "notes.txt", "logs/a"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("notes.txt")
    return folder


NEW = {"config.json": "new", "link": "old", "logs/a": "old", "model-1.safetensors": "new", "notes.txt": "old"}


def write(folder: Path) -> None:
    with whole_folder(folder, drop=["model*"]) as draft:
        for name in ("config.json", "model-1.safetensors"):
            (draft / name).write_text("new")


def test_what_was_written_replaces_what_it_should_and_keeps_the_rest(old: Path) -> None:
    write(old)
    assert content(old) == NEW and (old / "link").is_symlink()
    assert [p.name for p in old.parent.iterdir()] == ["out"]
    assert (old / "notes.txt").stat().st_nlink == 1


def test_a_failure_leaves_what_was_there(old: Path, tmp_path: Path) -> None:
    before = content(old)
    for place in (old, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt), whole_folder(place) as draft:
            (draft / "config.json").write_text("new")
            raise KeyboardInterrupt
    assert content(old) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_an_exchange_the_old_folder_is_moved_aside(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_renameat2", lambda: None)
    write(old)
    assert content(old) == NEW and [p.name for p in old.parent.iterdir()] == ["out"]


def test_a_kill_while_it_is_aside_is_undone_by_the_next_call(tmp_path: Path, dead: int) -> None:
    aside, half = tmp_path / f".out.{dead}-{TOKEN}.old.tmp", tmp_path / f".out.{dead}-{TOKEN}.tmp"
    foreign = tmp_path / f".other.{dead}-{TOKEN}.tmp"
    alive = tmp_path / f".out.{os.getppid()}-{TOKEN}.tmp"
    for folder in (aside, half, foreign, alive):
        folder.mkdir()
    (aside / "config.json").write_text("old")
    recover(tmp_path / "out")
    assert content(tmp_path / "out") == {"config.json": "old"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", foreign.name, alive.name}


def test_the_working_directory_stays_the_same_folder(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    number = old.stat().st_ino
    write(Path("."))
    assert content(old) == NEW and old.stat().st_ino == number
    assert Path("config.json").read_text() == "new"


def test_a_link_to_a_folder_stays_one(old: Path, tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to(old)
    write(tmp_path / "named")
    assert (tmp_path / "named").is_symlink() and content(old) == NEW


def test_files_are_whole_and_leftovers_go(tmp_path: Path, dead: int) -> None:
    left = tmp_path / f".a.json.{dead}-{TOKEN}.tmp"
    left.write_text("half")
    write_whole("new", tmp_path / "a.json")
    assert content(tmp_path) == {"a.json": "new"}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "full"), CannotWrite, "the disk is full"),
        (OSError(errno.EFBIG, "large"), CannotWrite, "the disk is full"),
        (OSError(errno.EIO, "bad"), CannotWrite, "bad"),
        (OSError(errno.EROFS, "ro"), UsageError, "cannot be written"),
        (PermissionError(errno.EACCES, "no"), UsageError, "cannot be written"),
        (RuntimeError("I/O error: No space left (os error 28)"), CannotWrite, "the disk is full"),
    ],
    ids=["ENOSPC", "EFBIG", "EIO", "EROFS", "EACCES", "wrapped"],
)
def test_what_the_system_refuses_is_said(tmp_path: Path, error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as told, writing(tmp_path / "out"):
        raise error
    assert getattr(told.value, "hint", "")


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), RuntimeError("x"), KeyError("x")], ids=["a", "b", "c"])
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as told, writing(tmp_path / "out"):
        raise error
    assert told.value is error


# ---------------------------------------------------------------------- places that cannot be written


@pytest.mark.parametrize("length", [181, 250], ids=["long", "longest"])
def test_long_names_have_drafts_too(tmp_path: Path, dead: int, length: int) -> None:
    """What killed calls left is found by the shortened name, and other long names are left alone."""
    target, other = tmp_path / ("é" * 50 + "x" * (length - 100)), tmp_path / ("é" * 50 + "y" * (length - 100))
    stale = drafts.draft_path(target, "01234567")
    stale.write_text("half")
    stale.rename(left := stale.with_name(stale.name.replace(f".{os.getpid()}-", f".{dead}-")))
    write_whole("a", other)
    assert left.exists()
    write_whole("b", target)
    assert not left.exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {other.name: "a", target.name: "b"}


def test_places_that_take_no_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "linked").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("old")
    for name, words in {
        "pipe": "a device or a pipe",
        "linked": "a device or a pipe",
        "loop": "leads to itself",
        "x" * 300: "too long",
        "file/out": "no folder",
    }.items():
        for write in (lambda place: write_whole("new", place), _write_folder):
            with pytest.raises(UsageError, match=words):
                write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode) and (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 4, "and no draft is left"
    with pytest.raises(UsageError, match="too long"):
        drafts.require_place(tmp_path / ("x" * 250), longer=14)
    drafts.require_place(tmp_path / ("x" * 250), longer=0)


@pytest.mark.parametrize(
    "place", ["/dev/stdout", "/dev/fd/1", "/dev/none", "/proc/x.onnx", "/proc/self/fd/1", "/sys/x"]
)
def test_places_among_devices_take_no_output(place: str) -> None:
    """Where output goes to a file, /dev/stdout is a link to one, which would be replaced."""
    with pytest.raises(UsageError) as error:
        drafts.require_place(Path(place))
    assert "folder" in error.value.hint
    drafts.require_place(Path("/dev/shm/x.onnx"))


def _write_folder(place: Path) -> None:
    with whole_folder(place):
        pass
