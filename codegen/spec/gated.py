"""Gated attention units, over all tokens and over chunks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from codegen.activation import Activation


class PositionBias(Enum):
    """What is added to a gated attention's scores by the distance of two tokens.

    TOEPLITZ is a number for each distance; ROTARY the product of two learned vectors, each rotated by its token's
    position, which serves any length.
    """

    NONE = "none"
    TOEPLITZ = "toeplitz"
    ROTARY = "rotary"


@dataclass(frozen=True)
class GatedAttention:
    """A gated attention unit without norm and residual (GAU, arXiv 2202.10447): [B, S, hidden] to [B, S, hidden].

    With gate U and value V of `expanded` features, base Z of `base` features, and for each token i a query
    ``scale[0] * z + offset[0]`` and a key ``scale[1] * z + offset[1]``, both rotated by its position::

        A = relu(q kᵀ / n + bias)²,   out = (U ⊙ A V) W_out + b_out

    There is no softmax; hidden keys are dropped after the square. The paper's code divides by the current length; a
    causal spec divides by a constant instead, or a prefix's outputs would change as a sequence grows.

    Attributes:
        hidden: features of input and output.
        expanded: features of gate and value, 2 * hidden in the paper.
        base: features of z, 128 in the paper; even where rotated.
        length: the divisor n; None for the number of tokens at hand (bidirectional only).
        causal: token i sees tokens j <= i.
        bias: what is added to the scores.
        span: for TOEPLITZ, distances of magnitude below this have numbers of their own; longer ones have the last's.
        rotary: queries and keys are rotated, features (i, i + base / 2) by position * 10000^(-2 i / base).
        gate, value, latent: activations of U, V and Z, all SiLU in the paper, None for none. With others a unit can be
            a trained feed-forward exactly.
    """

    hidden: int
    expanded: int
    base: int = 128
    length: int | None = None
    causal: bool = False
    bias: PositionBias = PositionBias.NONE
    span: int = 512
    rotary: bool = True
    gate: Activation | None = Activation.SILU
    value: Activation | None = Activation.SILU
    latent: Activation | None = Activation.SILU

    heads: ClassVar[int] = 2
    """Scale and offset pairs: query and key."""

    def __post_init__(self) -> None:
        _check_gated(self.hidden, self.expanded, self.base, self.rotary or self.bias is PositionBias.ROTARY)
        if self.causal and self.length is None:
            raise ValueError("a causal unit divides by a constant: give length")
        if (self.length is not None and self.length < 1) or self.span < 1:
            raise ValueError("length and span must be at least 1")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the operands beside x, by role; rows of the expansion are gate, value, base. Weights are [out, in]."""
        return _gated_shapes(self)

    def flops(self, batch: int, tokens: int) -> int:
        """Of all products, two for each multiplication; hidden scores are counted too."""
        return _projection_flops(self, batch * tokens) + 2 * batch * tokens**2 * (self.base + self.expanded)


@dataclass(frozen=True)
class MixedChunkAttention:
    """A gated attention unit in linear time (FLASH, arXiv 2202.10447): [B, S, hidden] to [B, S, hidden].

    As `GatedAttention`, with four heads of scale and offset: quadratic query, linear query, quadratic key, linear key.
    Within each chunk of C tokens A is relu(q kᵀ / C + bias)², masked after the square where causal. Between chunks
    there is no activation: to A V is added a product of linear queries with the sum of kᵀ v over all preceding chunks
    (causal; the first chunk gets zero), or over all tokens divided by their number. The gate applies to both together.

    Attributes (others as in `GatedAttention`):
        chunk: C, 256 in the paper. Any length is allowed, the last chunk may be a part.
        averaged: causal only: the sum over preceding chunks is divided by the number of their tokens, as the paper's
            code does, whose mask's rows are divided by their sums; else by C alone, as the paper's equation and ports
            have it.
        span: for TOEPLITZ, at most C is of use.
    """

    hidden: int
    expanded: int
    base: int = 128
    chunk: int = 256
    causal: bool = False
    averaged: bool = True
    bias: PositionBias = PositionBias.NONE
    span: int = 256
    rotary: bool = True
    gate: Activation | None = Activation.SILU
    value: Activation | None = Activation.SILU
    latent: Activation | None = Activation.SILU

    heads: ClassVar[int] = 4

    def __post_init__(self) -> None:
        _check_gated(self.hidden, self.expanded, self.base, self.rotary or self.bias is PositionBias.ROTARY)
        if self.chunk < 1 or self.span < 1:
            raise ValueError("chunk and span must be at least 1")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the operands beside x, as in `GatedAttention`."""
        return _gated_shapes(self)

    def flops(self, batch: int, tokens: int) -> int:
        """Of all products, two for each multiplication, the last chunk taken for a whole one."""
        padded = -(-tokens // self.chunk) * self.chunk
        within = 2 * batch * padded * self.chunk * (self.base + self.expanded)
        return _projection_flops(self, batch * tokens) + within + 4 * batch * padded * self.base * self.expanded


def _check_gated(hidden: int, expanded: int, base: int, rotated: bool) -> None:
    if min(hidden, expanded, base) < 1:
        raise ValueError("hidden, expanded and base must be at least 1")
    if rotated and base % 2:
        raise ValueError(f"base must be even where it is rotated, not {base}")


def _projection_flops(spec: GatedAttention | MixedChunkAttention, rows: int) -> int:
    return 2 * rows * spec.hidden * (3 * spec.expanded + spec.base)


def _gated_shapes(spec: GatedAttention | MixedChunkAttention) -> dict[str, tuple[int, ...]]:
    rows = 2 * spec.expanded + spec.base
    shapes: dict[str, tuple[int, ...]] = {
        "expand_weight": (rows, spec.hidden),
        "expand_bias": (rows,),
        "scale": (spec.heads, spec.base),
        "offset": (spec.heads, spec.base),
        "out_weight": (spec.hidden, spec.expanded),
        "out_bias": (spec.hidden,),
    }
    if spec.bias is PositionBias.TOEPLITZ:
        shapes["distances"] = (2 * spec.span - 1,)  # of query minus key, from 1 - span up
    elif spec.bias is PositionBias.ROTARY:
        shapes |= {"query_vector": (spec.base,), "key_vector": (spec.base,)}
    return shapes


GatedUnit = GatedAttention | MixedChunkAttention
"""A map of hidden states that is an attention and a feed-forward in one."""
