"""Where a generated kernel beats torch's own operators: measured once, looked up at run time.

The table is written by ``python -m benchmarks.tune_kernels``. A problem is judged by the measured one that is most
like it; where nothing like it was measured, the standard operators stay.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from codegen.device import DType
from codegen.sight import Pattern
from codegen.spec import GroupedQueryAttention

FOLDER = Path(__file__).parent
MARGIN = 1.1
"""A kernel has to have been faster by this factor."""

SMALLEST = 0.25
"""Problems of less than this share of the smallest measured work are left to the standard operators."""


@dataclass(frozen=True)
class Problem:
    """Sizes of one call."""

    batch: int
    queries: int
    keys: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """One line of the table: a problem, and how many times as fast as the standard operators the kernel was.

    `isa` is the instruction set of a CPU or the architecture of a card; `bias` tells whether there was a mask, and
    `pattern` which kind of keys were seen (see `kind`).
    """

    dtype: str
    isa: str
    regime: str
    group: int
    head_dim: int
    work: float
    speedup: float
    bias: bool = False
    pattern: str = ""


def kind(pattern: Pattern) -> str:
    """What keys a sparse attention sees beside those in one span; "" for attention to all keys."""
    if not pattern:
        return ""
    apart = "strided" if any(s.strided for s in pattern) else "columns" if any(s.columns for s in pattern) else "near"
    return apart if all(s.ordered for s in pattern) else f"symmetric {apart}"


def regime(problem: Problem) -> str:
    """ "decode" for a few queries over a long past, "prefill" otherwise."""
    return "decode" if problem.queries * 4 <= problem.keys or problem.queries == 1 else "prefill"


def work(spec: GroupedQueryAttention, problem: Problem) -> float:
    """Multiply-adds of the two products, as if all keys were seen."""
    rows = problem.batch * spec.heads * problem.queries
    return float(rows * problem.keys * (spec.head_dim + spec.value_dim))


@functools.cache
def measurements() -> tuple[Measured, ...]:
    """All lines of all tables that ship."""
    rows: list[dict[str, Any]] = []
    for path in sorted(FOLDER.glob("*.json")):
        rows += json.loads(path.read_text()).get("measured", [])
    return tuple(Measured(**row) for row in rows)


@functools.lru_cache(maxsize=4096)
def faster(spec: GroupedQueryAttention, dtype: DType, isa: str, problem: Problem) -> bool:
    """Whether the kernel is expected to beat the standard operators on this problem."""
    size, same = work(spec, problem), (dtype.value, isa, regime(problem), kind(spec.pattern))
    alike = [m for m in measurements() if (m.dtype, m.isa, m.regime, m.pattern) == same]
    if not alike or size < SMALLEST * min(m.work for m in alike):
        return False

    def distance(m: Measured) -> float:
        return (
            2 * abs(math.log2(m.group / spec.group))
            + abs(math.log2(m.head_dim / spec.head_dim))
            + 0.5 * abs(math.log2(m.work / size))
            + 3 * (m.bias != spec.bias)
        )

    return min(alike, key=distance).speedup >= MARGIN


class Timed(Protocol):
    """One line of a table: the sizes of a problem, the work that it is, and how many times as fast a kernel was."""

    @property
    def work(self) -> int: ...

    @property
    def speedup(self) -> float: ...


def shipped(kind: str) -> list[dict[str, Any]]:
    """All lines of the tables ``<kind>_*.json`` in this folder."""
    rows: list[dict[str, Any]] = []
    for path in sorted(FOLDER.glob(f"{kind}_*.json")):
        rows += json.loads(path.read_text())[kind]
    return rows


def nearest_is_faster(alike: Sequence[Timed], work: int, sizes: Mapping[str, int]) -> bool:
    """Whether the kernel was faster at the measured problem that is nearest in all `sizes`, of those that are `alike`;
    not where none are, or where there is far less work than in any."""
    if not alike or work < SMALLEST * min(m.work for m in alike):
        return False

    def distance(m: Timed) -> float:
        return sum(abs(math.log2(getattr(m, name) / size)) for name, size in sizes.items())

    return min(alike, key=distance).speedup >= MARGIN
