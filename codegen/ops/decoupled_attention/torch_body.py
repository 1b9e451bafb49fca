"""Decoupled attention in torch: keys and values repeated to as many heads as both divide, then grouped attention."""

from __future__ import annotations

from torch import Tensor

from codegen.ops.decoupled_attention.reference import check
from codegen.ops.grouped_query_attention.torch_body import grouped_query_attention
from codegen.spec import DecoupledAttention


def decoupled_attention(
    spec: DecoupledAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """[B, heads, S, value_dim] of q [B, heads, S, D], k [B, key_heads, T, D], v [B, value_heads, T, value_dim].

    `bias` and `dropout` are as in `grouped_query_attention`. Raises ValueError if an operand contradicts the spec.
    """
    check(spec, tuple(k.shape), tuple(v.shape))
    return grouped_query_attention(spec.attention, q, *together(k, v, spec.attention.kv_heads), bias, dropout=dropout)


def together(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, T, ...], each head repeated for its group; or as they are."""
    spread = [x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v)]
    return spread[0], spread[1]
