"""Specs, operands, and how far from the oracle a kernel may be: a multiple of what rounding alone makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegen.device import Device, DType, Isa, host
from codegen.launch.host import load
from codegen.launch.torch_op import launch
from codegen.ops.grouped_query_attention import reference
from codegen.registry import Choice, select
from codegen.sight import Sight
from codegen.spec import GroupedQueryAttention, Spec

TORCH = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
K = 4.0
"""Kernels may be this many times as far off as the floor."""

PLAIN = GroupedQueryAttention(8, 2, 64, 64, 0.125)
CAUSAL = GroupedQueryAttention(6, 6, 64, 64, 0.125, causal=True)
MULTI_QUERY = GroupedQueryAttention(32, 1, 16, 16, 0.25, causal=True, masked_rows_are_zero=True)
EVERYTHING = GroupedQueryAttention(
    6, 3, 5, 7, 0.4, causal=True, bias=True, softcap=3.0, masked_rows_are_zero=True, sinks=True
)
BIASED = GroupedQueryAttention(4, 4, 24, 40, 0.2, bias=True)
WIDE = GroupedQueryAttention(12, 1, 130, 96, 0.09, bias=True, softcap=20.0)
SINKS = GroupedQueryAttention(3, 1, 33, 17, 0.17, sinks=True)

_COLUMNS = Sight(block=16, period=16, first=13, last=16)
SPARSE = {
    "window": GroupedQueryAttention(4, 2, 8, 8, 0.3, causal=True, pattern=(Sight(reach=9, sinks=3, ordered=True),)),
    "symmetric window": GroupedQueryAttention(4, 1, 8, 8, 0.3, pattern=(Sight(reach=9, sinks=3),)),
    "fixed": GroupedQueryAttention(
        6, 1, 16, 16, 0.3, causal=True, masked_rows_are_zero=True, pattern=(replace(_COLUMNS, ordered=True),)
    ),
    "symmetric fixed": GroupedQueryAttention(4, 4, 5, 7, 0.3, bias=True, pattern=(_COLUMNS,)),
    "strided": GroupedQueryAttention(4, 2, 33, 17, 0.3, causal=True, pattern=(Sight(reach=7, stride=6, ordered=True),)),
    "symmetric strided": GroupedQueryAttention(
        12, 2, 8, 8, 0.3, bias=True, softcap=3.0, sinks=True, pattern=(Sight(reach=7, stride=6),)
    ),
    "by head": GroupedQueryAttention(
        6, 2, 8, 8, 0.3, causal=True,
        pattern=tuple(replace(_COLUMNS, first=13 - 3 * n, last=16 - 3 * n, ordered=True) for n in range(5)),
    ),
    "three kinds by head": GroupedQueryAttention(
        10, 1, 8, 8, 0.3, causal=True,
        pattern=(Sight(reach=5, ordered=True), Sight(stride=5, ordered=True), replace(_COLUMNS, ordered=True)),
    ),
    "all at once": GroupedQueryAttention(
        4, 2, 8, 8, 0.3, masked_rows_are_zero=True,
        pattern=(Sight(reach=4, block=6, sinks=2, period=11, first=2, last=4, stride=9),),
    ),
}  # fmt: skip
"""Patterns smaller and larger than tiles, one and several sights, heads that share keys and heads that do not."""


@dataclass(frozen=True)
class Operands:
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None

    @property
    def arrays(self) -> list[NDArray[Any] | None]:
        tensors = (self.q, self.k, self.v, self.bias, self.sinks)
        return [None if t is None else t.numpy() if t.dtype == torch.bool else t.double().numpy() for t in tensors]


def choice(spec: Spec, dtype: DType, isa: Isa | None = None) -> Choice:
    found = select(spec, host() if isa is None else Device("cpu", isa.value), dtype)
    assert found is not None
    return found


def here() -> list[Isa]:
    """The variants that this processor can run."""
    return [isa for isa in Isa if host().arch and list(Isa).index(isa) <= list(Isa).index(Isa(host().arch))]


def operands(
    spec: GroupedQueryAttention,
    dtype: torch.dtype,
    batch: int,
    queries: int,
    keys: int,
    *,
    bias: str = "additive",
    seed: int = 0,
) -> Operands:
    """Random operands, heads between tokens as modules lay them out; a boolean bias hides a third of the keys."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    shapes = {"additive": (batch, 1, queries, keys), "per head": (1, spec.heads, queries, keys)}
    shape = shapes.get(bias, (batch, 1, 1, keys))
    mask: Tensor | None = None
    if spec.bias:
        hidden = torch.rand(shape, generator=random) < 0.3
        mask = draw(*shape).masked_fill(hidden, -torch.inf) if bias in shapes else ~hidden
    return Operands(
        draw(batch, queries, spec.heads, spec.head_dim).transpose(1, 2),
        draw(batch, keys, spec.kv_heads, spec.head_dim).transpose(1, 2),
        draw(batch, spec.kv_heads, keys, spec.value_dim),
        mask,
        draw(1, spec.heads, 1, 2) if spec.sinks else None,
    )


