"""Where the C++ kernels of mixed chunk attention beat torch's own operators, projections included: what
`codegen.tuning.table` is for attention.

Tables are ``chunks_*.json`` in this folder, by ``python -m benchmarks.tune_kernels --chunks``. A problem is judged by
the measured one that is most like it; where nothing like it was measured, torch's operators stay.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from codegen.device import DType
from codegen.spec import MixedChunkAttention
from codegen.tuning.table import nearest_is_faster, shipped


@dataclass(frozen=True)
class Measured:
    """One line: a problem, and how many times as fast as the torch body the kernels were.

    `arch` is an instruction set of CPUs; `tokens` are those of the whole batch.
    """

    dtype: str
    arch: str
    causal: bool
    hidden: int
    expanded: int
    base: int
    chunk: int
    tokens: int
    speedup: float

    @property
    def work(self) -> int:
        return self.tokens * self.hidden * self.expanded


@functools.cache
def measurements() -> tuple[Measured, ...]:
    """All lines of all tables that ship."""
    return tuple(Measured(**row) for row in shipped("chunks"))


@functools.lru_cache(maxsize=4096)
def faster(spec: MixedChunkAttention, dtype: DType, arch: str, tokens: int) -> bool:
    """Whether the kernels are expected to beat torch's operators on a batch of so many tokens."""
    alike = [m for m in measurements() if (m.dtype, m.arch, m.causal) == (dtype.value, arch, spec.causal)]
    sizes = {name: getattr(spec, name) for name in ("hidden", "expanded", "base", "chunk")}
    return nearest_is_faster(alike, tokens * spec.hidden * spec.expanded, {**sizes, "tokens": tokens})
