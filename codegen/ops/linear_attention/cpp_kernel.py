"""Linear attention as C++ for one processor: the source from its template."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from codegen.device import DType, Isa
from codegen.hooks import Lowered
from codegen.ops.cpp_values import file_values, lanes_of, padded, product_values, scratch_bytes
from codegen.ops.grouped_query_attention.cpp_kernel import EXP2
from codegen.render import identifier, render
from codegen.spec import FeatureMap, LinearAttention

TEMPLATE = "cpp/linear_attention.cpp.j2"

MAX_DIM = 256
MAX_CHUNK = 512
"""Of heads and of chunks; a worker's scratch holds three chunks of keys and the sum over far ones."""

MAP_LANES = 16
"""Rows of learned maps are padded to multiples of this, whatever the processor."""


def kernel_name(spec: LinearAttention, dtype: DType, isa: Isa) -> Lowered:
    """Readable, unique to the spec but for its scale, and nothing but letters, digits and underscores."""
    plain = spec.attention
    words = [f"h{plain.heads}", f"kv{plain.kv_heads}", f"d{plain.head_dim}", f"c{spec.chunk}", spec.features.value]
    return identifier("linear", [*words, *["causal"] * plain.causal, dtype.short, isa.value], _unscaled(spec))


def _unscaled(spec: LinearAttention) -> LinearAttention:
    """What the source is made of: `scales` are told when it is called."""
    return replace(spec, attention=replace(spec.attention, scale=1.0))


def source(spec: LinearAttention, dtype: DType, isa: Isa) -> str:
    """The whole file; see the template for what it exports.

    Raises UnsafeInput if the spec holds anything but numbers, flags and enums.
    """
    plain = spec.attention
    return render(
        TEMPLATE,
        {
            **file_values(kernel_name(spec, dtype, isa), _unscaled(spec), dtype, isa),
            **product_values(dtype, isa, plain.value_dim),
            "kv_heads": plain.kv_heads,
            "group": plain.group,
            "head_dim": plain.head_dim,
            "value_dim": plain.value_dim,
            "causal": plain.causal,
            "chunk": spec.chunk,
            "width": spec.width,
            "learned": spec.features is FeatureMap.LEARNED,
            "tanh": False,
            "exponential": EXP2,
        },
    )


def scales(spec: LinearAttention) -> dict[str, float]:
    """What the kernel is told when it is called: what scores and features' arguments are multiplied by."""
    plain = spec.attention
    reach = math.sqrt(plain.scale) * plain.head_dim**0.25
    return {"scale": plain.scale, "query_scale": reach, "key_scale": reach}


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, LinearAttention):
        return f"there is no C++ kernel of {type(spec).__name__}"
    if spec.features is FeatureMap.FAVOR:
        return "there is no C++ kernel of features of FAVOR+"
    if max(spec.attention.head_dim, spec.attention.value_dim) > MAX_DIM or spec.chunk > MAX_CHUNK:
        return f"heads of more than {MAX_DIM} features or chunks of more than {MAX_CHUNK} tokens do not fit"
    return None


def resources(spec: LinearAttention, dtype: DType, isa: Isa) -> dict[str, int]:
    """What a kernel takes: bytes of scratch per thread, besides what is kept of queries where there is no order."""
    plain, lanes, rows = spec.attention, lanes_of(isa), spec.chunk
    products = product_values(dtype, isa, plain.value_dim)
    d, e, c, f = (padded(n, lanes) for n in (plain.head_dim, plain.value_dim, rows, spec.width))
    return {
        "scratch_bytes": scratch_bytes(
            3 * d * c,  # keys
            3 * c,
            rows * e * (1 if products["v_in_place"] else 3) + 6,  # values, and which chunks there are
            rows * d,
            rows * d,
            rows * (f + lanes),  # features
            products["block_rows"] * (2 if plain.causal else 3) * c,  # scores
            rows * e + rows,
            spec.width * e,  # the sum over far chunks
            f + lanes,
        ),
        "vector_bytes": 4 * lanes,
    }
