"""From what a person gives as training data to rows: token files, texts, datasets that stream, named inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from passes.dataflow import Array
from rewriter.calibration.batches import LONGEST, as_numpy
from rewriter.calibration.files import read_calibration
from rewriter.errors import UsageError, first_line
from rewriter.uptrain.rows import Row, Rows, stored, streamed

HINT = "give token ids, texts with a tokenizer, files, named inputs, or an iterable of such items (a dataset)"
SUFFIXES = (".txt", ".jsonl", ".npy", ".npz", ".safetensors")
DOCUMENTS = 256
"""Texts of a stream that are tokenised at a time."""


@dataclass(frozen=True)
class Reading:
    """How data become rows.

    Attributes:
        packed: text is joined and cut into windows (causal models); else each text is a row of its own.
        window: tokens of a row, at most.
        tokenizer: for texts; may be None where there are none.
        held_out: rows for validation; seed: of the order.
        batch: rows that are to be about equally long; 1 leaves the order as it is.
    """

    packed: bool
    window: int
    tokenizer: Any
    held_out: int
    seed: int
    batch: int = 1

    @property
    def longest(self) -> int:
        return self.window if self.packed else min(self.window, LONGEST)


def read(data: Any, reading: Reading, validation: Any = None) -> Rows:
    """Rows out of anything that is understood; `validation` likewise, else some rows are held out.

    Lists of texts, arrays, named inputs and files are stored; any other iterable is a stream, read as it comes.

    Raises UsageError for data that are missing, broken, too short or of an unknown kind.
    """
    held = None if validation is None else held_rows(validation, reading)
    if isinstance(data, tuple) and len(data) == 2 and callable(data[1]):
        reading = replace(reading, tokenizer=data[1])
        data = data[0]
    if _is_stored(data):
        rows = _stored(data, reading)
        return stored(rows, held_out=reading.held_out, seed=reading.seed, validation=held, batch=reading.batch)
    if isinstance(data, Iterable):
        return streamed(lambda: _stream(data, reading), held_out=reading.held_out, validation=held, batch=reading.batch)
    raise UsageError(f"the training data are a {type(data).__name__}", hint=HINT)


def held_rows(validation: Any, reading: Reading) -> Sequence[Row]:
    """All of a stored validation set, or the first rows of a stream; at most four times what would be held out."""
    most = 4 * reading.held_out
    if isinstance(validation, tuple) and len(validation) == 2 and callable(validation[1]):
        reading = replace(reading, tokenizer=validation[1])
        validation = validation[0]
    if _is_stored(validation):
        return _stored(validation, reading)[:most]
    if isinstance(validation, Iterable):
        rows = [row for _, row in zip(range(most), _stream(validation, reading), strict=False)]
        if rows:
            return rows
    raise UsageError("the validation data hold no sequences", hint=HINT)


# ------------------------------------------------------------------ stored data


def _is_stored(data: Any) -> bool:
    if isinstance(data, (str, Path, Mapping)) or _is_array(data):
        return True
    return isinstance(data, (list, tuple)) and all(isinstance(d, (str, Path, int)) or _is_array(d) for d in data)


def _stored(data: Any, reading: Reading) -> Sequence[Row]:
    if isinstance(data, (str, Path)):
        data = [data]
    if isinstance(data, Mapping):
        return _inputs(data)
    if _is_array(data) or (data and all(isinstance(d, int) for d in data)):
        return _ids(np.asarray(as_numpy(data)), reading)
    if data and all(_is_file(d) for d in data):
        return _files([Path(d) for d in data], reading)
    if data and all(isinstance(d, str) for d in data):
        return _texts(list(data), reading)
    if data and all(_is_array(d) for d in data):
        return _joined([_ids(np.asarray(as_numpy(d)), reading) for d in data])
    raise UsageError("the training data are empty or of several kinds", hint=HINT)


def _is_file(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and value.endswith(SUFFIXES) and "\n" not in value)


def _files(paths: Sequence[Path], reading: Reading) -> Sequence[Row]:
    parts: list[Sequence[Row]] = []
    for path in paths:
        content = _memory_map(path) if path.suffix == ".npy" else read_calibration(path, what="data")
        if isinstance(content, list) and isinstance(content[0], str):
            parts.append(_texts(content, reading, lines=path.suffix == ".txt"))
        elif isinstance(content, list):
            ids = {name for batch in content for name in batch} == {"input_ids"} or len(content[0]) == 1
            whole = {name: np.concatenate([b[name] for b in content]) for name in content[0]}
            only = next(iter(whole.values()))
            parts.append(_ids(only, reading) if ids and only.dtype.kind in "iu" else _inputs(whole))
        else:
            parts.append(_ids(content, reading))
    return _joined(parts)


def _memory_map(path: Path) -> Array:
    """Token ids that stay in the file until they are used."""
    try:
        found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's reader of headers raises whatever Python's parser does
        raise UsageError(f"the data file {path} cannot be read: {first_line(error)}", hint="check the path") from error
    return found


def _inputs(data: Mapping[str, Any]) -> Sequence[Row]:
    arrays = {name: as_numpy(value) for name, value in data.items()}
    if not arrays or len({len(a) for a in arrays.values()}) != 1:
        raise UsageError("named inputs have different numbers of rows", hint="their first axes must be equally long")
    return _Named(arrays, 0, len(next(iter(arrays.values()))))


def _ids(ids: Array, reading: Reading) -> Sequence[Row]:
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise UsageError(f"token ids have dtype {ids.dtype} and shape {ids.shape}", hint="give integers, [N] or [B, T]")
    if ids.ndim == 2:
        return _Named({"input_ids": ids}, 0, len(ids))
    window = reading.longest
    if len(ids) < window:
        raise UsageError(
            f"the data hold {len(ids)} tokens, less than one window of {window}",
            hint="give more data, or a shorter window (--window)",
        )
    return _Named({"input_ids": ids[: len(ids) // window * window].reshape(-1, window)}, 0, len(ids) // window)


def _texts(texts: Sequence[str], reading: Reading, *, lines: bool = False) -> Sequence[Row]:
    """`lines`: of one text; else texts stand alone, and a packed one ends with the tokenizer's end of text."""
    tokenizer = _tokenizer(reading)
    if not reading.packed:
        return [row for row in _rows_of(texts, reading) if len(row["input_ids"])]
    texts = ["\n".join(texts)] if lines else texts
    return _ids(np.asarray([i for text in _encoded(texts, tokenizer, not lines) for i in text], np.int64), reading)


