"""Routed feed-forward blocks as Triton for graphics cards: products with gathered rows, products that are put where
they belong, and, where tokens have several places, their sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.ops.grouped_query_attention.triton_kernel import ARCHS, POINTERS, block, precision
from codegen.ops.signature import Signature
from codegen.render import identifier, numbers, render
from codegen.routed import RoutedFeedForward

TEMPLATE = "triton/routed_feed_forward.py.j2"

MOST = 2**31 - 1
"""Numbers of one expert's matrix: places within it are counted in 32 bits."""

__all__ = ["ARCHS", "Tiling", "kernel_name", "legal", "signatures", "source", "tiling"]


@dataclass(frozen=True)
class Tiling:
    """How work is cut.

    Attributes:
        rows: places of a tile.
        columns, down_columns: features of a tile of the first products, and of the second.
        depth: how much of a sum is taken at once.
        tokens, wide: of a tile of the sum over experts.
        warps, stages: warps of a program, tiles in flight.
    """

    rows: int
    columns: int
    down_columns: int
    depth: int
    tokens: int
    wide: int
    warps: int
    stages: int


def tiling(spec: RoutedFeedForward, dtype: DType, arch: str, *, places: int = 128) -> Tiling:
    """Sizes that compile without spills on every arch (checked in the tests). No card was measured.

    Args:
        places: of an expert; tiles have no more rows than are of use.
    """
    amd = arch.startswith("gfx")
    outer, inner = (max(16, block(size)) for size in (spec.hidden, spec.inner))
    rows = max(16, block(min(places, 128)))
    if dtype is DType.FLOAT32:  # three products for one take registers
        return Tiling(
            min(rows, 64),
            min(32 if spec.gated else 64, inner),
            min(64, outer),
            32,
            16,
            min(64, outer),
            4,
            1 if amd else 2,
        )
    columns = 64 if spec.gated or amd else 128
    rows = min(rows, 64) if amd else rows
    return Tiling(
        rows, min(columns, inner), min(64 if amd else 128, outer), 32 if amd else 64, 16, min(128, outer),
        8 if rows == 128 else 4, 1 if amd else 3,
    )  # fmt: skip


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, RoutedFeedForward):
        return f"there is no Triton kernel of {type(spec).__name__}"
    if spec.hidden * spec.inner > MOST:
        return f"matrices of more than {MOST} numbers are beyond the kernel's offsets"
    return None


def kernel_name(spec: RoutedFeedForward, dtype: DType, arch: str) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    words = [f"e{spec.experts}", f"d{spec.hidden}", f"f{spec.inner}", spec.activation.value, *["gated"] * spec.gated]
    return identifier("routed", [*words, *["once"] * spec.once, dtype.short, arch], spec)


def source(spec: RoutedFeedForward, dtype: DType, arch: str, *, cut: Tiling | None = None) -> str:
    """A Python file with three kernels, or two where tokens have one place.

    Raises UnsafeInput if the spec holds anything but numbers, flags and enums.
    """
    fields = numbers(spec)
    cut = tiling(spec, dtype, arch) if cut is None else cut
    return render(
        TEMPLATE,
        {
            "fields": fields,
            "name": kernel_name(spec, dtype, arch),
            "hidden": spec.hidden,
            "inner": spec.inner,
            "experts": spec.experts,
            "activation": spec.activation,
            "gated": spec.gated,
            "up_bias": spec.up_bias,
            "down_bias": spec.down_bias,
            "once": spec.once,
            "rows": cut.rows,
            "columns": cut.columns,
            "down_columns": cut.down_columns,
            "depth": cut.depth,
            "tokens": cut.tokens,
            "wide": cut.wide,
            "precision": precision(dtype, arch),
        },
    )


def signatures(spec: RoutedFeedForward, dtype: DType) -> dict[str, Signature]:
    """By the suffix of the kernel's name: "_up", "_down" and, unless tokens have one place, "_sum"; all aligned."""
    pointer = POINTERS[dtype]
    ups = ("gate", "up") if spec.gated else ("up",)
    matrices = {f"{name}_ptr": pointer for name in ups}
    vectors = {f"{name}_bias_ptr": pointer for name in ups if spec.up_bias}
    down = {"down_ptr": pointer} | ({"down_bias_ptr": pointer} if spec.down_bias else {})
    found = {
        "_up": {"x_ptr": pointer, "rows_ptr": "*i32", **matrices, **vectors, "inner_ptr": pointer, "places": "i32"},
        "_down": {
            "inner_ptr": pointer, "rows_ptr": "*i32", "weights_ptr": "*fp32", **down,
            "out_ptr" if spec.once else "each_ptr": pointer, "places": "i32",
        },
        "_sum": {
            "each_ptr": pointer, "table_ptr": "*i32", "base_ptr": pointer, "WITH_BASE": "constexpr", "out_ptr": pointer,
            "tokens": "i32",
        },
    }  # fmt: skip
    return {
        suffix: Signature(
            types,
            frozenset(name for name, kind in types.items() if kind.startswith("*")),
            {"WITH_BASE": False} if suffix == "_sum" else {},
        )
        for suffix, types in found.items()
        if suffix != "_sum" or not spec.once
    }