def run(made: Choice, x: Operands) -> Tensor:
    return launch(load(made), made.spec, x.q, x.k, x.v, x.bias, x.sinks)


def oracle(spec: GroupedQueryAttention, x: Operands) -> NDArray[np.float64]:
    q, k, v, bias, sinks = x.arrays
    assert q is not None and k is not None and v is not None
    return reference.grouped_query_attention(spec, q, k, v, bias, sinks)


def floor(spec: GroupedQueryAttention, x: Operands, weights_roundoff: float) -> NDArray[np.float64]:
    """What rounding makes of each output number: of scores summed in single precision (which shifts weights by as
    much, relatively), of weights, and of the result."""
    q, k, v, bias, sinks = x.arrays
    assert q is not None and k is not None and v is not None
    weights = reference.attention_weights(spec, q, k, bias, sinks)
    spread = np.repeat(np.abs(v), spec.group, axis=1)
    size = spec.scale * np.abs(q) @ np.swapaxes(np.repeat(np.abs(k), spec.group, axis=1), -1, -2)
    if bias is not None and bias.dtype != np.bool_:
        size = size + np.abs(np.where(np.isfinite(bias), bias, 0.0))
    shift = 2.0**-24 * (size.max(axis=-1, keepdims=True, initial=0.0) + 1.0)
    result = np.abs(oracle(spec, x)) * ROUNDOFF[x.q.dtype]
    return (np.nan_to_num(weights) @ spread) * (shift + weights_roundoff) + np.nan_to_num(result) + 1e-30


def distance(made: Choice, x: Operands, output: Tensor | None = None) -> float:
    """The largest error in units of the floor; infinite if NaNs are not where they should be."""
    found = (run(made, x) if output is None else output).double().numpy()
    right = oracle(made.spec, x)
    if found.shape != right.shape or not np.array_equal(np.isnan(found), np.isnan(right)):
        return float("inf")
    if not found.size:
        return 0.0
    pairs = made.dtype is DType.BFLOAT16 and made.device.arch in {Isa.AVX512_BF16.value, Isa.AMX.value}
    rounded = 2.0**-8 if pairs else 2.0**-24
    return float((np.abs(np.nan_to_num(found - right)) / floor(made.spec, x, rounded)).max())


def variants() -> Sequence[tuple[GroupedQueryAttention, DType, Isa]]:
    """Two or three specs for each number format and instruction set, so that all of them are built."""
    specs = [PLAIN, CAUSAL, MULTI_QUERY, EVERYTHING, BIASED, WIDE, SINKS]
    found = []
    for i, isa in enumerate(Isa):
        for j, dtype in enumerate(DType):
            first = 3 * i + 2 * j
            found += [(specs[(first + n) % len(specs)], dtype, isa) for n in (0, 3)]
    return found


def sparse_variants() -> Sequence[tuple[str, DType, Isa]]:
    """Each kind of pattern once, the number formats and instruction sets among them, so that builds stay few."""
    other = {
        "symmetric window": (DType.FLOAT16, Isa.AVX512),
        "fixed": (DType.BFLOAT16, Isa.AVX512_BF16),
        "symmetric fixed": (DType.BFLOAT16, Isa.AVX512),
        "symmetric strided": (DType.FLOAT32, Isa.AVX2),
        "by head": (DType.FLOAT16, Isa.AVX2),
    }
    return [(name, *other.get(name, (DType.FLOAT32, here()[-1] if here() else Isa.AVX2))) for name in SPARSE]
