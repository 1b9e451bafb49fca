"""Attention that is a softmax nearby and a product of features beyond."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from codegen.spec.softmax import GroupedQueryAttention


class FeatureMap(Enum):
    """What queries and keys become where a product of features stands in for an exponentiated score."""

    LEARNED = "learned"
    """``softmax(W x), softmax(-W x)`` side by side, W learned for each head (Hedgehog, arXiv 2402.04347)."""
    ELU1 = "elu1"
    """``elu(x) + 1`` (arXiv 2006.16236)."""
    FAVOR = "favor+"
    """``exp(w x - |x|^2 / 2)`` for orthogonal random w: an unbiased estimate of ``exp(q k)`` (arXiv 2009.14794)."""


@dataclass(frozen=True)
class LinearAttention:
    """Attention that is a softmax nearby and a product of features beyond, normalised together (arXiv 2410.10254).

    Sequences are cut into chunks. A query's near keys are those of its own chunk and of the one before, where it is
    not causal also of the one behind; far keys are all others that it may see. With s the scores ``scale * q k``, m
    the greatest near one and f the features, a near key has the weight ``exp(s - m)``, a far one
    ``gain * f(q) f(k)``, with FAVOR+ ``gain * exp(-m) * f(q) f(k)``; weights are divided by their sum. Features read
    ``x * sqrt(scale) * head_dim ** (1/4)``, which is x at the usual scale, those of FAVOR+ ``x * sqrt(scale)``.

    Operands are q, k and v as in `GroupedQueryAttention`, the queries being the last S of T positions, and those of
    `shapes`. Keys may be hidden from all queries; a query that sees none gives zeros.

    Attributes:
        attention: heads, scale and order; without anything else that changes scores.
        chunk: tokens of a chunk.
        features: the feature map.
    """

    attention: GroupedQueryAttention
    chunk: int = 64
    features: FeatureMap = FeatureMap.LEARNED

    def __post_init__(self) -> None:
        plain = self.attention
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {self.chunk}")
        if plain.pattern or plain.softcap is not None or plain.sinks or plain.bias:
            raise ValueError("features know no pattern, softcap, sinks or bias")
        if not plain.scale > 0:
            raise ValueError(f"scale must be positive, not {plain.scale}")

    @property
    def directions(self) -> int:
        """Random directions of FAVOR+ for each key/value head: d log d for d features, as in the published code."""
        return max(int(self.attention.head_dim * math.log(self.attention.head_dim)), 1)

    @property
    def width(self) -> int:
        """Features of a head."""
        sizes = {FeatureMap.LEARNED: 2 * self.attention.head_dim, FeatureMap.FAVOR: self.directions}
        return sizes.get(self.features, self.attention.head_dim)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name: ``log_gain`` [heads], and what the features need."""
        heads, groups, size = self.attention.heads, self.attention.kv_heads, self.attention.head_dim
        found: dict[str, tuple[int, ...]] = {"log_gain": (heads,)}
        if self.features is FeatureMap.LEARNED:
            found |= {"query_map": (heads, size, size), "key_map": (groups, size, size)}
        elif self.features is FeatureMap.FAVOR:
            found["directions"] = (groups, self.directions, size)
        return found

    def flops(self, batch: int, tokens: int) -> int:
        """Of all products, two for each multiplication, every chunk taken for a whole one."""
        plain, padded = self.attention, -(-tokens // self.chunk) * self.chunk
        near = plain.heads * self.chunk * (2 if plain.causal else 3) * (plain.head_dim + plain.value_dim)
        far = (plain.heads + plain.kv_heads) * self.width * plain.value_dim
        columns = {FeatureMap.LEARNED: plain.head_dim, FeatureMap.FAVOR: self.directions}.get(self.features, 0)
        return 2 * batch * padded * (near + far + (plain.heads + plain.kv_heads) * plain.head_dim * columns)
