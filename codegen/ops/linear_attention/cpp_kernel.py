"""Linear attention as C++ for one processor: the source from its template."""

from __future__ import annotations

import math
from typing import Any

from codegen.device import DType, Isa
from codegen.hooks import LOG2_E, Lowered
from codegen.ops.grouped_query_attention.cpp_kernel import EXP2
from codegen.render import identifier, numbers, render
from codegen.spec import FeatureMap, LinearAttention

TEMPLATE = "cpp/linear_attention.cpp.j2"

MAX_DIM = 256
MAX_CHUNK = 512
"""Of heads and of chunks; a worker's scratch holds three chunks of keys and the sum over far ones."""

MAP_LANES = 16
"""Rows of learned maps are padded to multiples of this, whatever the processor."""


def kernel_name(spec: LinearAttention, dtype: DType, isa: Isa) -> Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    plain = spec.attention
    words = [f"h{plain.heads}", f"kv{plain.kv_heads}", f"d{plain.head_dim}", f"c{spec.chunk}", spec.features.value]
    return identifier("linear", [*words, *["causal"] * plain.causal, dtype.short, isa.value], spec)


def source(spec: LinearAttention, dtype: DType, isa: Isa) -> str:
    """The whole file; see the template for what it exports.

    Raises UnsafeInput if the spec holds anything but numbers, flags and enums.
    """
    plain, lanes = spec.attention, 8 if isa is Isa.AVX2 else 16
    learned = spec.features is FeatureMap.LEARNED
    scale = math.sqrt(plain.scale) * plain.head_dim**0.25
    return render(
        TEMPLATE,
        {
            "name": kernel_name(spec, dtype, isa),
            "fields": numbers(spec),
            "dtype": dtype,
            "isa": isa,
            "lanes": lanes,
            "kv_heads": plain.kv_heads,
            "group": plain.group,
            "head_dim": plain.head_dim,
            "value_dim": plain.value_dim,
            "causal": plain.causal,
            "chunk": spec.chunk,
            "width": spec.width,
            "learned": learned,
            "block_rows": 6,
            "block_vectors": 2 if isa is Isa.AVX2 else 4,
            "v_in_place": dtype is DType.FLOAT32 and plain.value_dim % lanes == 0,
            "pairs": False,
            "tanh": False,
            "score_scale": plain.scale * LOG2_E,
            "feature_scale": scale * LOG2_E if learned else scale,
            "exponential": EXP2,
        },
    )


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, LinearAttention):
        return f"there is no C++ kernel of {type(spec).__name__}"
    if spec.features is FeatureMap.FAVOR:
        return "there is no C++ kernel of features of FAVOR+"
    if max(spec.attention.head_dim, spec.attention.value_dim) > MAX_DIM or spec.chunk > MAX_CHUNK:
        return f"heads of more than {MAX_DIM} features or chunks of more than {MAX_CHUNK} tokens do not fit"
    return None
