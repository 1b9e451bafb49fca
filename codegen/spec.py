"""What a kernel must compute, as integers, enums and one small expression tree.

Specs are the contract between the floors: targets produce them, doors out and templates consume them.
Nothing in a spec is text that came from a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class FourierMixing:
    """Tokens mixed by a discrete Fourier transform over sequence and features (FNet, arXiv 2105.03824).

    The operand x is [B, S, hidden], S any length; the result, of the same shape, is ``Re F`` where F is the
    unnormalised two-dimensional transform of each sequence, or ``Re F - Im F`` (Hartley, arXiv 2205.12399). There is
    no mask: every token takes part in every result.

    Attributes:
        hidden: number of features.
        hartley: the Hartley transform instead of the Fourier transform's real part.
        gain: the result is multiplied by a vector [hidden].
        bias: a vector [hidden] is added after that.
    """

    hidden: int
    hartley: bool = False
    gain: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, not {self.hidden}")

    @property
    def half(self) -> int:
        """Feature frequencies that the others mirror."""
        return self.hidden // 2 + 1

    def flops(self, batch: int, tokens: int) -> int:
        """Of a fast transform, by the usual count: 5 n log2 n for n complex numbers, half of it for real ones."""
        points = batch * tokens * self.hidden
        return round(2.5 * points * math.log2(max(tokens * self.hidden, 2)))


Spec = GroupedQueryAttention | FourierMixing
"""Everything that can take an attention's place."""
