"""Where generated kernels of routed feed-forward blocks beat torch's own operators: what `codegen.tuning.table` is for
attention.

Tables are ``routed_*.json`` in this folder, by ``python -m benchmarks.tune_kernels --card --routed``. A problem is
judged by the measured one that is most like it; where nothing like it was measured, torch's operators stay.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

from codegen.device import DType
from codegen.routed import RoutedFeedForward
from codegen.tuning.table import FOLDER, MARGIN, SMALLEST

NAMES = "routed_*.json"


@dataclass(frozen=True)
class Measured:
    """One line: a problem, and how many times as fast as the torch body the kernel was.

    `arch` is of a card, or the instruction set of a CPU; `places` are those of one expert.
    """

    dtype: str
    arch: str
    gated: bool
    experts: int
    hidden: int
    inner: int
    places: int
    speedup: float


@functools.cache
def measurements() -> tuple[Measured, ...]:
    """All lines of all tables that ship."""
    rows: list[dict[str, Any]] = []
    for path in sorted(FOLDER.glob(NAMES)):
        rows += json.loads(path.read_text())["routed"]
    return tuple(Measured(**row) for row in rows)


@functools.lru_cache(maxsize=4096)
def faster(spec: RoutedFeedForward, dtype: DType, arch: str, places: int) -> bool:
    """Whether the kernel is expected to beat torch's operators, with this many places for each expert."""
    alike = [m for m in measurements() if (m.dtype, m.arch, m.gated) == (dtype.value, arch, spec.gated)]
    size = places * spec.hidden * spec.inner
    if not alike or size < SMALLEST * min(m.places * m.hidden * m.inner for m in alike):
        return False

    def distance(m: Measured) -> float:
        pairs = ((m.experts, spec.experts), (m.hidden, spec.hidden), (m.inner, spec.inner), (m.places, places))
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    return min(alike, key=distance).speedup >= MARGIN
