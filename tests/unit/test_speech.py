"""What the speech benchmark stands on: a file format that is not ours, word errors, cuts where it is quiet."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ctranslate2_file import variables
from benchmarks.whisper_tiny import END, PROMPT, RATE, taught, windows, word_errors
from rewriter.errors import InvalidModelFile


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def written(version: int = 6) -> bytes:
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    return (
        struct.pack("<I", version) + text("Spec") + struct.pack("<II", 3, 2)
        + text("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, half.nbytes) + half.tobytes()
        + text("a/heads") + struct.pack("<BBI", 0, 2, 2) + struct.pack("<h", 6)
        + struct.pack("<I", 1) + text("b/weight") + text("a/weight")
    )  # fmt: skip


def test_variables_and_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(written())
    found = variables(path)
    assert sorted(found) == ["a/heads", "a/weight", "b/weight"] and found["a/heads"] == 6
    assert found["a/weight"].dtype == np.float16 and found["b/weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("data", "said"), [(written()[:-30], "ends too early"), (written(5), "version 5")])
def test_other_files_are_refused(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(InvalidModelFile, match=said):
        variables(path)


def test_words_are_counted_as_errors_once() -> None:
    assert word_errors("It was the best—of times.", "it was the best of times") == 0
    assert word_errors("one two three four", "one too three") == pytest.approx(2 / 4)
    assert word_errors("one two", "one and two and") == pytest.approx(1.0)


def test_speech_is_cut_where_it_is_quiet() -> None:
    samples = np.ones(50 * RATE, np.float32)
    quiet = int(26.5 * RATE)
    samples[quiet : quiet + RATE // 5] = 0
    first, second = windows(samples)
    assert len(first) + len(second) == len(samples)
    assert quiet < len(first) < quiet + RATE // 5
    assert [len(w) for w in windows(samples[: 20 * RATE])] == [20 * RATE], "control: what is short stays whole"


def test_teaching_shows_prompt_and_text_and_hides_padding() -> None:
    import torch

    given = taught(torch.zeros(2, 80, 4), [[5, 6], [7]])
    assert given["decoder_input_ids"].tolist() == [[*PROMPT, 5, 6], [*PROMPT, 7, END]]
    assert given["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
