"""Operands of mixed chunk attention between its projections, and how far from the oracle a kernel may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegen.ops.gated_attention import reference as unit
from codegen.ops.mixed_chunk_attention import reference
from codegen.spec import MixedChunkAttention, PositionBias
from tests.kernels.linear_problems import ROUNDOFF

K = 4.0
"""Kernels may be this many times as far off as the floor."""


@dataclass(frozen=True)
class Operands:
    """gate, value [B, S, F]; queries and keys [B, S, N], in the spec's order; numbers of distances; shown [B, S]."""

    gate: Tensor
    value: Tensor
    heads: tuple[Tensor, ...]
    distances: Tensor | None = None
    shown: Tensor | None = None

    def bias(self, spec: MixedChunkAttention) -> Tensor | None:
        """[C, C]"""
        if self.distances is None:
            return None
        at = torch.arange(spec.chunk)
        return self.distances[(at[:, None] - at).clamp(1 - spec.span, spec.span - 1) + spec.span - 1]


def draw(spec: MixedChunkAttention, dtype: torch.dtype, batch: int, tokens: int, *, hide: bool = False) -> Operands:
    """Random operands; scores of about one, half of them positive."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    gate, value = (normal(batch, tokens, spec.expanded).to(dtype) for _ in range(2))
    large = (spec.chunk / spec.base**0.5) ** 0.5
    heads = tuple((normal(batch, tokens, spec.base) * large).to(dtype) for _ in range(4))
    distances = normal(2 * spec.span - 1).to(dtype) if spec.bias is PositionBias.TOEPLITZ else None
    shown = torch.rand(batch, tokens, generator=random) < 0.7 if hide else None
    return Operands(gate, value, heads, distances, shown)


def distance(spec: MixedChunkAttention, x: Operands, output: Tensor) -> float:
    """The largest error in units of what rounding makes of scores, their squares, sums of chunks and the result."""
    wide: list[NDArray[Any]] = [t.double().numpy() for t in (x.gate, x.value, *x.heads)]
    gate, value, quad_query, lin_query, quad_key, lin_key = wide
    weights = {} if x.distances is None else {"distances": x.distances.double().numpy()}
    shown, rounded = None if x.shown is None else x.shown.numpy(), ROUNDOFF[x.gate.dtype]
    within = reference.within_chunks(spec, quad_query, quad_key, value, weights, shown)
    right = gate * (within + reference.between_chunks(spec, lin_query, lin_key, value, shown))
    size = reference.between_chunks(spec, *(np.abs(a) for a in (lin_query, lin_key, value)), shown)
    quadratic = _spread(spec, quad_query, quad_key, np.abs(value), weights, shown)
    # float16 weights and sums stay in single precision, of which products of tensors keep eleven bits
    floor = np.abs(gate) * ((size + quadratic[0]) * 2 * rounded + (size + quadratic[1]) * 2.0**-22)
    floor = floor + np.abs(right) * rounded + 1e-30
    return float((np.abs(output.double().numpy() - right) / floor).max(initial=0.0))


def _spread(
    spec: MixedChunkAttention,
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    weights: dict[str, NDArray[Any]],
    shown: NDArray[Any] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What squares and magnitudes of scores make of magnitudes of values: [B, S, F] each."""
    magnitude = np.abs(query) @ np.abs(key).transpose(0, 2, 1) / spec.chunk
    found = reference.within_chunks(spec, query, key, value, weights, shown)
    total = np.zeros_like(found)
    for chunk in reference.chunks(spec, query.shape[1]):
        at = np.arange(query.shape[1])[chunk]
        bias = np.abs(unit.score_bias(spec, weights, at, at))
        total[:, chunk] = (magnitude[:, chunk, chunk] + bias) ** 2 @ value[:, chunk]
    return found, total
