"""Sparse grouped-query attention in plain, differentiable torch: a mask over all scores, or tile by tile.

Shape legend: B batch, H query heads, KV key/value heads, S queries, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegen.ops.grouped_query_attention.tiles import Positions, tiles, worth_tiling
from codegen.sight import Pattern, visible
from codegen.spec import GroupedQueryAttention

Attend = Callable[..., Tensor]
"""`torch_body.grouped_query_attention`."""


def shown(pattern: Pattern, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """[1, 1 or H, S, T]: which of the keys at some positions [T] queries at some positions [S] see."""
    sights: list[Tensor] = [visible(sight, queries[:, None], keys[None]) for sight in pattern]
    if len(sights) == 1:
        return sights[0][None, None]
    return torch.stack([sights[head % len(sights)] for head in range(heads)])[None]


def last_positions(queries: Any, keys: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of S queries that are the last of T keys, and those of the keys."""
    return torch.arange(queries, device=device) + (keys - queries), torch.arange(keys, device=device)


def tiled(spec: GroupedQueryAttention, q: Tensor, k: Tensor) -> bool:
    """Whether a call is computed by tiles. Captured programs are not: they would be tied to one length."""
    captured = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    s, t = q.shape[2], k.shape[2]
    return not captured and isinstance(s, int) and isinstance(t, int) and worth_tiling(spec.pattern, s, t)


def by_tiles(
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout: float,
    attend: Attend,
) -> Tensor:
    """Attention output [B, H, S, E]; `attend` computes one tile."""
    if len(spec.pattern) == 1:
        return _by_tiles(spec, q, k, v, bias, sinks, dropout, attend)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    apart = len(spec.pattern)
    for number, sight in enumerate(spec.pattern[: spec.heads]):
        mine = list(range(number, spec.heads, apart))
        read = torch.tensor([head // spec.group for head in mine], device=q.device)
        alone = replace(spec, heads=len(mine), kv_heads=len(mine), pattern=(sight,))
        parts = [_heads(x, mine) for x in (bias, sinks)]
        own = _by_tiles(alone, q[:, mine], k[:, read], v[:, read], parts[0], parts[1], dropout, attend)
        out = out.index_copy(1, torch.tensor(mine, device=q.device), own)
    return out


def _by_tiles(
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout: float,
    attend: Attend,
) -> Tensor:
    s, t = q.shape[2], k.shape[2]
    inner = replace(spec, pattern=(), causal=False, bias=True)
    order: list[Positions] = []
    outputs: list[Tensor] = []
    for tile in tiles(spec.pattern[0], s, t):
        rows, columns = (torch.from_numpy(p).to(q.device) for p in (tile.queries, tile.keys))
        mask = shown(spec.pattern, spec.heads, rows + (t - s), columns)
        if spec.causal:
            mask = mask & (columns[None] <= rows[:, None] + (t - s))
        if bias is not None:
            part = _along(_along(_four(bias), rows, 2), columns, 3)
            mask = mask & part if part.dtype == torch.bool else part.masked_fill(~mask, -torch.inf)
        further = None if sinks is None else _along(_four(sinks), rows, 2)
        operands = (_taken(q, tile.queries), _taken(k, tile.keys), _taken(v, tile.keys))
        outputs.append(attend(inner, *operands, mask, sinks=further, dropout=dropout))
        order.append(tile.queries)
    together = torch.cat(outputs, dim=2)
    places = torch.from_numpy(np.concatenate(order)).to(q.device)
    if bool((places[1:] > places[:-1]).all()):
        return together
    return torch.empty_like(together).index_copy(2, places, together)


def _taken(x: Tensor, positions: Positions) -> Tensor:
    """x [B, N, tokens, *] at ascending positions; a view where these have no gap, one copy elsewhere."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions):
        return x[:, :, first : last + 1]
    return x.index_select(2, torch.from_numpy(positions).to(x.device))


def _four(x: Tensor) -> Tensor:
    return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


def _along(x: Tensor, positions: Tensor, axis: int) -> Tensor:
    """At some positions of an axis, unless the axis is there to be broadcast."""
    return x if x.shape[axis] == 1 else x.index_select(axis, positions)


def _heads(x: Tensor | None, heads: list[int]) -> Tensor | None:
    return x if x is None or _four(x).shape[1] == 1 else _four(x)[:, heads]
