"""Where generated kernels of routed feed-forward blocks beat torch's own operators: what `codegen.tuning.table` is for
attention.

Tables are ``routed_*.json`` in this folder, by ``python -m benchmarks.tune_kernels --card --routed``. A problem is
judged by the measured one that is most like it; where nothing like it was measured, torch's operators stay.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from codegen.device import DType
from codegen.routed import RoutedFeedForward
from codegen.tuning.table import nearest_is_faster, shipped


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

    @property
    def work(self) -> int:
        return self.places * self.hidden * self.inner


@functools.cache
def measurements() -> tuple[Measured, ...]:
    """All lines of all tables that ship."""
    return tuple(Measured(**row) for row in shipped("routed"))


@functools.lru_cache(maxsize=4096)
def faster(spec: RoutedFeedForward, dtype: DType, arch: str, places: int) -> bool:
    """Whether the kernel is expected to beat torch's operators, with this many places for each expert."""
    alike = [m for m in measurements() if (m.dtype, m.arch, m.gated) == (dtype.value, arch, spec.gated)]
    sizes = {"experts": spec.experts, "hidden": spec.hidden, "inner": spec.inner, "places": places}
    return nearest_is_faster(alike, places * spec.hidden * spec.inner, sizes)
