"""Activations in plain, differentiable torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from codegen.spec import Activation


def activate(kind: Activation, x: Tensor) -> Tensor:
    """Element by element, in x's dtype."""
    match kind:
        case Activation.RELU:
            return x.relu()
        case Activation.RELU_SQUARED:
            return x.relu().square()
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.QUICK_GELU:
            return x * torch.sigmoid(1.702 * x)
        case Activation.SILU:
            return functional.silu(x)
        case Activation.TANH:
            return x.tanh()
