"""Softmax attention: heads that share keys and values, by one number of heads or by two."""

from __future__ import annotations

import math
from dataclasses import dataclass

from codegen.sight import Pattern


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Softmax attention whose `heads` query heads share `kv_heads` key/value heads (arXiv 2305.13245).

    Operands are q [B, heads, S, head_dim], k [B, kv_heads, T, head_dim], v [B, kv_heads, T, value_dim]
    and, when `bias` is set, an additive score bias broadcastable to [B, heads, S, T]; query head h reads
    key/value head ``h // (heads // kv_heads)``. The result is [B, heads, S, value_dim].

    Attributes:
        scale: multiplies q·k before softcap and bias.
        causal: query i sees keys j <= i + (T - S); the mask is aligned to the end.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the bias; None for none.
        masked_rows_are_zero: a row whose keys are all masked gives zeros instead of NaN.
        sinks: further score columns [B, heads, S, n] take part in the softmax and are dropped after it.
        pattern: which keys each head's queries see, beside `causal` and `bias`; empty for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = False
    bias: bool = False
    softcap: float | None = None
    masked_rows_are_zero: bool = False
    sinks: bool = False
    pattern: Pattern = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class DecoupledAttention:
    """Softmax attention whose keys and values have different numbers of heads (DHA, arXiv 2406.06567).

    Operands are q and v as in `GroupedQueryAttention`, but k [B, key_heads, T, head_dim] and v [B, value_heads, T,
    value_dim]; query head h reads key head ``h // (heads // key_heads)`` and value head
    ``h // (heads // value_heads)``. That is what a cache holds, too.

    Attributes:
        attention: as which it is computed: its `kv_heads` is the least common multiple of both numbers, to which keys
            and values are repeated.
    """

    attention: GroupedQueryAttention
    key_heads: int
    value_heads: int

    def __post_init__(self) -> None:
        for name in ("key_heads", "value_heads"):
            if getattr(self, name) < 1 or self.attention.heads % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} does not divide heads={self.attention.heads}")
        if self.attention.kv_heads != math.lcm(self.key_heads, self.value_heads):
            raise ValueError(
                f"kv_heads={self.attention.kv_heads} is not the least common multiple of {self.key_heads} and "
                f"{self.value_heads}"
            )
