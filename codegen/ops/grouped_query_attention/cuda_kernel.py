"""Grouped-query attention of few queries as CUDA C++ for NVIDIA cards: split keys, and the sum over splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.ops.grouped_query_attention.kernel_values import name_of, values_of, why_not
from codegen.render import render
from codegen.spec import GroupedQueryAttention

TEMPLATE = "cuda/grouped_query_attention.cu.j2"

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

DTYPES = (DType.BFLOAT16, DType.FLOAT16)
"""Of 16 bits, as the instruction that multiplies wants them."""

MOST = 128
"""Features of a head: beyond it sums outgrow a thread's registers."""

ROWS = KEYS = 16
"""Of a product."""

SUFFIXES = ("_split", "_join")


@dataclass(frozen=True)
class Cut:
    """How work is cut.

    Attributes:
        warps: of a block; each takes tiles of 16 keys of its own.
        stages: tiles of a warp that are copied at a time, the one in work included.
        waves: blocks that keys are split into, at least, for each multiprocessor.
    """

    warps: int = 4
    stages: int = 3
    waves: int = 4


def cut_for(spec: GroupedQueryAttention, arch: str) -> Cut:
    """What fits two blocks into a multiprocessor's shared memory."""
    small = arch in ("sm_86", "sm_89", "sm_120")  # 100 KiB of shared memory
    return Cut(stages=2 if small else 3)


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if (reason := why_not(spec, "CUDA", MOST)) is not None:
        return reason
    if dtype not in DTYPES:
        return f"there is no CUDA kernel in {dtype.value}"
    if spec.head_dim % 32 or spec.value_dim % 64:
        return "the CUDA kernel takes heads of 32, 64, 96 or 128 features, and of 64 or 128 values"
    return None


def kernel_name(spec: GroupedQueryAttention, dtype: DType, arch: str) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    return name_of("gqa_cuda", spec, dtype, arch)


def shared_memory(spec: GroupedQueryAttention, cut: Cut) -> int:
    """Bytes that a block of the kernel over split keys asks for."""
    ring = cut.stages * (2 * (spec.head_dim // 32) + 4 * (spec.value_dim // 64)) * 32 * 16
    return cut.warps * max(ring, ROWS * (spec.value_dim + 2) * 4)


def source(spec: GroupedQueryAttention, dtype: DType, arch: str, *, cut: Cut | None = None) -> str:
    """A file with two kernels: a split of the keys, and the sum over splits.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    cut = cut or cut_for(spec, arch)
    return render(
        TEMPLATE,
        {
            **values_of(spec, dtype, "cuda"),
            "name": kernel_name(spec, dtype, arch),
            "early": arch not in ("sm_80", "sm_86", "sm_89"),
            "warps": cut.warps,
            "stages": cut.stages,
        },
    )
