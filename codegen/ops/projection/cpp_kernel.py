"""A linear layer with its activation as C++ for one processor: the source from its template."""

from __future__ import annotations

from typing import Any

from codegen.activation import Activation
from codegen.device import DType, Isa
from codegen.hooks import Lowered
from codegen.ops.cpp_values import file_values, lanes_of, padded, product_values, scratch_bytes
from codegen.ops.grouped_query_attention.cpp_kernel import EXP2
from codegen.projection import Projection
from codegen.render import identifier, render

TEMPLATE = "cpp/projection.cpp.j2"

DTYPES = (DType.FLOAT32,)
"""Weights are read as they lie, as left operands of products in single precision."""

MOST_INPUTS = 16_384
"""A worker's scratch holds the inputs of a task."""

TOKENS, ROWS, DEPTH = 256, 96, 768
"""Tokens of a task, outputs and inputs of a block of weights, which stays in the cache while all tokens of the task go
by."""


def kernel_name(spec: Projection, dtype: DType, isa: Isa) -> Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    words = [f"i{spec.inputs}", f"o{spec.outputs}", *([spec.activation.value] if spec.activation else [])]
    return identifier("projection", [*words, dtype.short, isa.value], spec)


def source(spec: Projection, dtype: DType, isa: Isa) -> str:
    """The whole file; see the template for what it exports.

    Raises UnsafeInput if the spec holds anything but numbers and enums.
    """
    return render(
        TEMPLATE,
        {
            **file_values(kernel_name(spec, dtype, isa), spec, dtype, isa),
            **product_values(dtype, isa, spec.outputs),
            "inputs": spec.inputs,
            "outputs": spec.outputs,
            "activation": spec.activation,
            "tokens": TOKENS,
            "rows": ROWS,
            "depth": DEPTH,
            "tanh": spec.activation is Activation.TANH,
            "exponential": EXP2,
        },
    )


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, Projection):
        return f"there is no C++ kernel of {type(spec).__name__}"
    if spec.inputs > MOST_INPUTS:
        return f"more than {MOST_INPUTS} inputs do not fit the kernel's scratch"
    return None


def resources(spec: Projection, dtype: DType, isa: Isa) -> dict[str, int]:
    """What a kernel takes: bytes of scratch per thread."""
    lanes = lanes_of(isa)
    return {
        "scratch_bytes": scratch_bytes(TOKENS * padded(spec.inputs, lanes), TOKENS * ROWS),
        "vector_bytes": 4 * lanes,
    }