class _Named(Sequence[Row]):
    """Rows of arrays of equal length, from `start` to `stop`; nothing is read before it is asked for."""

    def __init__(self, arrays: Mapping[str, Array], start: int, stop: int) -> None:
        self._arrays, self._range = arrays, range(start, stop)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        found = self._range[index]
        if isinstance(found, range):
            return _Named(self._arrays, found.start, found.stop)
        return {name: np.asarray(array[found]) for name, array in self._arrays.items()}


def _joined(parts: Sequence[Sequence[Row]]) -> Sequence[Row]:
    return parts[0] if len(parts) == 1 else [row for part in parts for row in part]


# ------------------------------------------------------------------ streams


def _stream(data: Iterable[Any], reading: Reading) -> Iterator[Row]:
    """One pass over a dataset: texts and token lists are packed or taken one by one, inputs are rows already."""
    waiting: list[Any] = []
    rest: list[int] = []
    for item in data:
        item = _unwrapped(item)
        if isinstance(item, str):
            waiting.append(item)
            if len(waiting) == DOCUMENTS:
                yield from _packed_texts(waiting, rest, reading)
                waiting = []
        elif isinstance(item, Mapping):
            yield from _batch_or_row(item)
        else:
            yield from _packed([item], rest, reading)
    yield from _packed_texts(waiting, rest, reading)


def _unwrapped(item: Any) -> Any:
    """A dataset's row: its text, its ids where these are a plain list, else its inputs."""
    if isinstance(item, str) or _is_array(item):
        return item
    if isinstance(item, (list, tuple)) and item and all(isinstance(i, int) for i in item):
        return item
    if isinstance(item, Mapping):
        if set(item) & {"input_ids"} and isinstance(item["input_ids"], (list, tuple)):
            return list(item["input_ids"])
        if "input_ids" not in item and isinstance(item.get("text"), str):
            return item["text"]
        inputs = {name: value for name, value in item.items() if name != "labels" and _is_array(value)}
        if inputs:
            return inputs
    raise UsageError(f"an item of the training data is a {type(item).__name__} that is not understood", hint=HINT)


def _batch_or_row(inputs: Mapping[str, Any]) -> Iterator[Row]:
    """A data loader gives batches; ids with two axes tell them from rows, and so do other inputs' four."""
    arrays = {name: as_numpy(value) for name, value in inputs.items()}
    ids = arrays.get("input_ids")
    batched = ids.ndim == 2 if ids is not None else max(a.ndim for a in arrays.values()) >= 4
    if batched:
        yield from _inputs(arrays)
    else:
        yield arrays


def _packed_texts(texts: Sequence[str], rest: list[int], reading: Reading) -> Iterator[Row]:
    if not texts:
        return
    if reading.packed:
        yield from _packed(_encoded(texts, _tokenizer(reading), True), rest, reading)
    else:
        yield from (row for row in _rows_of(texts, reading) if len(row["input_ids"]))


def _packed(documents: Iterable[Any], rest: list[int], reading: Reading) -> Iterator[Row]:
    """Windows; what is left over stays in `rest` for the next call."""
    for ids in documents:
        array = as_numpy(ids) if _is_array(ids) else np.asarray(ids, np.int64)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise UsageError(f"token ids have dtype {array.dtype} and shape {array.shape}", hint="give integers, [N]")
        if not reading.packed:
            yield {"input_ids": array[: reading.longest]}
            continue
        rest.extend(array.tolist())
        while len(rest) >= reading.window:
            yield {"input_ids": np.asarray(rest[: reading.window], np.int64)}
            del rest[: reading.window]


# ------------------------------------------------------------------ texts


def _tokenizer(reading: Reading) -> Any:
    if reading.tokenizer is None:
        raise UsageError(
            "texts need a tokenizer",
            hint="keep one in the student's or the teacher's folder, pass tokenizer=, or give token ids",
        )
    return reading.tokenizer


def _encoded(texts: Sequence[str], tokenizer: Any, end: bool) -> Iterator[list[int]]:
    last = getattr(tokenizer, "eos_token_id", None) if end else None
    for ids in tokenizer(list(texts), verbose=False)["input_ids"]:
        yield list(ids) if last is None or (ids and ids[-1] == last) else [*ids, last]


def _rows_of(texts: Sequence[str], reading: Reading) -> list[Row]:
    found = _tokenizer(reading)(list(texts), truncation=True, max_length=reading.longest, verbose=False)
    return [{"input_ids": np.asarray(ids, np.int64)} for ids in found["input_ids"]]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
