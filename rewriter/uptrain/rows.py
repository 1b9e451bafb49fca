"""Training examples in a fixed endless order that can be taken up at any position: stored ones, and streams."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from passes.dataflow import Array
from rewriter.errors import UsageError
from rewriter.uptrain.alike import alike, stretch_before

Row = Mapping[str, Array]
"""The inputs of one example by name, without the batch axis: ``input_ids`` [T], ``pixel_values`` [C, H, W], …"""

SAMPLE = 256
"""Rows that a stream is judged by."""


class Rows(Protocol):
    """Examples to train on.

    Attributes:
        validation: held-out examples, never among those to train on.
        tokens: of one example, on average.
        fingerprint: changes with the data, as far as it can be told beforehand.
    """

    @property
    def validation(self) -> Sequence[Row]: ...
    @property
    def tokens(self) -> float: ...
    @property
    def fingerprint(self) -> str: ...

    def since(self, position: int) -> Iterator[Row]:
        """Example number `position` of the endless order, the next one, and so on."""
        ...


@dataclass(frozen=True)
class StoredRows:
    """Examples that can be read in any order: a new random order in each epoch, a function of the seed alone.

    Attributes:
        batch: rows that are to be about equally long; 1 leaves the order as it is drawn.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    tokens: float
    fingerprint: str
    seed: int
    batch: int = 1

    def since(self, position: int) -> Iterator[Row]:
        count = len(self.train)
        for epoch in itertools.count(position // count):
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            done = max(position - epoch * count, 0)
            start = stretch_before(done, epoch * count, self.batch)
            grouped = alike(iter(order[start:]), self._length, epoch * count + start, self.batch)
            for index in itertools.islice(grouped, done - start, None):
                yield self.train[int(index)]

    def _length(self, index: int) -> int:
        return length(self.train[int(index)])


@dataclass(frozen=True)
class StreamedRows:
    """Examples in the order in which they come; where the stream ends it is opened again.

    Attributes:
        open: a new pass over all examples; what a pass starts with is held out for validation.
        batch: as in `StoredRows`; a stretch of batches is then read at a time.
    """

    open: Callable[[], Iterator[Row]]
    validation: Sequence[Row]
    tokens: float
    fingerprint: str
    batch: int = 1

    def since(self, position: int) -> Iterator[Row]:
        """What lies before `position` is read and dropped: slower than training starts anew, and always right."""
        skip, first = position, 0
        while True:
            passed = 0
            rows = itertools.islice(self.open(), len(self.validation), None)
            for row in alike(rows, length, first, self.batch):
                passed += 1
                if skip:
                    skip -= 1
                    continue
                yield row
            first += passed
            if not passed:
                raise UsageError(
                    "the data ended, and cannot be read a second time",
                    hint="give more of it, or an iterable that starts anew each time it is iterated over",
                )


def stored(
    rows: Sequence[Row], *, held_out: int, seed: int, validation: Sequence[Row] | None = None, batch: int = 1
) -> StoredRows:
    """Hold out the last rows, at most `held_out` and at most one in ten, unless `validation` is given.

    Raises UsageError if nothing is left to train on.
    """
    count = 0 if validation is not None else min(held_out, max(1, len(rows) // 10))
    if len(rows) - count < 1:
        raise UsageError(
            f"the data holds {len(rows)} sequences: too few to train on some and measure on others",
            hint="give more data, shorter windows (--window), or validation data apart",
        )
    train = rows[: len(rows) - count]
    held = rows[len(rows) - count :] if validation is None else validation
    return StoredRows(train, held, _mean_tokens(train), fingerprint_of(rows), seed, batch)


def streamed(
    open_stream: Callable[[], Iterator[Row]], *, held_out: int, validation: Sequence[Row] | None = None, batch: int = 1
) -> StreamedRows:
    """Hold out the first rows unless `validation` is given; raises UsageError for a stream that is too short."""
    first = list(itertools.islice(open_stream(), held_out + SAMPLE))
    count = 0 if validation is not None else held_out
    if len(first) <= count:
        raise UsageError(
            f"the data holds {len(first)} sequences, and {count} are held out for validation",
            hint="give more data, hold out fewer, or give validation data apart",
        )
    held = first[:count] if validation is None else validation
    even = len({length(row) for row in first}) == 1  # then nothing is read ahead: rows may be pictures
    return StreamedRows(open_stream, held, _mean_tokens(first), fingerprint_of(first), 1 if even else batch)


def length(row: Row) -> int:
    """Tokens of an example: of its ids, else 1."""
    ids = row.get("input_ids")
    return 1 if ids is None else int(ids.shape[0])


def _mean_tokens(rows: Sequence[Row]) -> float:
    step = max(1, len(rows) // SAMPLE)
    return float(np.mean([length(rows[i]) for i in range(0, len(rows), step)]))


def fingerprint_of(rows: Sequence[Row]) -> str:
    """Of how many rows there are and of what some of them hold."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for index in {*range(min(16, len(rows))), *range(0, len(rows), max(1, len(rows) // 64))}:
        for name, array in sorted(rows[index].items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
