"""Broken files that a rewrite wrote end in typed errors; `python -m benchmarks.rewritten_fuzz` tries many more."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest

from benchmarks import rewritten_fuzz
from benchmarks.fuzz import Random

SEEDS = range(5000, 5020)


def test_broken_rewrites_end_in_typed_errors(tmp_path: Path) -> None:
    found = {seed: rewritten_fuzz.outcome(seed, tmp_path) for seed in SEEDS}
    assert not {seed: text for seed, (_, text) in found.items() if text}
    kinds = collections.Counter(kind for kind, _ in found.values())
    assert sum(times for kind, times in kinds.items() if kind != "result") >= 5, "the control: files are broken"
    assert kinds["result"] >= 2, "the control: rewritten files are read"
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def _name(way: object) -> str:
    return str(getattr(way, "__name__", way))


@pytest.mark.parametrize("way", sorted({*rewritten_fuzz.WAYS}, key=_name), ids=_name)
def test_each_way_changes_the_file(way: rewritten_fuzz.Way) -> None:
    content = rewritten_fuzz.sound("window")
    changed = []
    for seed in range(6):
        model = onnx.load_from_string(content)
        way(model, Random(seed))
        changed.append(model.SerializeToString())
    assert [file != content for file in changed].count(True) >= 4
    assert rewritten_fuzz.broken(7) == rewritten_fuzz.broken(7) != rewritten_fuzz.broken(8)


def test_a_fault_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(rewritten_fuzz.rewriter, "inspect", fails)
    kind, text = rewritten_fuzz.outcome(0, tmp_path)
    assert kind == "fault" and "inspect: KeyError at test_rewritten_fuzz.py" in text
