"""Grouped-query attention as Triton for one graphics card: tile sizes, the source, and how to compile it ahead."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.ops.grouped_query_attention import triton_sight
from codegen.ops.grouped_query_attention.kernel_values import name_of, values_of, why_not
from codegen.ops.signature import Signature
from codegen.render import render
from codegen.spec import GroupedQueryAttention

TEMPLATE = "triton/grouped_query_attention.py.j2"

ARCHS = {"cuda": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"), "hip": ("gfx942", "gfx950")}
"""By kind of device. Budgets are tested on sm_80, sm_90, sm_100 and gfx942."""

WARPGROUP_ARCHS = ("sm_90", "sm_100")
"""Their matrix units read shared memory, so that more rows fit the registers."""

MAX_DIM = {DType.FLOAT32: 128, DType.FLOAT16: 256, DType.BFLOAT16: 256}
"""Features of a head: beyond it a tile outgrows a thread's registers."""

POINTERS = {DType.FLOAT32: "*fp32", DType.FLOAT16: "*fp16", DType.BFLOAT16: "*bf16"}


class Precision(Enum):
    """How products of float32 operands are made."""

    OPERANDS = "operands"
    IEEE = "ieee"
    TF32 = "tf32"
    TF32X3 = "tf32x3"


@dataclass(frozen=True)
class Tiling:
    """How work is cut.

    Attributes:
        row_tile, key_tile: rows (queries times group) and keys of a tile; at least 16, what matrix units take.
        warps, stages: warps of a program, tiles in flight.
        descriptors: whether keys and values are read through tensor descriptors (the bulk copy engine) rather than
            pointers. Fewer registers go into addresses; rows must lie at multiples of 16 bytes.
    """

    row_tile: int
    key_tile: int
    warps: int
    stages: int
    descriptors: bool = False


def tiling(spec: GroupedQueryAttention, dtype: DType, arch: str, *, few_queries: bool, aligned: bool = False) -> Tiling:
    """Sizes that compile without spills on every arch (checked in the tests), and were fastest on an H100
    (`python -m benchmarks.tune_gpu`); no other card was measured.

    Args:
        few_queries: of a decode step, where rows are one group and keys are split.
        aligned: rows of keys and values lie at multiples of 16 bytes, so that tensor descriptors may be used.
    """
    widest = max(block(spec.head_dim), block(spec.value_dim))
    narrow = dtype is not DType.FLOAT32
    ragged = (spec.head_dim, spec.value_dim) != (block(spec.head_dim), block(spec.value_dim))
    heavy = spec.bias or spec.softcap is not None or ragged  # more live registers per score
    amd = arch.startswith("gfx")
    if spec.pattern:
        return _of_patterns(spec, arch, widest, narrow, heavy, few_queries)
    if arch == "sm_90" and narrow and not heavy and widest <= 128:
        return _on_hopper(spec, widest, few_queries, aligned)
    stages = 1 if amd else 2 if not narrow or widest > 128 else 3
    if few_queries:
        keys = 64 if narrow and widest <= 128 else 32
        return Tiling(min(64, block(spec.group)), min(keys, 32) if amd else keys, 4, stages)
    if not narrow:
        return Tiling(64 if widest <= 64 and arch != "sm_80" else 32, 32 if widest <= 64 else 16, 8, stages)
    if heavy or widest > 128:
        return Tiling(64 if not amd or widest <= 64 else 32, 32, 8 if widest > 64 else 4, stages)
    if widest <= 64 or arch in WARPGROUP_ARCHS:
        return Tiling(128, 64, 8, stages)
    return Tiling(64, 32 if amd else 64, 8, stages)


def _of_patterns(
    spec: GroupedQueryAttention, arch: str, widest: int, narrow: bool, heavy: bool, few_queries: bool
) -> Tiling:
    """Fewer rows than elsewhere: a tile works on all keys that one of its rows sees. No card was measured."""
    amd = arch.startswith("gfx")
    stages = 1 if amd else 2 if not narrow or widest > 128 else 3
    if few_queries:
        rows = min(64 if narrow else 32, block(triton_sight.rows_of_a_query(spec)))
        return Tiling(rows, 64 if narrow and widest <= 128 and not amd else 32, 4 if narrow else 8, stages)
    if not narrow:
        return Tiling(32 if widest <= 64 else 16, 32, 4, stages)
    small = heavy and arch not in WARPGROUP_ARCHS
    return Tiling(64, 32 if amd or small or widest > 128 else 64, 4 if widest <= 128 else 8, stages)


