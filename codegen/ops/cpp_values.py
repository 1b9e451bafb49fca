"""Template values that C++ kernels have alike, whatever they compute."""

from __future__ import annotations

from typing import Any

from codegen.device import DType, Isa
from codegen.hooks import Lowered
from codegen.render import numbers


def lanes_of(isa: Isa) -> int:
    """Floats of a vector."""
    return 8 if isa is Isa.AVX2 else 16


def file_values(name: Lowered, spec: Any, dtype: DType, isa: Isa) -> dict[str, Any]:
    """What a file says of itself, and how wide its vectors are.

    Raises UnsafeInput if the spec holds anything but numbers, flags and enums.
    """
    return {"name": name, "fields": numbers(spec), "dtype": dtype, "isa": isa, "lanes": lanes_of(isa)}


def product_values(dtype: DType, isa: Isa, value_width: int) -> dict[str, Any]:
    """Of products that are held in registers, and whether their right operand is used as it lies."""
    return {
        "block_rows": 6,
        "product_rows": 6,
        "block_vectors": 2 if isa is Isa.AVX2 else 4,
        "v_in_place": dtype is DType.FLOAT32 and value_width % lanes_of(isa) == 0,
        "pairs": False,
        "ahead": False,
    }


def padded(size: int, lanes: int) -> int:
    """The next multiple of a vector."""
    return -(-size // lanes) * lanes


def scratch_bytes(*floats: int) -> int:
    """Of arrays of so many floats, each of which begins at a multiple of 64 bytes."""
    return sum(4 * padded(count, 16) for count in floats)
