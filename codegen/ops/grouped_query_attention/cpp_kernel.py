"""Grouped-query attention as C++ for one processor: tile sizes, and the source from its template."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from codegen import hooks
from codegen.device import DType, Isa
from codegen.ops.grouped_query_attention.kernel_values import name_of, values_of, why_not
from codegen.render import render
from codegen.spec import GroupedQueryAttention

TEMPLATE = "cpp/grouped_query_attention.cpp.j2"

MAX_DIM = 512
"""Of heads; a task's tile has to fit on a thread's stack."""

_STACK = 448 * 1024
"""Bytes that a task's tile may take."""

EXP2 = (1.000000072, 0.6931469671, 0.2402211972, 0.05550713275, 0.009675541331, 0.001327647152)
_EXP2_FOR_BFLOAT16_WEIGHTS = (0.9999280736, 0.6932609862, 0.2426111219, 0.05517166493)
"""Minimax polynomials of 2^x on [-1/2, 1/2]: relative error 7e-8, and 7e-5 where weights are rounded to bfloat16."""


@dataclass(frozen=True)
class Tiling:
    """How a task is cut.

    Attributes:
        lanes: floats per vector.
        key_tile: keys that are worked on at a time.
        block_rows, block_vectors: rows and vectors of the sum that is held in registers.
        rows: query rows of a task at most.
        few_rows: up to so many rows, scores are dot products with the keys as they lie.
        together: of these, rows that share each vector of keys and values that is read; 0 where rows are taken one by
            one, and values by the product that takes any number of rows.
        few_keys: keys that are worked on at a time where rows are taken together.
        ahead_rows: from so many rows on, dot products with keys as they lie ask memory for the next ones; 0 for never,
            where they wait for their own conversions and not for memory.
        split_keys: fewest keys that are worth a task of their own.
    """

    lanes: int
    key_tile: int
    block_rows: int
    block_vectors: int
    rows: int
    few_rows: int
    together: int
    few_keys: int
    ahead_rows: int
    split_keys: int


def tiling(spec: GroupedQueryAttention, dtype: DType, isa: Isa) -> Tiling:
    """The sizes that measured best, made smaller where a tile would outgrow its stack."""
    few = 2 if _in_tiles(spec, dtype, isa) else 4
    few = few if spec.group <= few else 0
    ahead = 1 if _in_pairs(dtype, isa) else 2 if dtype is DType.FLOAT32 else 0
    if isa is Isa.AVX2:
        together = min(few, spec.group) if not spec.pattern else 0
        found = Tiling(8, 64, 6, 2, 128, few_rows=few, together=together, few_keys=16, ahead_rows=ahead, split_keys=256)
    elif _in_tiles(spec, dtype, isa):
        found = Tiling(16, 128, 16, 4, 128, few_rows=few, together=0, few_keys=0, ahead_rows=ahead, split_keys=256)
    else:
        keys = 128 if spec.pattern else 64
        found = Tiling(16, keys, 6, 4, 128, few_rows=few, together=0, few_keys=0, ahead_rows=ahead, split_keys=256)
    while found.rows > (16 if _in_tiles(spec, dtype, isa) else 8) and _stack(spec, found) > _STACK:
        found = replace(found, rows=found.rows // 2)
    return found


def _in_pairs(dtype: DType, isa: Isa) -> bool:
    """Whether products take two bfloat16 numbers at a time."""
    return dtype is DType.BFLOAT16 and isa in {Isa.AVX512_BF16, Isa.AMX}


def _in_tiles(spec: GroupedQueryAttention, dtype: DType, isa: Isa) -> bool:
    """Whether products are done by matrix units, which take 16 rows at a time; rows of patterns lie too far apart."""
    return dtype is DType.BFLOAT16 and isa is Isa.AMX and not spec.pattern


def kernel_name(spec: GroupedQueryAttention, dtype: DType, isa: Isa) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    return name_of("gqa", spec, dtype, isa.value)


def source(spec: GroupedQueryAttention, dtype: DType, isa: Isa) -> str:
    """The whole file; see the template for what it exports.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    cut = tiling(spec, dtype, isa)
    pairs = _in_pairs(dtype, isa)
    tiles = _in_tiles(spec, dtype, isa)
    in_place = dtype is DType.FLOAT32 and spec.value_dim % cut.lanes == 0
    return render(
        TEMPLATE,
        {
            **values_of(spec, dtype, "cpp"),
            "name": kernel_name(spec, dtype, isa),
            "isa": isa,
            "lanes": cut.lanes,
            "rows": cut.rows,
            "key_tile": cut.key_tile,
            "block_rows": cut.block_rows,
            "product_rows": cut.few_rows if tiles else cut.block_rows,
            "block_vectors": cut.block_vectors,
            "score_vectors": cut.key_tile // cut.lanes,
            "out_vectors": math.ceil(spec.value_dim / cut.lanes),
            "few_rows": cut.few_rows,
            "together": cut.together,
            "few_keys": cut.few_keys,
            "split_keys": cut.split_keys,
            "pairs": pairs,
            "ahead": not spec.pattern,
            "ahead_rows": cut.ahead_rows,
            "tiles": tiles,
            "v_in_place": in_place,
            "exponential": _EXP2_FOR_BFLOAT16_WEIGHTS if pairs else EXP2,
        },
    )


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    return why_not(spec, "C++", MAX_DIM, sparse=True)


def resources(spec: GroupedQueryAttention, dtype: DType, isa: Isa) -> dict[str, int]:
    """What a kernel takes per thread: bytes of stack, query rows and keys at a time, rows held in registers."""
    cut = tiling(spec, dtype, isa)
    return {
        "stack_bytes": _stack(spec, cut),
        "rows": cut.rows,
        "keys": cut.key_tile,
        "register_rows": cut.block_rows,
        "vector_bytes": 4 * cut.lanes,
    }


def _stack(spec: GroupedQueryAttention, cut: Tiling) -> int:
    d, e = (math.ceil(n / (2 * cut.lanes)) * 2 * cut.lanes for n in (spec.head_dim, spec.value_dim))
    return 4 * (cut.rows * (d + e) + cut.key_tile * (d + e) + 2 * cut.block_rows * cut.key_tile)
