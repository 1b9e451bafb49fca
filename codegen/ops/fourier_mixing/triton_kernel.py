"""Fourier mixing as Triton for graphics cards: products with real matrices on matrix units, both axes folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.ops.signature import Signature
from codegen.render import identifier, numbers, render
from codegen.spec import FourierMixing

TEMPLATE = "triton/fourier_mixing.py.j2"

ARCHS = {"cuda": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"), "hip": ("gfx942", "gfx950")}
"""By kind of device. Budgets are tested on sm_80, sm_90, sm_100 and gfx942."""

DTYPES = (DType.BFLOAT16, DType.FLOAT16)
"""In float32 the fast transform is better: its matrix products would have to be made of several."""

MOST_TOKENS, MOST_FEATURES = 4096, 8192
"""Beyond these the tables alone outgrow a card's cache, and the fast transform wins."""

POINTERS = {DType.FLOAT16: "*fp16", DType.BFLOAT16: "*bf16"}
MULTIPLE = 16
"""Rows of tables are padded to this many numbers: Triton then knows that they begin at 16 bytes."""


@dataclass(frozen=True)
class Tiling:
    """Rows and columns of a result's tile, how much of a sum is taken at once, and warps and stages of a program."""

    rows: int = 64
    columns: int = 64
    inner: int = 64
    warps: int = 4
    stages: int = 3


def tiling(arch: str) -> Tiling:
    """Sizes that compile without spills on every arch (checked in the tests)."""
    return Tiling(stages=1) if arch.startswith("gfx") else Tiling()


def padded(size: int) -> int:
    """`size`, up to the next multiple that lets rows begin at 16 bytes."""
    return -(-size // MULTIPLE) * MULTIPLE


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel, or None if there is one."""
    if not isinstance(spec, FourierMixing):
        return f"there is no Triton kernel of {type(spec).__name__}"
    if spec.hartley:
        return "the Hartley transform has no kernel"
    if dtype not in DTYPES:
        return f"there is no kernel in {dtype.value}"
    if spec.hidden > MOST_FEATURES:
        return f"more than {MOST_FEATURES} features are left to the fast transform"
    return None


def kernel_name(spec: FourierMixing, dtype: DType, arch: str) -> hooks.Lowered:
    """Readable, unique to the spec, and nothing but letters, digits and underscores."""
    words = ["gain"] * spec.gain + ["bias"] * spec.bias
    return identifier("fourier", [f"d{spec.hidden}", *words, dtype.short, arch], spec)


def source(spec: FourierMixing, dtype: DType, arch: str, *, cut: Tiling | None = None) -> str:
    """A Python file with two kernels: over features, and over tokens.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    cut = cut or tiling(arch)
    return render(
        TEMPLATE,
        {
            "fields": numbers(spec),
            "name": kernel_name(spec, dtype, arch),
            "hidden": spec.hidden,
            "split": (spec.hidden + 1) // 2,
            "padded": padded(spec.half),
            "ragged": spec.hidden % cut.inner != 0,
            "gain": spec.gain,
            "bias": spec.bias,
            "rows": cut.rows,
            "columns": cut.columns,
            "inner": cut.inner,
        },
    )


def signatures(spec: FourierMixing, dtype: DType) -> dict[str, Signature]:
    """By the suffix of the kernel's name: "_features" and "_tokens"; operands dense and aligned."""
    pointer = POINTERS[dtype]
    vectors = {name: pointer for name in ("gain_ptr", "bias_ptr") if getattr(spec, name.removesuffix("_ptr"))}
    tables = {"cos_ptr": pointer, "sin_ptr": pointer}
    halves = {"even_ptr": pointer, "odd_ptr": pointer}
    sizes = {"tokens": "i32", "middle": "i32"}
    found = {
        "_features": {"x_ptr": pointer, "stride_xb": "i32", "stride_xs": "i32", **tables, **halves, **sizes},
        "_tokens": {**halves, **tables, **vectors, "out_ptr": pointer, **sizes, "width": "i32"},
    }
    even = {"stride_xb", "stride_xs"} if spec.hidden % 16 == 0 else set()
    return {
        suffix: Signature(
            types, frozenset({n for n, kind in types.items() if kind == pointer} | (even & set(types))), {}
        )
        for suffix, types in found.items()
    }
