"""Operands of linear attention, and how far from the oracle a kernel may be: a multiple of what rounding makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codegen.ops.linear_attention import reference
from codegen.spec import FeatureMap, LinearAttention

K = 4.0
"""Kernels may be this many times as far off as the floor."""

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Operands:
    """q [B, H, S, D], k [B, N, T, D], v [B, N, T, E], parameters by name, and which keys are shown [B, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    parameters: dict[str, Tensor]
    shown: Tensor | None = None


def draw(
    spec: LinearAttention, dtype: torch.dtype, batch: int, queries: int, keys: int, *, hide: bool = False
) -> Operands:
    """Random operands that the dtype holds exactly; heads between tokens, as modules lay them out."""
    random, plain = torch.Generator().manual_seed(0), spec.attention

    def normal(heads: int, tokens: int, size: int) -> Tensor:
        return torch.randn(batch, tokens, heads, size, generator=random).to(dtype).transpose(1, 2)

    q = normal(plain.heads, queries, plain.head_dim)
    k, v = (normal(plain.kv_heads, keys, size) for size in (plain.head_dim, plain.value_dim))
    parameters = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in spec.shapes.items()}
    for name in ("query_map", "key_map"):
        if name in parameters:
            parameters[name] = (parameters[name].float() / plain.head_dim**0.5).to(dtype)
    shown = torch.rand(batch, keys, generator=random) < 0.7 if hide else None
    return Operands(q, k, v, parameters, shown)


def distance(spec: LinearAttention, x: Operands, output: Tensor) -> float:
    """The largest error in units of what rounding makes of features, weights, sums of chunks and the result."""
    q, k, v = (t.double().numpy() for t in (x.q, x.k, x.v))
    named = {name: t.double().numpy() for name, t in x.parameters.items()}
    shown = None if x.shown is None else x.shown.numpy()
    right = reference.linear_attention(spec, q, k, v, named, shown)
    weights = reference.attention_weights(spec, q, k, named, shown)
    total = weights.sum(-1, keepdims=True)
    share = weights / np.where(total > 0, total, 1.0)
    group, plain, unit = spec.attention.group, spec.attention, ROUNDOFF[x.q.dtype]
    lengths = [np.linalg.norm(t, axis=-1).max(initial=0.0) for t in (q, k)]
    exponents = plain.scale * lengths[0] * lengths[1]
    if spec.features is FeatureMap.LEARNED:
        widest = max(float(np.linalg.norm(named[n], axis=-1).max()) for n in ("query_map", "key_map"))
        exponents += 2 * plain.scale**0.5 * plain.head_dim**0.25 * max(lengths) * widest
    elif spec.features is FeatureMap.FAVOR:
        widest = float(np.linalg.norm(named["directions"], axis=-1).max())
        exponents += 2 * plain.scale**0.5 * max(lengths) * widest + plain.scale * max(lengths) ** 2
    # features of queries and of keys and their sums are rounded each; a divisor is off by as much as what it divides
    floor = (share @ np.abs(np.repeat(v, group, axis=1))) * (3 * unit + 2.0**-23 * (exponents + 1))
    floor = floor + np.abs(right) * unit + 1e-30
    return float((np.abs(output.double().numpy() - right) / floor).max(initial=0.0))
