"""Commands that are killed, interrupted or starved; `python -m benchmarks.faults` does it many more times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_operations import OPERATIONS, Operation

SEED = 1
FILES = ("rewrite onnx with external data in place", "rewrite folder", "kernels")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES, ids=[name.replace(" ", "-") for name in FILES])
def test_the_output_is_the_old_one_or_the_new_one(name: str, tmp_path: Path) -> None:
    bench = faults.Bench(OPERATIONS[name], tmp_path, SEED)
    for tally in (bench.killed_at_steps(2), bench.interrupted(1), bench.short_of_space(1)):
        assert not tally.problems, tally.fault
        assert sum(tally.outcomes.values()) >= 1


@pytest.mark.slow
def test_training_that_is_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    tally = faults.Bench(OPERATIONS["uptrain"], tmp_path, SEED).killed_at_steps(2)
    assert not tally.problems and sum(tally.outcomes.values()) == 2


@pytest.mark.slow
def test_kernels_are_built_once_and_bad_compilers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("hangs in a process of its own", "writes nothing")
    monkeypatch.setattr(faults, "COMPILERS", {kind: faults.COMPILERS[kind] for kind in kinds})
    tallies = [faults.building_at_once(tmp_path, 3), *faults.bad_compilers(tmp_path)]
    assert [tally.problems for tally in tallies] == [[], [], []]


def test_an_output_that_is_torn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: of a writer that writes in place, neither kills nor interruptions go unnoticed."""

    def prepare(folder: Path) -> None:
        (folder / "out").write_text("old")

    def seen(folder: Path) -> str:
        return (folder / "out").read_text()

    torn = Operation("torn", prepare, lambda folder: [], seen)
    bench = faults.Bench.__new__(faults.Bench)
    bench.operation, bench.old, bench.new, bench.names = torn, "old", "new", ["out"]
    (tmp_path / "out").write_text("ne")
    monkeypatch.setattr(faults, "run", lambda *_, **__: faults.Child(0, "", 1))
    tally = faults.Tally("torn", "killed")
    bench._judge(tally, tmp_path, "here")
    assert tally.outcomes == {"something else": 1} and len(tally.problems) == 2 and not tally.row(0).ok
    (tmp_path / "out").write_text("new")
    (tmp_path / ".out.1-01234567.tmp").write_text("half")
    tally = faults.Tally("torn", "killed")
    bench._judge(tally, tmp_path, "here")
    assert tally.outcomes == {"new": 1} and "names after the next run" in tally.problems[0]
