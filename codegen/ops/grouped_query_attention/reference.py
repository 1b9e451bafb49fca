"""Float64 oracle of grouped-query attention: the definition of right for every other implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.sight import visible
from codegen.spec import GroupedQueryAttention

Float64 = NDArray[np.float64]


def attention_weights(
    spec: GroupedQueryAttention,
    q: NDArray[Any],
    k: NDArray[Any],
    bias: NDArray[Any] | None = None,
    sinks: NDArray[Any] | None = None,
) -> Float64:
    """Softmax weights [B, heads, S, T] of q [B, heads, S, head_dim] and k [B, kv_heads, T, head_dim].

    `bias` broadcasts to [B, heads, S, T]; a boolean one stands for 0 where True and -inf where False. `sinks`
    [B, heads, S, n], or broadcastable to it, are further scores that take weight from the keys.

    Raises:
        ValueError: if an operand's shape contradicts the spec, or a bias or sinks are given or missing against it.
    """
    _check(spec, q, k, bias)
    if (sinks is not None) != spec.sinks:
        raise ValueError(f"sinks were {'given' if sinks is not None else 'not given'}, but spec.sinks is {spec.sinks}")
    scores = q.astype(np.float64) @ np.swapaxes(_repeat(spec, k), -1, -2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + (np.where(bias, 0.0, -np.inf) if bias.dtype == np.bool_ else bias.astype(np.float64))
    if spec.causal:
        rows, columns = scores.shape[-2:]
        scores = np.where(np.tri(rows, columns, columns - rows, dtype=np.bool_), scores, -np.inf)
    if spec.pattern:
        scores = np.where(shown(spec, *scores.shape[-2:]), scores, -np.inf)
    keys = scores.shape[-1]
    if sinks is not None:
        wide = np.broadcast_to(sinks.astype(np.float64), (*scores.shape[:-1], sinks.shape[-1]))
        scores = np.concatenate([scores, wide], axis=-1)
    return _softmax(scores, masked_rows_are_zero=spec.masked_rows_are_zero)[..., :keys]


def grouped_query_attention(
    spec: GroupedQueryAttention,
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    bias: NDArray[Any] | None = None,
    sinks: NDArray[Any] | None = None,
) -> Float64:
    """Attention output [B, heads, S, value_dim]; v is [B, kv_heads, T, value_dim], the rest as `attention_weights`."""
    if v.shape[1] != spec.kv_heads or v.shape[-1] != spec.value_dim or v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v has shape {v.shape}, which contradicts {spec}")
    return attention_weights(spec, q, k, bias, sinks) @ _repeat(spec, v)


def shown(spec: GroupedQueryAttention, queries: int, keys: int) -> NDArray[np.bool_]:
    """[heads, S, T]: what the spec's pattern shows."""
    rows, columns = np.arange(keys - queries, keys)[:, None], np.arange(keys)
    sights = [visible(sight, rows, columns) for sight in spec.pattern]
    return np.stack([sights[head % len(sights)] for head in range(spec.heads)])


def _repeat(spec: GroupedQueryAttention, x: NDArray[Any]) -> Float64:
    return np.repeat(x.astype(np.float64), spec.group, axis=1)


def _softmax(scores: Float64, *, masked_rows_are_zero: bool) -> Float64:
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    masked = np.isneginf(peak)
    exponentials = np.exp(scores - np.where(masked, 0.0, peak))
    total = exponentials.sum(axis=-1, keepdims=True)
    weights = exponentials / np.where(masked, 1.0, total)
    return np.where(masked, 0.0 if masked_rows_are_zero else np.nan, weights)


def _check(spec: GroupedQueryAttention, q: NDArray[Any], k: NDArray[Any], bias: NDArray[Any] | None) -> None:
    for name, array, heads in (("q", q, spec.heads), ("k", k, spec.kv_heads)):
        if array.ndim != 4 or array.shape[1] != heads or array.shape[-1] != spec.head_dim:
            raise ValueError(f"{name} has shape {array.shape}, which contradicts {spec}")
    if (bias is not None) != spec.bias:
        raise ValueError(f"a bias was {'given' if bias is not None else 'not given'}, but spec.bias is {spec.bias}")
