"""Mixed chunk attention as Triton for graphics cards: sums of chunks, then both parts and the gate in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.ops.grouped_query_attention.triton_kernel import (
    ARCHS,
    POINTERS,
    WARPGROUP_ARCHS,
    Precision,
    block,
    precision,
)
from codegen.ops.signature import Signature
from codegen.render import identifier, numbers, render
from codegen.spec import MixedChunkAttention, PositionBias

TEMPLATE = "triton/mixed_chunk_attention.py.j2"

MAX_BASE = 128
"""Features of queries and keys: beyond it a tile outgrows a thread's registers."""

__all__ = ["ARCHS", "MAX_BASE", "Tiling", "kernel_name", "legal", "signatures", "source", "tiling"]


@dataclass(frozen=True)
class Tiling:
    """Tokens, keys and values of a tile, tokens that are added up at a time, and warps and stages of a program."""

    row_tile: int
    key_tile: int
    column_tile: int
    token_tile: int
    warps: int
    stages: int

    def rows_of_a_chunk(self, chunk: int) -> int:
        """Tiles that a chunk's tokens take."""
        return -(-chunk // self.row_tile)


def tiling(spec: MixedChunkAttention, dtype: DType, arch: str) -> Tiling:
    """Sizes that compile without spills on every arch (checked in the tests). No card was measured."""
    stages = 1 if arch.startswith("gfx") else 2
    whole, columns = block(spec.chunk), min(128, block(spec.expanded))
    if dtype is DType.BFLOAT16:
        if arch not in WARPGROUP_ARCHS:
            return Tiling(min(64, whole), min(32, whole), min(64, columns), min(32, whole), 4, stages)
        return Tiling(min(64, whole), min(64, whole), columns, min(32, whole), 4, stages)
    rows = 16 if dtype is DType.FLOAT32 else min(32, whole)  # three products for one take registers
    return Tiling(rows, min(32, whole), min(64, columns), min(16, whole), 4, stages)


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, MixedChunkAttention):
        return f"there is no Triton kernel of {type(spec).__name__}"
    return f"a base of more than {MAX_BASE} features does not fit the kernel's tile" if spec.base > MAX_BASE else None


def kernel_name(spec: MixedChunkAttention, dtype: DType, arch: str) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    words = [f"f{spec.expanded}", f"n{spec.base}", f"c{spec.chunk}", *["causal"] * spec.causal]
    words += ["bias"] * (spec.bias is not PositionBias.NONE)
    return identifier("mixed_chunk", [*words, dtype.short, arch], spec)


def source(spec: MixedChunkAttention, dtype: DType, arch: str, *, cut: Tiling | None = None) -> str:
    """A Python file with two kernels, or one where not causal: sums of each chunk, and attention.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    cut = tiling(spec, dtype, arch) if cut is None else cut
    return render(
        TEMPLATE,
        {
            "fields": numbers(spec),
            "name": kernel_name(spec, dtype, arch),
            "chunk": spec.chunk,
            "base": spec.base,
            "expanded": spec.expanded,
            "causal": spec.causal,
            "bias": spec.bias is not PositionBias.NONE,
            "base_block": block(spec.base),
            "base_ragged": spec.base != block(spec.base),
            "columns_ragged": spec.expanded % cut.column_tile != 0,
            "inverse": 1.0 / spec.chunk,
            "tiles": cut.rows_of_a_chunk(spec.chunk),
            "row_tile": cut.row_tile,
            "key_tile": cut.key_tile,
            "column_tile": cut.column_tile,
            "token_tile": cut.token_tile,
            "wide": dtype is DType.FLOAT16,
            "precision": _precision(dtype, arch),
        },
    )


def _precision(dtype: DType, arch: str) -> Precision:
    """Squares of small scores would vanish in float16: weights and sums of chunks have the range of float32 there, and
    as many bits as float16."""
    if dtype is DType.FLOAT16:
        return Precision.IEEE if arch.startswith("gfx") else Precision.TF32
    return precision(dtype, arch)


def signatures(spec: MixedChunkAttention, dtype: DType) -> dict[str, Signature]:
    """By the suffix of the kernel's name: "_states" and ""; operands dense and aligned, no token hidden."""
    pointer = POINTERS[dtype]

    def strided(name: str, letter: str) -> dict[str, str]:
        return {f"{name}_ptr": pointer, f"stride_{letter}b": "i32", f"stride_{letter}s": "i32"}

    shown = {"shown_ptr": "*u8", "stride_nb": "i32", "stride_ns": "i32", "WITH_SHOWN": "constexpr"}
    bias = {"bias_ptr": pointer} if spec.bias is not PositionBias.NONE else {}
    states = {
        "states_ptr": "*fp32" if dtype is DType.FLOAT16 else pointer, "stride_sb": "i32", "stride_sc": "i32",
    }  # fmt: skip
    heads = {**strided("query", "q"), **strided("linear", "l"), **strided("key", "k")}
    sums = {**strided("key", "k"), **strided("value", "v"), **shown, "each_ptr": "*fp32", "tokens": "i32"}
    found = {
        "": {
            **strided("gate", "g"), **strided("value", "v"), **heads, **bias, **shown, **states,
            "out_ptr": pointer, "tokens": "i32",
        },
        **({"_states": sums} if spec.causal else {}),
    }  # fmt: skip
    even = spec.base % 16 == 0 and spec.expanded % 16 == 0
    return {
        suffix: Signature(
            types,
            frozenset(
                n for n, kind in types.items() if kind.startswith("*") or (even and n[:7] == "stride_" and n[7] != "n")
            ),
            {"WITH_SHOWN": False},
        )
        for suffix, types in found.items()
    }
