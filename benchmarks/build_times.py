"""Rows of `benchmarks.kernels` for what a first call waits for: the compiler's processor time for one kernel of each
op, and for the file that makes an onnxruntime library of all of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import Clock, Row
from codegen.device import DType, Isa, host
from codegen.launch import ort_op
from codegen.registry import Choice, select
from codegen.spec import FourierMixing, GroupedQueryAttention, LinearAttention, MixedChunkAttention, Spec
from codegen.toolchain import cxx

LIMIT = 3.0
"""Seconds."""

_PREFILL = GroupedQueryAttention(32, 8, 128, 128, 0.088, causal=True)
_HEADS = GroupedQueryAttention(12, 12, 64, 64, 0.125, causal=True)

SPECS: dict[str, Spec] = {
    "attention, 32 heads of 128 on 8, causal": _PREFILL,
    "linear attention, 12 heads of 64, chunks of 64": LinearAttention(_HEADS, 64),
    "mixed chunk attention, 1536 values, chunks of 256": MixedChunkAttention(768, 1536, 128, 256, causal=True),
    "fourier mixing, 768 features": FourierMixing(768),
}


@dataclass(frozen=True)
class Case:
    """A source file by what it computes."""

    name: str
    source: Callable[[], str]

    def __str__(self) -> str:
        return f"build, {self.name}"


def cases(*, quick: bool) -> list[Case]:
    """All of them, however little time there is: each takes two seconds."""
    found = {name: _choice(spec) for name, spec in SPECS.items()}
    kernels = [Case(name, choice.source) for name, choice in found.items()]
    return [*kernels, Case("library for onnxruntime of these", lambda: ort_op.source(list(found.values())))]


def _choice(spec: Spec) -> Choice:
    found = select(spec, host(), DType.FLOAT32)
    assert found is not None
    return found


def run_case(case: Case, runs: int, threads: int, clock: Clock) -> list[Row]:
    """The least processor time of up to three builds, whatever the clock: other work disturbs that less."""
    isa = Isa(host().arch)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cpp")
        source.write_text(case.source())
        seconds = min(_build(source, isa) for _ in range(min(runs, 3)))
    ratio = LIMIT / seconds
    return [Row("build", str(case), seconds, LIMIT, "limit", "s", ratio, 1.0, seconds <= LIMIT, {"kind": "build"})]


def _build(source: Path, isa: Isa) -> float:
    def spent() -> float:
        times = os.times()
        return times.children_user + times.children_system

    before = spent()
    cxx.build([source], source.with_suffix(".so"), isa)
    return spent() - before
