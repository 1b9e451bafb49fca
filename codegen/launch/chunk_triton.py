"""Runs the generated Triton kernels of mixed chunk attention on torch tensors: sums of chunks, running sums, attention.

Shape legend: B batch, S tokens = G chunks of C, F expanded, N base.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from codegen.device import DType
from codegen.errors import NotLegal
from codegen.launch import triton_source
from codegen.launch.operands import DTYPES
from codegen.ops.mixed_chunk_attention import triton_kernel
from codegen.ops.mixed_chunk_attention.torch_body import divisors, hide, products
from codegen.spec import MixedChunkAttention


def launch(
    spec: MixedChunkAttention,
    gate: Tensor,
    value: Tensor,
    heads: Sequence[Tensor],
    bias: Tensor | None = None,
    shown: Tensor | None = None,
    *,
    arch: str,
    cut: triton_kernel.Tiling | None = None,
) -> Tensor:
    """[B, S, F], dense: the gate times what was mixed within and between chunks, in the gate's dtype.

    Args:
        gate, value: [B, S, F].
        heads: quadratic query, linear query, quadratic key and linear key, [B, S, N] each.
        bias: [C, C], added to the scores where the spec has one.
        shown: bool [B, S], False for tokens that none sees.
        arch: what tile sizes are for, e.g. "sm_90".
        cut: tile sizes to use instead of `triton_kernel.tiling`'s, for measurements.

    Raises:
        NotLegal: the spec or the dtype is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    dtype = DTYPES.get(gate.dtype)
    reason = f"there is no kernel in {gate.dtype}" if dtype is None else triton_kernel.legal(spec, dtype)
    if dtype is None or reason is not None or any(x.dtype != gate.dtype for x in (value, *heads)):
        raise NotLegal(reason or "operands differ in dtype", hint='use kernels="auto" or "off"')
    _check(spec, gate, value, heads, bias)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not out.numel():
        return out
    gate, value, query, linear, key, linear_key = (
        x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in (gate, value, *heads)
    )
    cut = triton_kernel.tiling(spec, dtype, arch) if cut is None else cut
    name, kernels = _load(spec, dtype, arch, cut)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    b, s, width = gate.shape
    chunks, tiles = -(-s // spec.chunk), -(-width // cut.column_tile)
    hidden = _hidden(shown, gate)
    with torch.cuda.device(gate.device) if gate.is_cuda else contextlib.nullcontext():
        if spec.causal:
            each = gate.new_empty(b, chunks, spec.base, width, dtype=torch.float32)
            added = (*_rows(linear_key), *_rows(value), *hidden, each)
            getattr(kernels, f"{name}_states")[(tiles, chunks, b)](*added, s, **options)
            states = _before(spec, each)
        else:
            states = products(hide(linear_key, shown), value)[:, None] / s
        states = states.to(torch.float32 if dtype is DType.FLOAT16 else gate.dtype)
        strides = (states.stride(0), states.stride(1) if spec.causal else 0)
        rows = (*_rows(gate), *_rows(value), *_rows(query), *_rows(linear), *_rows(key))
        table = () if bias is None else (bias.to(gate.dtype).contiguous(),)
        grid = (tiles, chunks * cut.rows_of_a_chunk(spec.chunk), b)
        getattr(kernels, name)[grid](*rows, *table, *hidden, states, *strides, out, s, **options)
    return out


def _before(spec: MixedChunkAttention, each: Tensor) -> Tensor:
    """[B, G, N, F]: what the chunks before each add up to, divided; `each` is overwritten."""
    states = torch.zeros_like(each)
    torch.cumsum(each[:, :-1], 1, out=states[:, 1:])
    return states.div_(divisors(spec, states, 0))


def _rows(x: Tensor) -> tuple[Any, ...]:
    return x, x.stride(0), x.stride(1)


def _hidden(shown: Tensor | None, like: Tensor) -> tuple[Any, ...]:
    if shown is None:
        return like, 0, 0, False  # never read
    wide = shown.expand(like.shape[:2])
    return wide.view(torch.uint8), *wide.stride(), True


def _check(
    spec: MixedChunkAttention, gate: Tensor, value: Tensor, heads: Sequence[Tensor], bias: Tensor | None
) -> None:
    tokens = tuple(gate.shape[:2])
    wanted = [(*tokens, spec.expanded)] * 2 + [(*tokens, spec.base)] * 4
    found = [tuple(x.shape) for x in (gate, value, *heads)]
    if found != wanted or (bias is not None and bias.shape != (spec.chunk, spec.chunk)):
        raise ValueError(f"operands of shapes {found} contradict {spec}")


@functools.lru_cache(maxsize=64)
def _load(spec: MixedChunkAttention, dtype: DType, arch: str, cut: triton_kernel.Tiling) -> tuple[str, ModuleType]:
    """(the kernels' name, the module that holds them)."""
    name = str(triton_kernel.kernel_name(spec, dtype, arch))
    return name, triton_source.kept(name, triton_kernel.source(spec, dtype, arch, cut=cut))
