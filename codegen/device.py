"""What a kernel runs on: the kind of device, its instruction set, and the number format."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
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
    AMX = "avx512_bf16_amx"


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


FLAGS = {
    Isa.AVX2: {"avx2", "fma", "f16c"},
    Isa.AVX512: {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    Isa.AVX512_BF16: {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}
FLAGS[Isa.AMX] = FLAGS[Isa.AVX512_BF16] | {"amx_tile", "amx_bf16"}


def isa_of(flags: frozenset[str]) -> Isa | None:
    """The most that a processor with these flags (as /proc/cpuinfo spells them) can run; None if nothing fits."""
    return next((isa for isa in reversed(Isa) if FLAGS[isa] <= flags), None)


@functools.cache
def host() -> Device:
    """This machine's processor."""
    isa = isa_of(_processor_flags()) if platform.machine() in {"x86_64", "AMD64"} else None
    if isa is Isa.AMX and not _may_use_tiles():
        isa = Isa.AVX512_BF16
    return Device("cpu", "" if isa is None else isa.value)


def _may_use_tiles() -> bool:
    """Ask Linux for this process's leave to use matrix units; older kernels, and other systems, refuse.

    Source: https://docs.kernel.org/arch/x86/xstate.html.
    """
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)) == 0


@functools.cache
def _processor_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
