"""The float64 oracle of a gated attention unit: its parts, and the whole.

Written token by token where that is clearer; `codegen/ops/mixed_chunk_attention/reference.py` uses the same parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.ops.activation.reference import activate
from codegen.spec import Activation, GatedAttention, MixedChunkAttention, PositionBias

Float64 = NDArray[np.float64]
Gated = GatedAttention | MixedChunkAttention

ROTARY_BASE = 10_000.0
"""The paper's."""


def gated_attention(
    spec: GatedAttention, x: NDArray[Any], weights: Mapping[str, NDArray[Any]], shown: NDArray[Any] | None = None
) -> Float64:
    """[B, S, hidden] of x [B, S, hidden].

    Args:
        weights: by role, as `spec.shapes` has them.
        shown: bool [B, S], False for padding, which no token sees; divisors stay.

    Raises:
        ValueError: if an operand contradicts the spec.
    """
    return projected(before_output(spec, x, weights, shown), weights)


def before_output(
    spec: GatedAttention, x: NDArray[Any], weights: Mapping[str, NDArray[Any]], shown: NDArray[Any] | None = None
) -> Float64:
    """[B, S, expanded]: what the output projection reads."""
    check(spec, x, weights)
    gate, value, latent = expanded(spec, x, weights)
    query, key = heads(spec, latent, weights)
    tokens = x.shape[1]
    bias = score_bias(spec, weights, np.arange(tokens), np.arange(tokens))
    return gate * quadratic(query, key, value, bias, spec.length or tokens, causal=spec.causal, shown=shown)


def quadratic(
    query: Float64,
    key: Float64,
    value: Float64,
    bias: Float64,
    divisor: int,
    *,
    causal: bool,
    shown: NDArray[Any] | None = None,
) -> Float64:
    """[B, S, expanded]: relu(q kᵀ / divisor + bias)² V; what is hidden is dropped after the square."""
    scores = np.maximum(query @ key.transpose(0, 2, 1) / divisor + bias, 0.0) ** 2
    if causal:
        scores = np.tril(scores)
    if shown is not None:
        scores = scores * shown[:, None, :].astype(np.float64)
    return np.asarray(scores @ value, dtype=np.float64)


def projected(product: Float64, weights: Mapping[str, NDArray[Any]]) -> Float64:
    """[B, S, hidden]: the output projection."""
    out = product @ weights["out_weight"].astype(np.float64).T
    return np.asarray(out + weights["out_bias"].astype(np.float64), dtype=np.float64)


def expanded(spec: Gated, x: NDArray[Any], weights: Mapping[str, NDArray[Any]]) -> tuple[Float64, Float64, Float64]:
    """Gate and value [B, S, expanded], base [B, S, base]."""
    whole = x.astype(np.float64) @ weights["expand_weight"].astype(np.float64).T
    whole = whole + weights["expand_bias"].astype(np.float64)
    gate, value, latent = np.split(whole, [spec.expanded, 2 * spec.expanded], axis=-1)
    return activated(spec.gate, gate), activated(spec.value, value), activated(spec.latent, latent)


def heads(spec: Gated, latent: Float64, weights: Mapping[str, NDArray[Any]]) -> list[Float64]:
    """Each head's scale and offset of the base, rotated by position: [B, S, base] each."""
    scale, offset = weights["scale"].astype(np.float64), weights["offset"].astype(np.float64)
    found = [latent * scale[h] + offset[h] for h in range(spec.heads)]
    return [rotated(h, np.arange(latent.shape[1])) for h in found] if spec.rotary else found


def rotated(x: Float64, positions: NDArray[Any]) -> Float64:
    """x [..., S, D] with features (i, i + D / 2) turned by position * 10000^(-2 i / D)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * ROTARY_BASE ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def score_bias(spec: Gated, weights: Mapping[str, NDArray[Any]], rows: NDArray[Any], columns: NDArray[Any]) -> Float64:
    """[R, C] for queries at positions `rows` and keys at positions `columns`."""
    if spec.bias is PositionBias.TOEPLITZ:
        distance = np.clip(rows[:, None] - columns[None], 1 - spec.span, spec.span - 1)
        return np.asarray(weights["distances"].astype(np.float64)[distance + spec.span - 1])
    if spec.bias is PositionBias.ROTARY:
        query, key = (weights[n].astype(np.float64) for n in ("query_vector", "key_vector"))
        left = rotated(np.tile(query, (len(rows), 1)), rows)
        return np.asarray(left @ rotated(np.tile(key, (len(columns), 1)), columns).T)
    return np.zeros((len(rows), len(columns)))


def activated(kind: Activation | None, x: Float64) -> Float64:
    """Element by element; None leaves x as it is."""
    return x if kind is None else activate(kind, x)


def check(spec: Gated, x: Any, weights: Mapping[str, Any]) -> None:
    """Raises ValueError if an operand's shape contradicts the spec, or one is missing or left over."""
    if x.ndim != 3 or x.shape[-1] != spec.hidden:
        raise ValueError(f"x has shape {tuple(x.shape)}, which contradicts {spec}")
    given = {role: tuple(array.shape) for role, array in weights.items()}
    if given != spec.shapes:
        raise ValueError(f"operands {given} contradict {spec}, which wants {spec.shapes}")
