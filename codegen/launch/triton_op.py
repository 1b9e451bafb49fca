"""Runs a generated Triton kernel on torch tensors: whole rows for many queries, split keys and a sum for few.

Shape legend: B batch, H query heads, KV key/value heads, S queries, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from codegen.device import DType
from codegen.errors import NotLegal
from codegen.launch import triton_source
from codegen.launch.operands import (
    DTYPES,
    aligned,
    dense,
    empty_output,
    require_fitting,
    require_near,
    wide_bias,
    wide_sinks,
)
from codegen.ops.grouped_query_attention import triton_kernel, triton_sight
from codegen.spec import GroupedQueryAttention


@dataclass(frozen=True)
class _Cut:
    """Kernels of one way to cut the work; made when first asked for."""

    spec: GroupedQueryAttention
    dtype: DType
    arch: str
    few_queries: bool
    tiling: triton_kernel.Tiling

    def kernel(self, suffix: str) -> Any:
        name, module = _load(self)
        return getattr(module, name + suffix)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.tiling.warps, "num_stages": self.tiling.stages}

    def wide_tiles(self, queries: int, keys: int) -> int:
        """Tiles of queries that a sparse pattern lets see all keys."""
        return triton_sight.wide_tiles(self.spec, self.tiling.row_tile, queries, keys)

    def tiles(self, queries: int, keys: int) -> int:
        rows = queries * triton_sight.rows_of_a_query(self.spec)
        return self.wide_tiles(queries, keys) + math.ceil(rows / self.tiling.row_tile)

    def lengths(self, queries: int, keys: int) -> tuple[int, ...]:
        """As kernels take them."""
        return (queries, keys, self.wide_tiles(queries, keys)) if self.spec.pattern else (queries, keys)


def launch(
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    arch: str,
    processors: int,
    cut: triton_kernel.Tiling | None = None,
) -> Tensor:
    """Attention output [B, H, S, E] of q [B, H, S, D], k [B, KV, T, D] and v [B, KV, T, E].

    Args:
        bias: broadcastable to [B, H, S, T]; a boolean one keeps a score where it is True.
        sinks: broadcastable to [B, H, S, n].
        arch: what tile sizes are for, e.g. "sm_90".
        processors: multiprocessors of the card; keys are split until they have work.
        cut: tile sizes to use instead of `triton_kernel.tiling`'s, for measurements.

    Raises:
        NotLegal: the spec or the dtype is beyond the kernel, a tensor is too large for its offsets, or a sparse pattern
            comes with more queries than keys.
        ValueError: shapes that contradict the spec.
    """
    dtype = DTYPES.get(q.dtype)
    reason = f"there is no kernel in {q.dtype}" if dtype is None else triton_kernel.legal(spec, dtype)
    if dtype is None or reason is not None:
        raise NotLegal(str(reason), hint='use kernels="auto" or "off"')
    require_fitting(spec, q, k, v)
    q, k, v = (dense(x) for x in (q, k, v))
    require_near(q, k, v)
    b, _, s, _ = q.shape
    t = k.shape[2]
    if spec.pattern and s > t:
        raise NotLegal(f"{s} queries are not the last of {t} keys", hint='use kernels="auto" or "off"')
    out = empty_output(q, v)
    if not out.numel() or not t:
        return out.zero_()  # without keys, an empty sum
    operands = (*_strided(q, k, v), *_bias(bias, q, t), *_sinks(sinks, q))
    even = aligned(k) and aligned(v)
    few, many = (
        _Cut(spec, dtype, arch, few, cut or triton_kernel.tiling(spec, dtype, arch, few_queries=few, aligned=even))
        for few in (True, False)
    )
    splits, share = _splits(few, b, s, t, processors)
    rows = s * triton_sight.rows_of_a_query(spec)
    heads = triton_sight.programs(spec)
    if few.tiling.descriptors or many.tiling.descriptors:
        _allow_scratch(q.device)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if splits == 1 and rows > few.tiling.row_tile:
            grid = (many.tiles(s, t), heads, b)
            many.kernel("")[grid](*operands, out, *out.stride()[:3], *many.lengths(s, t), **many.options)
        else:
            _split(few, operands, out, s, t, splits, share)
    return out


def _split(few: _Cut, operands: tuple[Any, ...], out: Tensor, s: int, t: int, splits: int, share: int) -> None:
    b, spec = out.shape[0], few.spec
    lines, tiles, heads = few.tiling.row_tile, few.tiles(s, t), triton_sight.programs(spec)
    lengths = few.lengths(s, t)
    state = torch.empty((b * tiles, heads, splits, lines), dtype=torch.float32, device=out.device)
    sums = state.new_empty((*state.shape, triton_kernel.block(spec.value_dim)))
    top, total = state, torch.empty_like(state)
    few.kernel("_split")[(splits, heads, b * tiles)](*operands, sums, top, total, *lengths, share, **few.options)
    joined = lengths if spec.pattern else (s,)
    few.kernel("_join")[(tiles, heads, b)](sums, top, total, out, *out.stride()[:3], *joined, splits, **few.options)


def _splits(cut: _Cut, b: int, s: int, t: int, processors: int) -> tuple[int, int]:
    """(how many parts the keys fall into, keys of a part): as many as keep every processor busy twice."""
    tiles = cut.tiles(s, t) * triton_sight.programs(cut.spec) * b
    most = triton_sight.most_keys(cut.spec, cut.tiling.row_tile, s, t)
    wanted = max(1, 2 * processors // max(1, tiles))
    share = max(1, math.ceil(most / wanted / cut.tiling.key_tile)) * cut.tiling.key_tile
    return max(1, math.ceil(most / share)), share


def _strided(*tensors: Tensor) -> tuple[Any, ...]:
    return (*tensors, *(stride for x in tensors for stride in x.stride()[:3]))


def _allow_scratch(device: torch.device) -> None:
    """Let kernels take memory on the card, where tensor descriptors lie."""
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


def _bias(bias: Tensor | None, q: Tensor, t: int) -> tuple[Any, ...]:
    if bias is None:
        return ()
    wide = wide_bias(bias, q, t)
    boolean = wide.dtype == torch.bool
    require_near(wide)
    return wide.view(torch.uint8) if boolean else wide, *wide.stride(), boolean


def _sinks(sinks: Tensor | None, q: Tensor) -> tuple[Any, ...]:
    if sinks is None:
        return ()
    wide = wide_sinks(sinks, q)
    return wide, wide.shape[3], *wide.stride()


@functools.lru_cache(maxsize=256)
def _load(cut: _Cut) -> tuple[str, ModuleType]:
    """(the kernels' name, the module that holds them)."""
    options = {"few_queries": cut.few_queries}
    text = triton_kernel.source(cut.spec, cut.dtype, cut.arch, **options, cut=cut.tiling)
    name = triton_kernel.kernel_name(cut.spec, cut.dtype, cut.arch, **options, descriptors=cut.tiling.descriptors)
    return str(name), triton_source.kept(str(name), text)