def _on_hopper(spec: GroupedQueryAttention, widest: int, few_queries: bool, aligned: bool) -> Tiling:
    """What an H100 ran fastest: a decode step is bound by reading, and takes many small programs."""
    if few_queries:
        return Tiling(min(64, block(spec.group)), 64, 2, 2)
    if widest <= 64 or not aligned:
        return Tiling(128, 64, 8, 3)
    return Tiling(128, 128, 8, 3, descriptors=True)


def block(size: int) -> int:
    """The power of two, 16 or more, that holds `size` lanes."""
    return max(16, 1 << (size - 1).bit_length())


def kernel_name(
    spec: GroupedQueryAttention, dtype: DType, arch: str, *, few_queries: bool = False, descriptors: bool = False
) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    prefix = "gqa_decode" if few_queries else "gqa"
    return name_of(f"{prefix}_tma" if descriptors else prefix, spec, dtype, arch)


def source(
    spec: GroupedQueryAttention, dtype: DType, arch: str, *, few_queries: bool = False, cut: Tiling | None = None
) -> str:
    """A Python file with three kernels: whole rows, a split of the keys, and the sum over splits.

    `cut` stands in for `tiling`'s choice. Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    cut = tiling(spec, dtype, arch, few_queries=few_queries) if cut is None else cut
    score, factor = hooks.factored_expression(spec)
    return render(
        TEMPLATE,
        {
            **values_of(spec, dtype, "triton"),
            **triton_sight.values(spec),
            "score": hooks.lower(score, "triton"),
            "factor": factor,
            "name": kernel_name(spec, dtype, arch, few_queries=few_queries, descriptors=cut.descriptors),
            "head_block": block(spec.head_dim),
            "value_block": block(spec.value_dim),
            "head_ragged": spec.head_dim != block(spec.head_dim),
            "value_ragged": spec.value_dim != block(spec.value_dim),
            "row_tile": cut.row_tile,
            "key_tile": cut.key_tile,
            "descriptors": cut.descriptors,
            "precision": precision(dtype, arch),
        },
    )


def precision(dtype: DType, arch: str) -> Precision:
    """Matrix units of NVIDIA cards take no float32; three TF32 products come within a few roundings of one."""
    if dtype is not DType.FLOAT32:
        return Precision.OPERANDS
    return Precision.IEEE if arch.startswith("gfx") else Precision.TF32X3


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    found = why_not(spec, "Triton", MAX_DIM[dtype], f" in {dtype.value}", sparse=True)
    return triton_sight.why_not(spec.pattern) if found is None else found


def signatures(spec: GroupedQueryAttention, dtype: DType) -> dict[str, Signature]:
    """By the suffix of the kernel's name: "", "_split" and "_join"; operands dense and aligned, biases not boolean."""
    pointer = POINTERS[dtype]
    strides = [f"stride_{x}" for x in ("qb", "qh", "qs", "kb", "kh", "kt", "vb", "vh", "vt")]
    operands = {"q_ptr": pointer, "k_ptr": pointer, "v_ptr": pointer, **dict.fromkeys(strides, "i32")}
    constants = {}
    if spec.bias:
        operands |= {"bias_ptr": pointer, **dict.fromkeys(["stride_bb", "stride_bh", "stride_bs", "stride_bt"], "i32")}
        operands["BOOLEAN"] = "constexpr"
        constants = {"BOOLEAN": False}
    if spec.sinks:
        names = ["sink_columns", "stride_sb", "stride_sh", "stride_ss", "stride_sn"]
        operands |= {"sinks_ptr": pointer, **dict.fromkeys(names, "i32")}
    out_strides = dict.fromkeys(["stride_ob", "stride_oh", "stride_os"], "i32")
    wide: dict[str, str] = {"wide_tiles": "i32"} if spec.pattern else {}
    sizes = {"queries": "i32", "keys": "i32", **wide}
    joined = sizes if spec.pattern else {"queries": "i32"}
    states = {"sums_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32"}
    even = spec.head_dim % 16 == 0 and spec.value_dim % 16 == 0
    aligned = {name for name, kind in {**operands, **states}.items() if kind.startswith("*")} | {"out_ptr"}
    aligned |= {*strides, *out_strides} if even else set()
    found = {
        "": {**operands, "out_ptr": pointer, **out_strides, **sizes},
        "_split": {**operands, **states, **sizes, "share": "i32"},
        "_join": {**states, "out_ptr": pointer, **out_strides, **joined, "splits": "i32"},
    }
    return {
        suffix: Signature(
            types, frozenset(aligned & set(types)) | ({"share"} & set(types)), constants if suffix != "_join" else {}
        )
        for suffix, types in found.items()
    }
