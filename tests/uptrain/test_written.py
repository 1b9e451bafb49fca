"""Training on text that the teacher writes: it can be taken up anywhere, heals a student, and is refused elsewhere."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rewriter
from rewriter import Recipe
from rewriter.errors import UnsupportedModel
from rewriter.uptrain.command import data_of
from rewriter.uptrain.written import TOGETHER, WrittenRows, written_rows
from tests.uptrain.small_models import bert, equal, llama, student_of, token_ids, weights

RECIPE = Recipe(steps=6, batch=4, window=8, learning_rate=3e-3, validation=8, save_every=2)


@pytest.fixture(scope="module")
def teacher() -> Iterator[Any]:
    yield llama()


def taken(rows: WrittenRows, start: int, count: int) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in itertools.islice(rows.since(start), count)]


def test_written_rows_are_taken_up_anywhere(teacher: Any) -> None:
    rows = written_rows(teacher, 8, 0, 4, None)
    straight = taken(rows, 0, TOGETHER + 8)
    assert {len(ids) for ids in straight} == {8} and rows.tokens == 8
    for start in (3, TOGETHER, TOGETHER + 5):
        assert taken(rows, start, TOGETHER + 8 - start) == straight[start:]
    held = [row["input_ids"].tolist() for row in rows.validation]
    assert len(held) == 4 and not [ids for ids in held if ids in straight]
    assert len({tuple(ids) for ids in straight}) == len(straight), "no text comes twice"
    other = written_rows(teacher, 8, 1, 4, None)
    assert taken(other, 0, 4) != straight[:4] and other.fingerprint != rows.fingerprint
    assert written_rows(llama(seed=1), 8, 0, 4, None).fingerprint != rows.fingerprint


def test_windows_are_no_longer_than_the_model_reads(teacher: Any) -> None:
    assert written_rows(teacher, 500, 0, 1, None).tokens == teacher.config.max_position_embeddings


def test_held_out_text_may_be_given(teacher: Any) -> None:
    given = [{"input_ids": np.arange(8)}]
    assert written_rows(teacher, 8, 0, 4, given).validation == given


def test_students_heal_on_what_their_teacher_writes(teacher: Any, tmp_path: Path) -> None:
    """Nearer on text that nobody wrote, too; and a run that was cut is the same run."""
    student, ids = student_of(teacher), token_ids(512).reshape(-1, 8)
    recipe = Recipe(steps=40, batch=8, window=8, learning_rate=3e-3, save_every=20)
    old = weights(teacher)
    done = rewriter.uptrain(student, teacher, "sampled", validation=ids, recipe=recipe, checkpoints=tmp_path / "whole")
    assert equal(weights(teacher), old) and done.tokens == 40 * 8 * 8
    assert done.after.kl is not None and done.before.kl is not None and done.after.kl < 0.7 * done.before.kl
    shutil.copytree(tmp_path / "whole" / "step-000000020", tmp_path / "cut" / "step-000000020")
    again = rewriter.uptrain(
        student_of(teacher), teacher, "sampled", validation=ids, recipe=recipe, checkpoints=tmp_path / "cut",
        resume=True,
    )  # fmt: skip
    assert again.resumed_from == 20 and equal(weights(again.model), weights(student))


def test_what_writes_no_text_is_refused() -> None:
    encoder = bert()
    with pytest.raises(UnsupportedModel, match="does not write text") as caught:
        rewriter.uptrain(student_of(encoder), encoder, "sampled", recipe=RECIPE)
    assert caught.value.hint


def test_the_command_line_knows_the_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_of([Path("sampled")]) == "sampled"
    assert data_of([Path("sampled"), Path("more.txt")]) == [Path("sampled"), Path("more.txt")]
    Path("sampled").write_bytes(b"")  # a file of that name is a file
    assert data_of([Path("sampled")]) == [Path("sampled")]
