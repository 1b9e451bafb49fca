"""Tokens mixed alike whatever they say: by a transform, or by matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name."""
        return {name: (self.hidden,) for name in ("gain", "bias") if getattr(self, name)}

    @property
    def half(self) -> int:
        """Feature frequencies that the others mirror."""
        return self.hidden // 2 + 1

    def flops(self, batch: int, tokens: int) -> int:
        """Of a fast transform, by the usual count: 5 n log2 n for n complex numbers, half of it for real ones."""
        points = batch * tokens * self.hidden
        return round(2.5 * points * math.log2(max(tokens * self.hidden, 2)))


class Structure(Enum):
    """What a mixing matrix may be, and the parameters that it is made of."""

    DENSE = "dense"
    """Any N x N matrix."""
    CIRCULANT = "circulant"
    """``M[i, j] = c[(i - j) mod N]`` of a vector [N]."""
    TOEPLITZ = "toeplitz"
    """``M[i, j] = v[N - 1 + j - i]`` of a vector [2 N - 1]."""


@dataclass(frozen=True)
class LinearMixing:
    """Tokens mixed by one matrix and features by another (Sparse Mixer, arXiv 2205.12399).

    The operand x is [B, S, hidden], S at most `tokens`; shorter sequences use the first S rows and columns of the
    matrix over tokens. With T that matrix, F that over features, a sequence becomes ``T x F`` where both are dense, and
    ``T x F'`` (F transposed) where they have a structure, as in the paper's code. There is no mask: every token takes
    part in every result.

    Attributes:
        hidden: number of features.
        tokens: the longest sequence.
        structure: of both matrices.
        bias: a vector [hidden] is added to every token.
    """

    hidden: int
    tokens: int
    structure: Structure = Structure.DENSE
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name: ``sequence``, ``features``, and ``bias`` if there is one."""
        found = {"sequence": self.stored(self.tokens), "features": self.stored(self.hidden)}
        return found | ({"bias": (self.hidden,)} if self.bias else {})

    def stored(self, size: int) -> tuple[int, ...]:
        """The shape of what a matrix of this size is made of."""
        if self.structure is Structure.DENSE:
            return (size, size)
        return (size,) if self.structure is Structure.CIRCULANT else (2 * size - 1,)

    def flops(self, batch: int, tokens: int) -> int:
        """Of both products, two for each multiplication."""
        return 2 * batch * tokens * self.hidden * (tokens + self.hidden)
