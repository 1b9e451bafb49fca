"""Routed feed-forward blocks as C++ for one processor: the source from its template."""

from __future__ import annotations

from typing import Any

from codegen.activation import Activation
from codegen.device import DType, Isa
from codegen.hooks import Lowered
from codegen.ops.grouped_query_attention.cpp_kernel import EXP2
from codegen.render import identifier, numbers, render
from codegen.routed import RoutedFeedForward

TEMPLATE = "cpp/routed_feed_forward.cpp.j2"

MOST_FEATURES = 8192
"""Outside of a block: a worker's scratch holds the gathered tokens of a task, in single precision."""

ROWS, DEPTH = 126, 192
"""Places of a task, whole blocks of registers, and how much of a sum is taken at once: a panel of that depth stays in
the nearest cache."""


def kernel_name(spec: RoutedFeedForward, dtype: DType, isa: Isa) -> Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    words = [f"e{spec.experts}", f"d{spec.hidden}", f"f{spec.inner}", spec.activation.value, *["gated"] * spec.gated]
    return identifier("routed", [*words, dtype.short, isa.value], spec)


def source(spec: RoutedFeedForward, dtype: DType, isa: Isa) -> str:
    """The whole file; see the template for what it exports.

    Raises UnsafeInput if the spec holds anything but numbers, flags and enums.
    """
    fields = numbers(spec)
    return render(
        TEMPLATE,
        {
            "name": kernel_name(spec, dtype, isa),
            "fields": fields,
            "dtype": dtype,
            "isa": isa,
            "lanes": lanes_of(isa),
            "experts": spec.experts,
            "hidden": spec.hidden,
            "inner": spec.inner,
            "activation": spec.activation,
            "gated": spec.gated,
            "up_bias": spec.up_bias,
            "down_bias": spec.down_bias,
            "rows": ROWS,
            "depth": DEPTH,
            "block_rows": 6,
            "product_rows": 6,
            "block_vectors": vectors_of(isa),
            "pairs": False,
            "ahead": False,
            "tanh": spec.activation is Activation.TANH,
            "exponential": EXP2,
        },
    )


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, RoutedFeedForward):
        return f"there is no C++ kernel of {type(spec).__name__}"
    if spec.hidden > MOST_FEATURES:
        return f"more than {MOST_FEATURES} features do not fit the kernel's scratch"
    return None


def resources(spec: RoutedFeedForward, dtype: DType, isa: Isa) -> dict[str, int]:
    """What a kernel takes per thread: bytes of scratch, besides what places and tokens ask for; places of a task."""
    lanes, panel = lanes_of(isa), lanes_of(isa) * vectors_of(isa)
    tokens = ROWS * (-(-spec.hidden // lanes) * lanes)
    return {"scratch_bytes": 4 * (tokens + (DEPTH + ROWS) * panel), "rows": ROWS, "vector_bytes": 4 * lanes}


def lanes_of(isa: Isa) -> int:
    """Numbers of a vector."""
    return 8 if isa is Isa.AVX2 else 16


def vectors_of(isa: Isa) -> int:
    """Vectors of a panel: six rows of it are sums that stay in registers."""
    return 2 if isa is Isa.AVX2 else 4
