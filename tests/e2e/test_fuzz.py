"""Broken .onnx files end in typed errors; `python -m benchmarks.fuzz` tries many more."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest

from benchmarks import fuzz
from benchmarks.bodies import KINDS

SEEDS = range(5000, 5060)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SEEDS.start, SEEDS.stop, 15), ids=lambda seed: f"seed {seed}")
def test_broken_files_end_in_typed_errors(first: int, tmp_path: Path) -> None:
    found = {seed: fuzz.outcome(seed, tmp_path) for seed in range(first, first + 15)}
    assert not {seed: text for seed, (_, text) in found.items() if text}
    kinds = collections.Counter(kind for kind, _ in found.values())
    assert sum(times for kind, times in kinds.items() if kind != "result") >= 3, "the control: files are broken"
    assert not list(tmp_path.glob("*.tmp*")), "nothing is left half-written"


def test_each_way_changes_the_file() -> None:
    content = fuzz.sound(fuzz.MODELS[0])
    for way in fuzz.STRUCTURE:
        texts = set()
        for seed in range(6):
            model = onnx.load_from_string(content)
            way(model, fuzz.Random(seed))
            texts.add(model.SerializeToString())
        assert texts - {content}, way.__name__
    assert fuzz.broken(7) == fuzz.broken(7) != fuzz.broken(8)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_with_bodies_are_rewritten_and_broken_inside(kind: str, tmp_path: Path) -> None:
    content = fuzz.sound(fuzz.MODELS[0], kind)
    (tmp_path / "in.onnx").write_bytes(content)
    assert fuzz.rewriter.optimize(tmp_path / "in.onnx", "mqa").rewrite_report.to_dict()["sites"]
    touched = 0
    for seed in range(12):
        model = onnx.load_from_string(content)
        fuzz.remove_node(model, fuzz.Random(seed))
        touched += len(model.graph.node) == len(onnx.load_from_string(content).graph.node)
    assert touched, "a node of a body was removed, none of the graph"


def test_a_fault_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(fuzz.rewriter, "inspect", fails)
    kind, text = fuzz.outcome(0, tmp_path)
    assert kind == "fault" and "KeyError at test_fuzz.py" in text
