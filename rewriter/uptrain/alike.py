"""Batches of sequences that are about equally long, so that little of a batch is padding.

Within a stretch of the data's order, sequences are sorted by length and cut into batches, and the batches are shuffled
(transformers' `group_by_length` does so too). A stretch lies within one pass over the data, so that none is twice in a
batch, and what it becomes is a function of its place alone, so that a run can be taken up anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

STRETCH = 16
"""Batches that are sorted together."""


def alike(rows: Iterator[T], length: Callable[[T], int], first: int, batch: int) -> Iterator[T]:
    """One pass over the data, or the rest of it from the beginning of a stretch, with rows of a batch alike in length.

    A batch of 1 leaves the order as it is.

    Args:
        first: the number in the endless order of the first of `rows`; every `batch` numbers from 0 are a batch.
    """
    if batch == 1:
        yield from rows
    ahead = -first % batch  # rows that end a batch which the pass before has begun
    yield from itertools.islice(rows, ahead)
    first += ahead
    while stretch := list(itertools.islice(rows, STRETCH * batch)):
        for index in _order([length(row) for row in stretch], batch, first):
            yield stretch[index]
        first += len(stretch)


def stretch_before(row: int, first: int, batch: int) -> int:
    """Where in a pass that begins with number `first` the stretch begins that holds row `row` of the pass, from 0."""
    ahead = -first % batch
    return 0 if row < ahead else row - (row - ahead) % (STRETCH * batch)


def _order(lengths: Sequence[int], batch: int, seed: int) -> list[int]:
    """Of a stretch's rows; as it is where all are equally long. A batch that is not full stays the last one."""
    if len(set(lengths)) <= 1:
        return list(range(len(lengths)))
    full, rest = np.split(np.argsort(lengths, kind="stable"), [len(lengths) // batch * batch])
    batches = np.random.default_rng(seed).permutation(full.reshape(-1, batch))
    return [int(index) for index in (*batches.reshape(-1), *rest)]
