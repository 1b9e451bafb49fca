"""Fourier mixing as C++ for one processor: fast transforms of many rows at once, one to a lane."""

from __future__ import annotations

from typing import Any

from codegen.device import DType, Isa
from codegen.hooks import Lowered
from codegen.ops.cpp_values import file_values, lanes_of
from codegen.render import identifier, render
from codegen.spec import FourierMixing

TEMPLATE = "cpp/fourier_mixing.cpp.j2"

LARGEST_RADIX = 31
"""Prime factors up to here are transformed as they are; beyond, a convolution with a chirp is faster."""

MOST_FEATURES = 1 << 16
MOST_TOKENS = 1 << 22
"""What a thread's scratch is allowed for."""


def kernel_name(spec: FourierMixing, dtype: DType, isa: Isa) -> Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    words = [f"d{spec.hidden}", *(w for w in ("gain", "bias") if getattr(spec, w)), dtype.short, isa.value]
    return identifier("hartley" if spec.hartley else "fourier", words, spec)


def source(spec: FourierMixing, dtype: DType, isa: Isa) -> str:
    """The whole file; see the template for what it exports.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    return render(
        TEMPLATE,
        {
            **file_values(kernel_name(spec, dtype, isa), spec, dtype, isa),
            "hidden": spec.hidden,
            "hartley": spec.hartley,
            "gain": spec.gain,
            "bias": spec.bias,
            "largest_radix": LARGEST_RADIX,
        },
    )


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, FourierMixing):
        return f"there is no C++ kernel of {type(spec).__name__}"
    if spec.hidden > MOST_FEATURES:
        return f"more than {MOST_FEATURES} features do not fit the kernel's scratch"
    return None


def resources(spec: FourierMixing, dtype: DType, isa: Isa) -> dict[str, int]:
    """What a kernel takes: bytes of scratch per thread besides what the number of tokens asks for."""
    lanes = lanes_of(isa)
    return {"scratch_bytes": 2 * spec.hidden * 2 * lanes * 4, "rows": 2 * lanes, "vector_bytes": 4 * lanes}
