"""The functions that feed-forward blocks apply, as a word in a spec."""

from __future__ import annotations

from enum import Enum


class Activation(Enum):
    """What a feed-forward block applies between its two products, element by element."""

    RELU = "relu"
    RELU_SQUARED = "relu_squared"
    GELU = "gelu"
    """``x Phi(x)``, by the error function."""
    GELU_TANH = "gelu_tanh"
    """Its usual approximation by tanh."""
    QUICK_GELU = "quick_gelu"
    """``x sigmoid(1.702 x)``."""
    SILU = "silu"
    TANH = "tanh"
