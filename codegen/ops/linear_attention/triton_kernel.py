"""Linear attention as Triton for graphics cards: sums of each chunk, then near and far keys of a tile in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.ops.grouped_query_attention.triton_kernel import ARCHS, POINTERS, WARPGROUP_ARCHS, block, precision
from codegen.ops.signature import Signature
from codegen.render import identifier, numbers, render
from codegen.spec import FeatureMap, LinearAttention

TEMPLATE = "triton/linear_attention.py.j2"

MAX_DIM = {DType.FLOAT32: 64, DType.FLOAT16: 128, DType.BFLOAT16: 128}
"""Features of a head, and of a value: beyond it the sums outgrow a thread's registers."""

FAVOR_TILE = 64
"""Random features that are worked on at a time."""

__all__ = ["ARCHS", "MAX_DIM", "Tiling", "kernel_name", "legal", "signatures", "source", "tiling"]


@dataclass(frozen=True)
class Tiling:
    """Queries and keys of a tile, keys that are added up at a time, and warps and stages of a program."""

    row_tile: int
    key_tile: int
    token_tile: int
    warps: int
    stages: int

    def rows_of_a_chunk(self, chunk: int) -> int:
        """Tiles that a chunk's queries take."""
        return -(-chunk // self.row_tile)


def tiling(spec: LinearAttention, dtype: DType, arch: str) -> Tiling:
    """Sizes that compile without spills, but for what the tests name on sm_80. No card was tuned for."""
    widest = max(block(spec.attention.head_dim), block(spec.attention.value_dim))
    stages = 1 if arch.startswith("gfx") else 2
    whole = block(spec.chunk)
    if dtype is DType.FLOAT32:
        return Tiling(16, 32, min(32, whole), 4, stages)
    if spec.features is FeatureMap.FAVOR:  # its products are made of float32
        return Tiling(min(32, whole), 32, min(16, whole), 8, stages)
    tokens = 64 if arch in WARPGROUP_ARCHS else 32 if widest <= 64 else 16
    return Tiling(min(64, whole), 32, min(tokens, whole), 8 if widest > 64 else 4, stages)


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, LinearAttention):
        return f"there is no Triton kernel of {type(spec).__name__}"
    if max(spec.attention.head_dim, spec.attention.value_dim) > MAX_DIM[dtype]:
        return f"heads of more than {MAX_DIM[dtype]} features do not fit the kernel's tile in {dtype.value}"
    if spec.features is FeatureMap.FAVOR and dtype is DType.FLOAT16:
        return "features of FAVOR+ are beyond float16"
    return None


def kernel_name(spec: LinearAttention, dtype: DType, arch: str) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    plain = spec.attention
    words = [f"h{plain.heads}", f"kv{plain.kv_heads}", f"d{plain.head_dim}", f"c{spec.chunk}"]
    words += [spec.features.name.lower(), *["causal"] * plain.causal]
    return identifier("linear", [*words, dtype.short, arch], spec)


def source(spec: LinearAttention, dtype: DType, arch: str, *, cut: Tiling | None = None) -> str:
    """A Python file with two kernels: sums of each chunk, and attention.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    cut = tiling(spec, dtype, arch) if cut is None else cut
    fields, plain = numbers(spec), spec.attention
    favor = spec.features is FeatureMap.FAVOR
    stretch = plain.scale**0.5 * (1.0 if favor else plain.head_dim**0.25)
    return render(
        TEMPLATE,
        {
            "fields": fields,
            "name": kernel_name(spec, dtype, arch),
            "features": spec.features,
            "chunk": spec.chunk,
            "group": plain.group,
            "kv_heads": plain.kv_heads,
            "causal": plain.causal,
            "head_dim": plain.head_dim,
            "value_dim": plain.value_dim,
            "head_block": block(plain.head_dim),
            "value_block": block(plain.value_dim),
            "head_ragged": plain.head_dim != block(plain.head_dim),
            "value_ragged": plain.value_dim != block(plain.value_dim),
            "width": spec.width,
            "feature_block": FAVOR_TILE if favor else block(plain.head_dim),
            "parts": parts(spec),
            "map_size": (spec.directions if favor else plain.head_dim) * plain.head_dim,
            "stretch": stretch,
            "half_log": 0.5 * math.log(spec.directions),
            "factor": plain.scale * hooks.LOG2_E,
            "tiles": cut.rows_of_a_chunk(spec.chunk),
            "row_tile": cut.row_tile,
            "key_tile": cut.key_tile,
            "token_tile": cut.token_tile,
            "precision": precision(dtype, arch),
            "wide_precision": hooks.Lowered(precision(DType.FLOAT32, arch).value),
        },
    )


def parts(spec: LinearAttention) -> int:
    """Programs that share the features of a chunk."""
    return {FeatureMap.LEARNED: 2, FeatureMap.ELU1: 1}.get(spec.features, -(-spec.width // FAVOR_TILE))


def signatures(spec: LinearAttention, dtype: DType) -> dict[str, Signature]:
    """By the suffix of the kernel's name: "_states" and ""; operands dense and aligned, no key hidden."""
    pointer = POINTERS[dtype]
    axes = {"q": "bhs", "k": "bht", "v": "bht"}
    strides = {name: [f"stride_{name}{axis}" for axis in axes[name]] for name in axes}
    of = {name: dict.fromkeys(found, "i32") for name, found in strides.items()}
    own: dict[str, str] = {}
    if spec.features is FeatureMap.LEARNED:
        own = {"map_ptr": pointer}
    elif spec.features is FeatureMap.FAVOR:
        own = {"directions_ptr": "*fp32"}
    shown = {"shown_ptr": "*u8", "stride_nb": "i32", "stride_nt": "i32", "WITH_SHOWN": "constexpr"}
    out = {"out_ptr": pointer, **dict.fromkeys(["stride_ob", "stride_oh", "stride_os"], "i32")}
    found = {
        "_states": {
            "k_ptr": pointer, "v_ptr": pointer, **of["k"], **of["v"], **own, **shown,
            "each_ptr": "*fp32", "ones_ptr": "*fp32", "keys": "i32",
        },
        "": {
            "q_ptr": pointer, "k_ptr": pointer, "v_ptr": pointer, **of["q"], **of["k"], **of["v"], **own,
            "log_gain_ptr": "*fp32", **shown, "states_ptr": pointer, "ones_ptr": "*fp32", **out,
            "queries": "i32", "keys": "i32", "leading": "i32",
        },
    }  # fmt: skip
    plain = spec.attention
    even = plain.head_dim % 16 == 0 and plain.value_dim % 16 == 0
    rows = {name for names in strides.values() for name in names} | {"stride_ob", "stride_oh", "stride_os"}
    return {
        suffix: Signature(
            types,
            frozenset({n for n, kind in types.items() if kind.startswith("*") or (even and n in rows)}),
            {"WITH_SHOWN": False},
        )
        for suffix, types in found.items()
    }
