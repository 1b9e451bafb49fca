"""Runs the generated Triton kernels of linear attention on torch tensors: sums of chunks, running sums, attention.

Shape legend: B batch, H query heads, N key/value heads, S queries, T keys, D head_dim, E value_dim, F features; P
chunks of keys, G chunks that queries lie in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.device import DType
from codegen.errors import NotLegal
from codegen.launch import triton_source
from codegen.launch.operands import DTYPES, dense, empty_output
from codegen.ops.linear_attention import triton_kernel
from codegen.ops.linear_attention.reference import check
from codegen.spec import FeatureMap, LinearAttention


def launch(
    spec: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Mapping[str, Tensor],
    shown: Tensor | None = None,
    *,
    arch: str,
    cut: triton_kernel.Tiling | None = None,
) -> Tensor:
    """[B, H, S, E] in q's dtype; arguments as the torch body's.

    Args:
        arch: what tile sizes are for, e.g. "sm_90".
        cut: tile sizes to use instead of `triton_kernel.tiling`'s, for measurements.

    Raises:
        NotLegal: the spec or the dtype is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    check(spec, q, k, v, parameters)
    dtype = DTYPES.get(q.dtype)
    reason = f"there is no kernel in {q.dtype}" if dtype is None else triton_kernel.legal(spec, dtype)
    if dtype is None or reason is not None or not q.dtype == k.dtype == v.dtype:
        raise NotLegal(reason or "q, k and v differ in dtype", hint='use kernels="auto" or "off"')
    out = empty_output(q, v)
    if not out.numel():
        return out
    q, k, v = (dense(x) for x in (q, k, v))
    cut = triton_kernel.tiling(spec, dtype, arch) if cut is None else cut
    name, kernels = _load(spec, dtype, arch, cut)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    maps = _maps(spec, parameters, q.dtype)
    hidden = _hidden(shown, k)
    (b, heads, s, _), t = q.shape, k.shape[2]
    leading, chunks = (t - s) // spec.chunk, -(-t // spec.chunk)
    strides = tuple(stride for x in (k, v) for stride in x.stride()[:3])
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        each = k.new_empty(b, k.shape[1], chunks, spec.width, v.shape[3], dtype=torch.float32)
        ones = each.new_empty(each.shape[:-1])
        if chunks > 2:  # else no key is far
            grid = (chunks * triton_kernel.parts(spec), k.shape[1], b)
            getattr(kernels, f"{name}_states")[grid](k, v, *strides, *maps["k"], *hidden, each, ones, t, **options)
            each, ones = (_beyond(spec, x, leading, t) for x in (each, ones))
        operands = (q, k, v, *q.stride()[:3], *strides, *maps["q"], parameters["log_gain"].float().contiguous())
        states = each.to(q.dtype)
        grid = ((chunks - leading) * cut.rows_of_a_chunk(spec.chunk), heads, b)
        getattr(kernels, name)[grid](*operands, *hidden, states, ones, out, *out.stride()[:3], s, t, leading, **options)
    return out


def _beyond(spec: LinearAttention, each: Tensor, leading: int, keys: int) -> Tensor:
    """[B, N, G, ...]: what the far chunks of each chunk from number `leading` on add up to, divided by how many keys
    they have; `each` [B, N, P, ...] is overwritten. Running sums, not differences, as in the torch body."""
    chunks = each.shape[2]
    behind = None if spec.attention.causal else each.flip(2).cumsum(2).flip(2)
    numbers = torch.arange(leading, chunks, device=each.device)
    far = (numbers - 1).clamp_min(0) * spec.chunk
    before = torch.cumsum(each, 2, out=each)
    pad = [0, 0] * (each.dim() - 3)
    found = F.pad(before[:, :, max(leading - 2, 0) : chunks - 2], (*pad, min(2, max(2 - leading, 0)), 0))
    if behind is not None:
        far = far + (keys - (numbers + 2) * spec.chunk).clamp_min(0)
        found = found + F.pad(behind[:, :, leading + 2 :], (*pad, 0, min(2, chunks - leading)))
    return found / far.clamp_min(1).to(found.dtype).view(-1, *[1] * (each.dim() - 3))


def _maps(spec: LinearAttention, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    if spec.features is FeatureMap.LEARNED:
        return {x: (parameters[f"{name}_map"].to(dtype).contiguous(),) for x, name in (("q", "query"), ("k", "key"))}
    if spec.features is FeatureMap.FAVOR:
        return dict.fromkeys("qk", (parameters["directions"].float().contiguous(),))
    return dict.fromkeys("qk", ())


def _hidden(shown: Tensor | None, k: Tensor) -> tuple[Any, ...]:
    if shown is None:
        return k, 0, 0, False  # never read
    wide = shown.expand(k.shape[0], k.shape[2])
    return wide.view(torch.uint8), *wide.stride(), True


@functools.lru_cache(maxsize=64)
def _load(spec: LinearAttention, dtype: DType, arch: str, cut: triton_kernel.Tiling) -> tuple[str, ModuleType]:
    """(the kernels' name, the module that holds them)."""
    name = str(triton_kernel.kernel_name(spec, dtype, arch))
    return name, triton_source.kept(name, triton_kernel.source(spec, dtype, arch, cut=cut))
