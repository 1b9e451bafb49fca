"""What a kernel runs on: the kind of device, its instruction set, and the number format."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class DType(Enum):
    """Storage formats of operands; sums are kept in single precision throughout."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def short(self) -> str:
        return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[self.value]


class Isa(Enum):
    """Instruction sets of x86 that there are variants for, from the least to the most."""

    AVX2 = "avx2"
    AVX512 = "avx512"
    AVX512_BF16 = "avx512_bf16"


class Language(Enum):
    """What a kernel is written in. Values are those of ``kernels=`` and names of template folders."""

    CPP = "cpp"
    TRITON = "triton"
    CUDA = "cuda"


@dataclass(frozen=True)
class Device:
    """One kind of machine.

    Attributes:
        kind: "cpu", "cuda" or "hip".
        arch: an `Isa`'s value on CPUs, "sm_90" and the like on graphics cards; "" if there is no variant for it.
    """

    kind: str
    arch: str


_FLAGS = {
    Isa.AVX2: {"avx2", "fma", "f16c"},
    Isa.AVX512: {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    Isa.AVX512_BF16: {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}


def isa_of(flags: frozenset[str]) -> Isa | None:
    """The most that a processor with these flags (as /proc/cpuinfo spells them) can run; None if nothing fits."""
    return next((isa for isa in reversed(Isa) if _FLAGS[isa] <= flags), None)


def measured_as(device: Device) -> str:
    """The name under which tuning tables know a device: its arch, and what only the other side makes use of.

    Matrix units of x86 (AMX) speed up torch's bfloat16 products, but no kernel here.
    """
    matrix = device.kind == "cpu" and device.arch == Isa.AVX512_BF16.value and "amx_bf16" in _processor_flags()
    return f"{device.arch}_amx" if matrix else device.arch


@functools.cache
def host() -> Device:
    """This machine's processor."""
    isa = isa_of(_processor_flags()) if platform.machine() in {"x86_64", "AMD64"} else None
    return Device("cpu", "" if isa is None else isa.value)


@functools.cache
def _processor_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
