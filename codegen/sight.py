"""Which keys a query sees where attention is sparse: relations of two positions, as integers.

A sparse pattern never depends on what tokens hold, so it is data of the spec. Window attention (arXiv 2004.05150,
2309.17453) and the factorised patterns of Sparse Transformers (arXiv 1904.10509) are numbers in one relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

NEVER = 2**31 - 1
"""As a stride: no two positions are a multiple of it apart."""


@dataclass(frozen=True)
class Sight:
    """What the queries of a head see. A query at position i sees the key at position j if one of these holds:

    * they are near: ``|i - j| < reach`` (so a query always sees its own position);
    * they lie in the same block: ``i // block == j // block``;
    * they are whole strides apart: ``(i - j) % stride == 0``;
    * the key is seen by all: ``j < sinks`` or ``first <= j % period < last``;

    and, where `ordered`, if the key is no later than the query. Elsewhere the relation is made symmetric: queries at
    positions that all see, see all (the global tokens of arXiv 2004.05150).

    The defaults add nothing to a query's own position. Positions count keys as they lie in the operand, padding
    included; with T keys, the S queries are the last S of these positions.
    """

    reach: int = 1
    block: int = 1
    sinks: int = 0
    period: int = 1
    first: int = 0
    last: int = 0
    stride: int = NEVER
    ordered: bool = False

    def __post_init__(self) -> None:
        low = {"reach": 1, "block": 1, "sinks": 0, "period": 1, "first": 0, "last": 0, "stride": 1}
        for name, least in low.items():
            number = getattr(self, name)
            if not least <= number <= NEVER:
                raise ValueError(f"{name} must lie between {least} and {NEVER}, but is {number}")
        if self.last > self.period:
            raise ValueError(f"last={self.last} lies beyond period={self.period}")

    @property
    def columns(self) -> bool:
        """Whether some positions of every period are seen by all."""
        return self.first < self.last

    @property
    def strided(self) -> bool:
        return self.stride != NEVER


NAMES = tuple(f.name for f in fields(Sight))
"""Of a sight's numbers; read once, since captured programs cannot ask a class for its fields."""

Pattern = tuple[Sight, ...]
"""Query head h has the sight number ``h % len(pattern)``; an empty pattern means that all keys are seen."""


def seen_by_all(sight: Sight, positions: Any) -> Any:
    """Boolean, for an integer array or tensor of positions."""
    found = positions < sight.sinks
    if sight.columns:
        within = positions % sight.period
        found = found | ((within >= sight.first) & (within < sight.last))
    return found


def visible(sight: Sight, queries: Any, keys: Any) -> Any:
    """Boolean, broadcast from integer positions (numpy arrays or torch tensors): whether the query sees the key."""
    found = abs(queries - keys) < sight.reach
    if sight.block > 1:
        found = found | (queries // sight.block == keys // sight.block)
    if sight.strided:
        found = found | (queries % sight.stride == keys % sight.stride)
    found = found | seen_by_all(sight, keys)
    return found & (keys <= queries) if sight.ordered else found | seen_by_all(sight, queries)


def as_numbers(pattern: Pattern) -> list[int]:
    """The pattern as one list, for operators that take numbers only; `from_numbers` is the way back."""
    return [int(getattr(sight, name)) for sight in pattern for name in NAMES]


def from_numbers(numbers: Sequence[int]) -> Pattern:
    """The pattern of what `as_numbers` made; raises ValueError for anything else."""
    width = len(NAMES)
    if len(numbers) % width:
        raise ValueError(f"{len(numbers)} numbers are no pattern of {width} for each sight")
    rows = [numbers[start : start + width] for start in range(0, len(numbers), width)]
    found: list[dict[str, Any]] = [dict(zip(NAMES, row, strict=True)) for row in rows]
    return tuple(Sight(**{**sight, "ordered": bool(sight["ordered"])}) for sight in found)


def from_json(described: Any) -> Pattern:
    """The pattern of lists of dictionaries, as JSON gives it back; raises TypeError or ValueError for anything else."""
    if any(set(d) - set(NAMES) for d in described):
        raise ValueError("a sight has unknown numbers")
    return tuple(Sight(**d) for d in described)
