"""Queries and keys turned by the cosines and sines that a caller gives, in whatever layout they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def given_tables(call: Mapping[str, Any], order: str) -> tuple[Tensor, Tensor] | None:
    """cos and sin as the caller gives them: a pair (in this order), two arguments, or one complex tensor."""
    rotary = call.get("rotary")
    if isinstance(rotary, Tensor) and rotary.is_complex():
        return rotary.real, rotary.imag
    if rotary is not None:
        cos, sin = rotary if order == "cos first" else reversed(rotary)
        return cos, sin
    if call.get("cos") is not None:
        return call["cos"], call["sin"]
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairing: str, tables: str) -> Tensor:
    """Rotate the leading features of x [B, heads, tokens, D] by tables [.., tokens, R] or [.., tokens, R/2]."""
    cos, sin = (_spread(table, x, pairing, tables) for table in (cos, sin))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned * cos + _quarter_turn(turned, pairing) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _spread(table: Tensor, x: Tensor, pairing: str, tables: str) -> Tensor:
    """One entry per feature, broadcastable to [B, heads, tokens, R], in x's dtype."""
    if table.dim() == 3:
        table = table[:, None]
    elif table.dim() == 2:
        table = table[None, None]
    if tables == "first":
        table = table[..., : table.shape[-1] // 2]
    if tables != "full":
        table = torch.cat((table, table), dim=-1) if pairing == "half" else table.repeat_interleave(2, dim=-1)
    return table.to(x.dtype)


def _quarter_turn(x: Tensor, pairing: str) -> Tensor:
    if pairing == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
