"""Float64 oracle of activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.spec import Activation

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(kind: Activation, x: NDArray[Any]) -> NDArray[np.float64]:
    """Element by element; any shape, an empty one too."""
    x = x.astype(np.float64)
    match kind:
        case Activation.RELU:
            found = np.maximum(x, 0)
        case Activation.RELU_SQUARED:
            found = np.maximum(x, 0) ** 2
        case Activation.GELU:
            found = 0.5 * x * (1 + _erf(x / math.sqrt(2)))
        case Activation.GELU_TANH:
            found = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case Activation.QUICK_GELU:
            found = x * _sigmoid(1.702 * x)
        case Activation.SILU:
            found = x * _sigmoid(x)
        case Activation.TANH:
            found = np.tanh(x)
    return np.asarray(found, dtype=np.float64)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))
