"""Grouped-query attention in plain, differentiable torch. K and V are never repeated.

The query heads that share a K/V head become rows of one longer query: q [B, H, S, D] is read as
[B, KV, G*S, D]. Where a mask would have to be copied G times for that, sdpa's own grouping is used. What a sparse
pattern leaves of a long sequence is computed tile by tile.

Shape legend: B batch, H query heads, KV key/value heads, G = H / KV, S queries, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from codegen.ops.grouped_query_attention.sparse_body import by_tiles, last_positions, shown, tiled
from codegen.spec import GroupedQueryAttention

FEW_QUERIES = 8
"""Up to here folding a masked query wins on CPUs, above it sdpa's grouping does (measured at T = 4096)."""


def grouped_query_attention(
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention output [B, H, S, E] of q [B, H, S, D], k [B, KV, T, D], v [B, KV, T, E].

    `bias` broadcasts to [B, H, S, T] and is added to the scores; a boolean one keeps a score where it is True.
    `sinks` [B, H, S, n], or broadcastable to it, are further scores that take weight from the keys.
    `dropout` is the probability with which an attention weight is dropped. Rows whose keys are all masked give
    zeros here whatever `spec.masked_rows_are_zero` says, unless there is a softcap: then they follow the spec.

    Raises:
        ValueError: if a bias or sinks are given or missing against the spec.
    """
    _check(spec, bias, sinks)
    if spec.pattern and tiled(spec, q, k):
        return by_tiles(spec, q, k, v, bias, sinks, dropout, grouped_query_attention)
    if spec.softcap is not None or spec.sinks:
        return grouped_query_attention_with_weights(spec, q, k, v, bias, sinks=sinks, dropout=dropout)[0]
    s, t = q.shape[2], k.shape[2]
    if (
        spec.causal and bias is None and not spec.pattern and s == t
    ):  # sdpa aligns its causal mask to the start: right only here
        return functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=spec.scale, enable_gqa=spec.group > 1
        )
    mask = _mask(spec, q, t, bias)
    if spec.group == 1 or not _folding_wins(q, mask):
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=spec.scale, enable_gqa=spec.group > 1
        )
    rows = functional.scaled_dot_product_attention(
        _fold(spec, q), k, v, attn_mask=_fold_mask(spec, mask, s), dropout_p=dropout, scale=spec.scale
    )
    return _unfold(spec, rows, s)


def grouped_query_attention_with_weights(
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `grouped_query_attention`, written out, with the attention weights [B, H, S, T] (after dropout)."""
    _check(spec, bias, sinks)
    s, t = q.shape[2], k.shape[2]
    scores = (_fold(spec, q) @ k.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    mask = _fold_mask(spec, _mask(spec, q, t, bias), s)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        wide = sinks.to(scores.dtype).expand(q.shape[0], spec.heads, s, sinks.shape[-1])
        weights = torch.softmax(torch.cat([scores, _fold(spec, wide)], dim=-1), dim=-1)[..., :t]
    else:
        weights = torch.softmax(scores, dim=-1)
    if mask is not None and spec.masked_rows_are_zero:
        weights = weights.masked_fill((scores == -torch.inf).all(dim=-1, keepdim=True), 0.0)
    weights = functional.dropout(weights.to(v.dtype), p=dropout)
    return _unfold(spec, weights @ v, s), _unfold(spec, weights, s)


def _folding_wins(q: Tensor, mask: Tensor | None) -> bool:
    if mask is None or (mask.shape[-2] == 1 and mask.shape[-3] == 1):
        return True  # nothing to copy
    if q.device.type != "cpu":
        return True  # sdpa with grouping and a mask falls back there to kernels that repeat K and V
    s = q.shape[2]
    # a symbolic length must not be compared with the limit: an exported program would be tied to one side of it
    return isinstance(s, int) and s <= FEW_QUERIES


def _fold(spec: GroupedQueryAttention, q: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, KV, G*S, D]; free of copies where S is 1."""
    return q.reshape(q.shape[0], spec.kv_heads, spec.group * q.shape[2], q.shape[3])


def _unfold(spec: GroupedQueryAttention, rows: Tensor, s: int) -> Tensor:
    """[B, KV, G*S, *] -> [B, H, S, *]."""
    return rows.reshape(rows.shape[0], spec.heads, s, rows.shape[-1])


def _fold_mask(spec: GroupedQueryAttention, mask: Tensor | None, s: int) -> Tensor | None:
    """Broadcastable to [B, H, S, T] -> broadcastable to [B, KV, G*S, T]."""
    if mask is None or spec.group == 1:
        return mask
    b, h, rows, t = mask.shape
    if h == 1 and rows == 1:
        return mask
    if h == 1:
        return mask[:, :, None].expand(b, 1, spec.group, s, t).reshape(b, 1, spec.group * s, t)
    return mask.expand(b, h, s, t).reshape(b, spec.kv_heads, spec.group * s, t)


def _mask(spec: GroupedQueryAttention, q: Tensor, t: int, bias: Tensor | None) -> Tensor | None:
    """One 4-D mask, boolean or in q's dtype, out of the bias, the causal order and the pattern."""
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
        bias = bias if bias.dtype == torch.bool else bias.to(q.dtype)
    keep = shown(spec.pattern, spec.heads, *last_positions(q.shape[2], t, q.device)) if spec.pattern else None
    if spec.causal and q.shape[2] != 1:
        s = q.shape[2]
        order = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)[None, None]
        keep = order if keep is None else keep & order
    if bias is None or keep is None:
        return keep if bias is None else bias
    return bias & keep if bias.dtype == torch.bool else bias.masked_fill(~keep, -torch.inf)


def _check(spec: GroupedQueryAttention, bias: Tensor | None, sinks: Tensor | None) -> None:
    if (sinks is not None) != spec.sinks:
        raise ValueError(f"sinks were {'given' if sinks is not None else 'not given'}, but spec.sinks is {spec.sinks}")
    if (bias is not None) != spec.bias:
        raise ValueError(f"a bias was {'given' if bias is not None else 'not given'}, but spec.bias is {spec.bias}")
