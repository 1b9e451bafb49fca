"""Broken checkpoint folders end in typed errors; `python -m benchmarks.folder_fuzz` tries many more."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from benchmarks import folder_fuzz
from benchmarks.fuzz import Random

SEEDS = range(5000, 5045)


def test_broken_folders_end_in_typed_errors(tmp_path: Path) -> None:
    found = {seed: folder_fuzz.outcome(seed, tmp_path) for seed in SEEDS}
    assert not {seed: text for seed, (_, text) in found.items() if text}
    kinds = collections.Counter(kind for kind, _ in found.values())
    assert sum(times for kind, times in kinds.items() if kind != "result") >= 10, "the control: folders are broken"
    assert kinds["result"] >= 5, "the control: folders can be read"


def _name(way: object) -> str:
    return str(getattr(way, "__name__", way))


@pytest.mark.parametrize("way", sorted({*folder_fuzz.WAYS}, key=_name), ids=_name)
def test_each_way_changes_the_folder(way: folder_fuzz.Way) -> None:
    content = folder_fuzz.sound("plain")
    changed = []
    for seed in range(8):
        files = dict(content)
        way(files, Random(seed))
        changed.append(files)
    assert [files != content for files in changed].count(True) >= 4
    files = dict(content)
    way(files, Random(7))
    assert files == changed[7], "a seed repeats"


def test_a_fault_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path, kind: str, seed: int) -> None:
        raise KeyError("gone")

    def litters(folder: Path, kind: str, seed: int) -> None:
        (folder.parent / "left").touch()

    monkeypatch.setattr(folder_fuzz, "use", fails)
    kind, text = folder_fuzz.outcome(0, tmp_path)
    assert kind == "fault" and "KeyError at test_folder_fuzz.py" in text
    monkeypatch.setattr(folder_fuzz, "use", litters)
    assert folder_fuzz.outcome(1, tmp_path)[1].startswith("something was left behind")
