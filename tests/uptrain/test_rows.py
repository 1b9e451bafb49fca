"""Training data: windows and rows out of everything a person may give, in an order that can be taken up anywhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rewriter.errors import UsageError
from rewriter.uptrain.batch import collate
from rewriter.uptrain.corpus import Reading, read
from rewriter.uptrain.rows import stored


class Words:
    """A tokenizer of words by length; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, texts: list[str], *, truncation: bool = False, max_length: int = 0, **_: Any) -> dict[str, Any]:
        ids = [[len(word) for word in text.split()] for text in texts]
        return {"input_ids": [i[:max_length] if truncation else i for i in ids]}


def reading(packed: bool = True, window: int = 8, held_out: int = 2, seed: int = 0) -> Reading:
    return Reading(packed, window, Words(), held_out, seed)


def taken(rows: Any, start: int, count: int) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in itertools.islice(rows.since(start), count)]


IDS = np.arange(100, dtype=np.int32)


def test_ids_become_windows_of_which_the_last_are_held_out() -> None:
    rows = read(IDS, reading())
    assert sorted(taken(rows, 0, 11)) == [list(range(8 * i, 8 * i + 8)) for i in range(11)]
    assert [row["input_ids"][0] for row in rows.validation] == [88]


def test_stored_rows_are_taken_up_anywhere() -> None:
    rows = read(IDS, reading())
    straight = taken(rows, 0, 40)
    for start in (0, 3, 11, 12, 25):
        assert taken(rows, start, 40 - start) == straight[start:]
    assert sorted(straight[:11]) == sorted(straight[11:22]) and straight[:11] != straight[11:22]


def test_the_seed_decides_the_order() -> None:
    assert taken(read(IDS, reading(seed=0)), 0, 11) != taken(read(IDS, reading(seed=1)), 0, 11)


@pytest.mark.parametrize("kind", ["npy", "rows.npy", "safetensors", "several"])
def test_token_files(tmp_path: Path, kind: str) -> None:
    wished = taken(read(IDS[:96], reading()), 0, 11)
    if kind == "safetensors":
        save_file({"input_ids": IDS[:96]}, tmp_path / "ids.safetensors")
        given: Any = tmp_path / "ids.safetensors"
    elif kind == "rows.npy":
        np.save(tmp_path / "ids.npy", IDS[:96].reshape(12, 8))
        given = str(tmp_path / "ids.npy")
    elif kind == "npy":
        np.save(tmp_path / "ids.npy", IDS[:96])
        given = tmp_path / "ids.npy"
    else:
        given = [tmp_path / "a.npy", tmp_path / "b.npy"]
        np.save(given[0], IDS[:48])
        np.save(given[1], IDS[48:96])
    assert taken(read(given, reading()), 0, 11) == wished


def test_texts_are_packed_with_ends_and_lines_of_a_file_are_one_text(tmp_path: Path) -> None:
    texts = ["a bb ccc", "dddd e"] * 10
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "text.txt").write_text("\n".join(texts))
    documents = [1, 2, 3, 0, 4, 1, 0] * 10
    for given in (texts, tmp_path / "texts.jsonl"):
        rows = read(given, reading())
        found = sorted([*taken(rows, 0, 7), *(r["input_ids"].tolist() for r in rows.validation)])
        assert found == sorted(documents[i : i + 8] for i in range(0, 64, 8))
    assert 0 not in {i for row in taken(read(tmp_path / "text.txt", reading()), 0, 5) for i in row}


def test_encoders_get_one_text_a_row() -> None:
    rows = read(["a bb ccc", "dddd e", "f", "g g g g g g g g g g g g"], reading(packed=False, held_out=1))
    assert sorted(taken(rows, 0, 3)) == [[1], [1, 2, 3], [4, 1]]
    assert rows.validation[0]["input_ids"].tolist() == [1] * 8
    assert rows.tokens == 2.0


