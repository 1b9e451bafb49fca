"""What the Triton kernel is told of a sparse pattern: its numbers as constants, head by head, and counts for launches.

A tile of queries works on the keys that one of them sees, by number: those before the near ones that all queries see,
the near ones, and, unless the pattern is ordered, those behind that all see. Queries that see all keys are gathered
into tiles of their own, which come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from codegen.hooks import Lowered
from codegen.sight import NEVER, Pattern, Sight
from codegen.spec import GroupedQueryAttention

FARTHEST = 2**30
"""Stands for every greater reach and block, so that sums of two positions stay within 32 bits."""


def values(spec: GroupedQueryAttention) -> dict[str, Any]:
    """Template values that follow from the pattern."""
    pattern = spec.pattern or (Sight(),)
    numbers = {
        "reach": [min(s.reach, FARTHEST) for s in pattern],
        "block": [min(s.block, FARTHEST) for s in pattern],
        "stride": [s.stride for s in pattern],
        "strided": [int(s.strided) for s in pattern],
        "leading": [min(s.sinks, FARTHEST) for s in pattern],
        "period": [min(s.period, FARTHEST) for s in pattern],
        "first": [s.first if s.columns else 0 for s in pattern],
        "width": [s.last - s.first if s.columns else 0 for s in pattern],
        "passed": [_columns_before(s, min(s.sinks, FARTHEST)) for s in pattern],
    }
    return {
        "sparse": bool(spec.pattern),
        "apart": len(spec.pattern),
        "by_head": by_head(spec),
        "ordered": all(s.ordered for s in pattern),
        "everywhere": any(s.columns or s.sinks for s in pattern),
        "columns": any(s.columns for s in pattern),
        "any_strided": any(s.strided for s in pattern),
        "blocks": any(s.block > 1 for s in pattern),
        **{name: _chosen(found) for name, found in numbers.items()},
    }


def why_not(pattern: Pattern) -> str | None:
    """Why the kernel cannot follow a pattern, or None."""
    return "heads of one pattern must agree whether it is ordered" if len({s.ordered for s in pattern}) > 1 else None


def by_head(spec: GroupedQueryAttention) -> bool:
    """Whether query heads of a group see differently, and so need programs of their own."""
    return len(spec.pattern) > 1


def programs(spec: GroupedQueryAttention) -> int:
    """Heads of the grid: key/value heads, or query heads where these see differently."""
    return spec.heads if by_head(spec) else spec.kv_heads


def rows_of_a_query(spec: GroupedQueryAttention) -> int:
    """Rows of a tile that one query takes: one for each head of its group."""
    return spec.heads // programs(spec)


def seen_before(sight: Sight, position: int) -> int:
    """How many of the positions before this one are seen by all."""
    columns = _columns_before(sight, position) - _columns_before(sight, sight.sinks)
    return min(position, sight.sinks) + max(columns, 0)


def wide_tiles(spec: GroupedQueryAttention, row_tile: int, queries: int, keys: int) -> int:
    """Tiles of queries that see all keys."""
    found = [
        seen_before(sight, keys) - seen_before(sight, keys - queries) for sight in spec.pattern if not sight.ordered
    ]
    return -(-max(found, default=0) * rows_of_a_query(spec) // row_tile)


def most_keys(spec: GroupedQueryAttention, row_tile: int, queries: int, keys: int) -> int:
    """Keys that a tile of rows works on at most."""
    if wide_tiles(spec, row_tile, queries, keys) or not spec.pattern:
        return keys
    rows = min(queries, -(-row_tile // rows_of_a_query(spec)) + 1)
    return max(min(keys, _near(sight, rows) + seen_before(sight, keys)) for sight in spec.pattern)


def _near(sight: Sight, rows: int) -> int:
    return NEVER if sight.strided else rows + 2 * max(sight.reach, sight.block)


def _columns_before(sight: Sight, position: int) -> int:
    if not sight.columns:
        return 0
    width, within = sight.last - sight.first, position % sight.period
    return position // sight.period * width + min(max(within - sight.first, 0), width)


def _chosen(numbers: Sequence[int]) -> Lowered:
    """An expression of `sight`, the number of a head's sight."""
    text = str(numbers[-1])
    if len(set(numbers)) > 1:
        for place in range(len(numbers) - 2, -1, -1):
            text = f"tl.where(sight == {place}, {numbers[place]}, {text})"
    return Lowered(text)
