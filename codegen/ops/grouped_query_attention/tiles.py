"""Sparse attention cut into tiles: some queries, and all the keys that any of them sees.

So a pattern is computed without ever holding all scores: for a window the work grows with the length, for fixed blocks
of l = sqrt(n) with n * sqrt(n). Pure arithmetic on positions; what a tile holds beyond what is seen, its user masks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codegen.sight import Pattern, Sight, seen_by_all

Positions = NDArray[np.int64]

LEAST, MOST = 64, 256
"""Queries of a tile, unless blocks are shorter."""

WORTH = 0.5
"""Share of all scores up to which tiles pay for their overhead."""

LARGE = 2**25
"""Scores of one head that are not held at a time, whatever the share."""


@dataclass(frozen=True)
class Tile:
    """Positions of queries and of keys, ascending; queries are counted from 0."""

    queries: Positions
    keys: Positions

    @property
    def scores(self) -> int:
        return len(self.queries) * len(self.keys)


@functools.lru_cache(maxsize=32)
def tiles(sight: Sight, queries: int, keys: int) -> tuple[Tile, ...]:
    """Tiles that hold every query once, the queries being the last of the keys' positions."""
    return tuple(_tiles(sight, queries, keys))


def _tiles(sight: Sight, queries: int, keys: int) -> Iterator[Tile]:
    offset = keys - queries
    every: Positions = np.arange(keys, dtype=np.int64)  # tiles that hold many keys are views of it
    everywhere = _seen_by_all(sight, every)
    for start, stop in _cuts(sight, offset, keys):
        rows = np.arange(start, stop, dtype=np.int64)
        if not sight.ordered:
            rows = rows[~seen_by_all(sight, rows)]
        if len(rows):
            yield Tile(rows - offset, _keys(sight, start, stop, every, everywhere))
    if not sight.ordered:  # these see all keys
        rows = everywhere[everywhere >= offset]
        for first in range(0, len(rows), MOST):
            yield Tile(rows[first : first + MOST] - offset, every)


def computed_scores(pattern: Pattern, heads: int, queries: int, keys: int) -> int:
    """Scores of all heads that are computed: those of the tiles, or all of them where tiles are not worth it."""
    if not pattern or not worth_tiling(pattern, queries, keys):
        return heads * queries * keys
    areas = [sum(t.scores for t in tiles(sight, queries, keys)) for sight in pattern]
    return sum(areas[head % len(areas)] for head in range(heads))


def worth_tiling(pattern: Pattern, queries: int, keys: int) -> bool:
    """Whether tiles take less time than a mask over all scores, or these are too many to hold."""
    if queries > keys or not queries:
        return False
    areas = [sum(t.scores for t in tiles(sight, queries, keys)) for sight in pattern]
    return sum(areas) <= WORTH * len(areas) * queries * keys or queries * keys > LARGE


def _cuts(sight: Sight, start: int, stop: int) -> Iterator[tuple[int, int]]:
    size = min(max(sight.reach, LEAST), MOST)
    while start < stop:
        end = min(start + size, stop)
        if sight.block > 1:
            end = min(end, (start // sight.block + 1) * sight.block)
        yield start, end
        start = end


def _keys(sight: Sight, start: int, stop: int, every: Positions, everywhere: Positions) -> Positions:
    """All keys that a query from `start` to `stop` sees."""
    limit = stop if sight.ordered else len(every)
    if sight.strided:
        return every[:limit]
    low = min(start - sight.reach + 1, start // sight.block * sight.block)
    high = max(stop - 1 + sight.reach, ((stop - 1) // sight.block + 1) * sight.block)
    low, high = max(low, 0), min(high, limit)
    before = everywhere[everywhere < low]
    after = everywhere[(everywhere >= high) & (everywhere < limit)]
    if not len(before) and not len(after):
        return every[low:high]
    return np.concatenate([before, every[low:high], after])


def _seen_by_all(sight: Sight, positions: Positions) -> Positions:
    seen: NDArray[np.bool_] = seen_by_all(sight, positions)
    return positions[seen]