class Stream:
    """A dataset that can only be iterated over, and counts how often."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.passes = items, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.items)


@pytest.mark.parametrize("kind", ["texts", "ids", "text column", "input_ids column", "arrays"])
def test_streams_are_packed_and_taken_up_anywhere(kind: str) -> None:
    lists = [list(range(10 * i, 10 * i + 10)) for i in range(12)]
    texts = [" ".join("x" * (n + 1) for n in ids) for ids in lists]
    items: dict[str, list[Any]] = {
        "texts": texts,
        "text column": [{"text": t, "source": "s"} for t in texts],
        "ids": lists,
        "input_ids column": [{"input_ids": ids, "attention_mask": [1] * 10} for ids in lists],
        "arrays": [np.asarray(ids) for ids in lists],
    }
    rows = read(Stream(items[kind]), reading())
    straight = taken(rows, 0, 40)
    first = rows.validation[0]["input_ids"].tolist()
    assert first == ([1, 2, 3, 4, 5, 6, 7, 8] if "text" in kind else list(range(8)))
    assert first not in straight
    for start in (1, 5, 13, 30):
        assert taken(rows, start, 40 - start) == straight[start:]


def test_a_generator_that_ends_is_said_to() -> None:
    rows = read(iter([list(range(8)) for _ in range(400)]), reading())
    with pytest.raises(UsageError, match="ended"):
        taken(rows, 0, 500)


def test_a_data_loader_gives_batches_of_rows() -> None:
    batches = [{"input_ids": IDS[i : i + 16].reshape(2, 8), "labels": IDS[:2]} for i in range(0, 96, 16)]
    rows = read(Stream(batches), reading())
    assert taken(rows, 0, 10) == [list(range(8 * i, 8 * i + 8)) for i in range(2, 12)]


def test_named_inputs_of_other_models() -> None:
    pixels = np.random.default_rng(0).standard_normal((20, 3, 4, 4), dtype=np.float32)
    rows = read({"pixel_values": pixels}, reading(packed=False))
    batch = collate(list(itertools.islice(rows.since(0), 4)))
    assert batch.inputs["pixel_values"].shape == (4, 3, 4, 4) and batch.valid is None and batch.tokens == 4


# ------------------------------------------------------------------ batches of sequences that are about equally long

BATCH = 4


def ragged(count: int) -> list[Any]:
    """Rows that can be told apart by their last token, of 1 to 12 tokens."""
    lengths = np.random.default_rng(3).integers(0, 12, count)
    return [{"input_ids": [7] * int(n) + [100 + i]} for i, n in enumerate(lengths)]


def ragged_rows(kind: str, count: int, batch: int = BATCH) -> Any:
    how = Reading(False, 16, Words(), 2, 0, batch)
    if kind == "stream":
        return read(Stream(ragged(count)), how)
    arrays = [{"input_ids": np.asarray(row["input_ids"])} for row in ragged(count)]
    return stored(arrays, held_out=2, seed=0, batch=batch)


def spread(rows: Any, batches: int) -> float:
    """Longest less shortest sequence of a batch, on average."""
    lengths = [len(ids) for ids in taken(rows, 0, BATCH * batches)]
    return float(np.mean([np.ptp(lengths[i : i + BATCH]) for i in range(0, len(lengths), BATCH)]))


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_sequences_of_a_batch_are_about_equally_long(kind: str) -> None:
    assert spread(ragged_rows(kind, 402), 100) < 1.5
    assert spread(ragged_rows(kind, 402, batch=1), 100) > 5  # the control


@pytest.mark.parametrize("count", [9, 71, 160], ids=["less than a stretch", "odd", "several stretches"])
@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_grouped_rows_come_once_in_each_pass_and_can_be_taken_up_anywhere(kind: str, count: int) -> None:
    rows = ragged_rows(kind, count)
    each = count - len(rows.validation)
    straight = taken(rows, 0, 3 * each)
    names = [ids[-1] for ids in straight]
    passes = [names[i : i + each] for i in range(0, 3 * each, each)]
    assert all(len(set(one)) == each for one in passes) and sorted(passes[0]) == sorted(passes[2])
    for start in (1, 3, each - 1, each, each + 2, 2 * each + 5):
        assert taken(rows, start, 3 * each - start) == straight[start:]
    lengths = [len(ids) for ids in straight[: each // BATCH * BATCH]]
    means = [np.mean(lengths[i : i + BATCH]) for i in range(0, len(lengths), BATCH)]
    assert len(means) < 4 or means != sorted(means), "batches are shuffled"


def test_sequences_of_one_length_keep_their_order() -> None:
    rows = [{"input_ids": np.asarray([i])} for i in range(100)]
    plain, grouped = (taken(stored(rows, held_out=2, seed=0, batch=batch), 0, 150) for batch in (1, BATCH))
    assert plain == grouped


def test_padding_is_masked() -> None:
    batch = collate([{"input_ids": np.arange(1, 4)}, {"input_ids": np.arange(1, 10)}], pad=7)
    assert batch.inputs["input_ids"][0].tolist() == [1, 2, 3] + [7] * 13
    assert batch.valid is not None and batch.valid.sum(1).tolist() == [3, 9] and batch.tokens == 12
    assert collate([{"input_ids": np.arange(4)}] * 2).valid is None


def test_validation_data_apart() -> None:
    rows = read(IDS, reading(), validation=np.arange(200, 216))
    assert [row["input_ids"][0] for row in rows.validation] == [200, 208]
    assert len({tuple(row) for row in taken(rows, 0, 12)}) == 12


@pytest.mark.parametrize(
    ("data", "what"),
    [
        pytest.param(np.arange(5), "less than one window", id="short"),
        pytest.param(np.arange(10), "too few", id="one window"),
        pytest.param(np.arange(64.0), "dtype", id="floats"),
        pytest.param([], "empty", id="nothing"),
        pytest.param(iter([]), "0 sequences", id="empty stream"),
        pytest.param(5, "int", id="a number"),
        pytest.param(Path("missing.npy"), "missing", id="missing file"),
        pytest.param("missing.txt", "missing", id="missing text"),
        pytest.param({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}, "rows", id="ragged inputs"),
        pytest.param(iter([object()]), "not understood", id="strange items"),
    ],
)
def test_useless_data_are_refused_with_a_hint(data: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        read(data, reading())
    assert caught.value.hint


def test_texts_without_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        read(["some text"], Reading(True, 8, None, 1, 0))
