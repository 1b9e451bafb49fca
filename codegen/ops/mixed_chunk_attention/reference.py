"""The float64 oracle of mixed chunk attention: within chunks, between chunks, and both together behind the gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.ops.gated_attention import reference as unit
from codegen.ops.gated_attention.reference import Float64
from codegen.spec import MixedChunkAttention


def mixed_chunk_attention(
    spec: MixedChunkAttention, x: NDArray[Any], weights: Mapping[str, NDArray[Any]], shown: NDArray[Any] | None = None
) -> Float64:
    """[B, S, hidden] of x [B, S, hidden]; operands as in `gated_attention`.

    Raises ValueError if an operand contradicts the spec.
    """
    return unit.projected(before_output(spec, x, weights, shown), weights)


def before_output(
    spec: MixedChunkAttention, x: NDArray[Any], weights: Mapping[str, NDArray[Any]], shown: NDArray[Any] | None = None
) -> Float64:
    """[B, S, expanded]: what the output projection reads."""
    unit.check(spec, x, weights)
    gate, value, latent = unit.expanded(spec, x, weights)
    quad_query, lin_query, quad_key, lin_key = unit.heads(spec, latent, weights)
    within = within_chunks(spec, quad_query, quad_key, value, weights, shown)
    between = between_chunks(spec, lin_query, lin_key, value, shown)
    return gate * (within + between)


def within_chunks(
    spec: MixedChunkAttention,
    query: Float64,
    key: Float64,
    value: Float64,
    weights: Mapping[str, NDArray[Any]],
    shown: NDArray[Any] | None = None,
) -> Float64:
    """[B, S, expanded]: each chunk by itself is a gated attention with divisor C."""
    parts = []
    for chunk in chunks(spec, query.shape[1]):
        at = np.arange(query.shape[1])[chunk]
        bias = unit.score_bias(spec, weights, at, at)
        hidden = None if shown is None else shown[:, chunk]
        parts.append(
            unit.quadratic(
                query[:, chunk], key[:, chunk], value[:, chunk], bias, spec.chunk, causal=spec.causal, shown=hidden
            )
        )
    return np.concatenate(parts, axis=1)


def between_chunks(
    spec: MixedChunkAttention, query: Float64, key: Float64, value: Float64, shown: NDArray[Any] | None = None
) -> Float64:
    """[B, S, expanded]: linear queries times what other chunks' keys and values add up to."""
    if shown is not None:
        key = key * shown[..., None].astype(np.float64)
    tokens = query.shape[1]
    states = prefixes(spec, key, value)
    return np.concatenate([query[:, c] @ state for c, state in zip(chunks(spec, tokens), states, strict=True)], axis=1)


def prefixes(spec: MixedChunkAttention, key: Float64, value: Float64) -> list[Float64]:
    """For each chunk [B, base, expanded]: the sum of kᵀ v over the chunks before it, or over all, divided."""
    tokens, found = key.shape[1], []
    for number, _ in enumerate(chunks(spec, tokens)):
        before = slice(0, number * spec.chunk) if spec.causal else slice(None)
        total = key[:, before].transpose(0, 2, 1) @ value[:, before]
        divisor = spec.chunk * (max(number, 1) if spec.averaged else 1) if spec.causal else tokens
        found.append(total / divisor)
    return found


def chunks(spec: MixedChunkAttention, tokens: int) -> list[slice]:
    """Where each chunk's tokens are; the last may be a part."""
    return [slice(start, min(start + spec.chunk, tokens)) for start in range(0, tokens, spec.chunk)]
