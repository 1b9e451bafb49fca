"""Mixed chunk attention between its projections as C++ for one processor: the source from its template."""

from __future__ import annotations

from typing import Any

from codegen.device import DType, Isa
from codegen.hooks import Lowered
from codegen.ops.cpp_values import file_values, lanes_of, padded, product_values, scratch_bytes
from codegen.render import identifier, render
from codegen.spec import MixedChunkAttention

TEMPLATE = "cpp/mixed_chunk_attention.cpp.j2"

MAX_BASE, MAX_CHUNK = 512, 1024
"""Features of queries and keys, and tokens of a chunk, for which a worker's scratch is a few megabytes."""


def kernel_name(spec: MixedChunkAttention, dtype: DType, isa: Isa) -> Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    words = [f"f{spec.expanded}", f"n{spec.base}", f"c{spec.chunk}", *["causal"] * spec.causal]
    return identifier("chunks", [*words, dtype.short, isa.value], spec)


def source(spec: MixedChunkAttention, dtype: DType, isa: Isa) -> str:
    """The whole file; see the template for what it exports.

    Raises UnsafeInput if the spec holds anything but numbers, flags and enums.
    """
    return render(
        TEMPLATE,
        {
            **file_values(kernel_name(spec, dtype, isa), spec, dtype, isa),
            **product_values(dtype, isa, spec.expanded),
            "base": spec.base,
            "expanded": spec.expanded,
            "chunk": spec.chunk,
            "causal": spec.causal,
            "averaged": spec.averaged,
        },
    )


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, MixedChunkAttention):
        return f"there is no C++ kernel of {type(spec).__name__}"
    if spec.base > MAX_BASE or spec.chunk > MAX_CHUNK:
        return f"more than {MAX_BASE} base features or {MAX_CHUNK} tokens of a chunk do not fit the kernel's scratch"
    return None


def resources(spec: MixedChunkAttention, dtype: DType, isa: Isa) -> dict[str, int]:
    """What a kernel takes: bytes of scratch per thread."""
    lanes, products = lanes_of(isa), product_values(dtype, isa, spec.expanded)
    n, c = padded(spec.base, lanes), padded(spec.chunk, lanes)
    held, panel = products["block_rows"], products["block_vectors"] * lanes
    return {
        "scratch_bytes": scratch_bytes(
            n * c,  # keys
            spec.chunk * (c + n),  # scores and linear queries
            held * n,
            spec.chunk * panel,  # values
            held * panel,
            padded(spec.expanded, panel) * spec.base,  # the sum over chunks
        ),
        "vector_bytes": 4 * lanes,
    }
