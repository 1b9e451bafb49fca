"""Float64 oracle of decoupled attention: each query head with the key head and the value head that it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.ops.grouped_query_attention.reference import attention_weights
from codegen.spec import DecoupledAttention

Float64 = NDArray[np.float64]


def decoupled_attention(
    spec: DecoupledAttention, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], bias: NDArray[Any] | None = None
) -> Float64:
    """[B, heads, S, value_dim] of q [B, heads, S, D], k [B, key_heads, T, D], v [B, value_heads, T, value_dim].

    `bias` is as in `grouped_query_attention`. Raises ValueError if an operand contradicts the spec.
    """
    check(spec, k.shape, v.shape)
    plain = spec.attention
    weights = attention_weights(replace(plain, kv_heads=spec.key_heads), q, k, bias)
    return weights @ v.astype(np.float64)[:, np.arange(plain.heads) // (plain.heads // spec.value_heads)]


def check(spec: DecoupledAttention, k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Raises ValueError if shapes of keys and values contradict the spec."""
    plain = spec.attention
    if k[1] != spec.key_heads or v[1] != spec.value_heads or v[3] != plain.value_dim or k[2] != v[2]:
        raise ValueError(f"k of shape {tuple(k)} and v of shape {tuple(v)} contradict {spec}")
