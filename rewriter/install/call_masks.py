"""Masks as callers give them, made one mask over queries and keys: boolean (True keeps) or additive.

Shape legend: B batch, S queries, T keys, H query heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.install.protocol import Protocol, mask_kind


def checked(protocol: Protocol, mask: Tensor, true_keeps: bool) -> Tensor:
    """Boolean with True for a visible key, or additive."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask of type {type(mask).__name__} is not understood; give a tensor")
    kind = mask_kind(mask)
    if kind in protocol.masks_refused:
        raise TypeError(f"a {kind} mask means something else here than it did in the original; use another dtype")
    if kind == "int":
        mask = mask != 0
    if mask.dtype == torch.bool and not true_keeps:
        mask = ~mask
    return mask


def of_four_axes(protocol: Protocol, mask: Tensor, q: Tensor, heads: int) -> Tensor:
    """Of two to four dimensions -> [B or 1, H or 1, S or 1, T]."""
    mask = checked(protocol, mask, protocol.mask_true_keeps)
    if mask.dim() == 4:
        return mask
    if mask.dim() == 3:
        per_head = mask.shape[0] == q.shape[0] * heads
        return mask.view(q.shape[0], heads, *mask.shape[1:]) if per_head else mask[:, None]
    if mask.dim() != 2:
        raise TypeError(f"a mask of {mask.dim()} dimensions is not understood")
    return mask[:, None, None] if protocol.flat_mask == "batch" else mask[None, None]


def at_the_end(past: Any, q: Tensor, k: Tensor) -> bool:
    """Whether the queries are the last of the keys' positions, the first of which is 0."""
    if isinstance(past, Tensor):
        return False
    if torch.compiler.is_exporting():  # lengths are symbols, and caches that a program can hold only grow
        return True
    return bool(past + q.shape[2] == k.shape[2])


def causal_over_cache(q: Tensor, k: Tensor, v: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Without a mask, more keys than queries are the unused end of a preallocated cache, unless there is one query."""
    s = q.shape[2]
    if s == 1:
        return False, k, v
    return True, k[:, :, :s], v[:, :, :s]


def with_order(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    if not causal:
        return mask
    s, t = q.shape[2], k.shape[2]
    order = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)[None, None]
    return order if mask is None else combined(mask, order, q.dtype)


def combined(first: Tensor | None, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Both masks at once: boolean if both are, else additive with the lowest number where a boolean one hides."""
    if first is None:
        return second
    if second.dtype == torch.bool:
        first, second = second, first
    if first.dtype != torch.bool:
        return first + second
    return first & second if second.dtype == torch.bool else second.masked_fill(~first, torch.finfo(dtype).min)
