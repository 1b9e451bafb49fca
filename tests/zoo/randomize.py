"""Give every parameter a non-trivial value: gains that are not 1 and biases that are not 0 hide no bug."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BIAS_SCALE = 0.2
GAIN_SCALE = 0.25
EMBEDDING_SCALE = 0.5


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_embedding(module: nn.Module, name: str) -> bool:
    """Embedding tables, and bare parameters such as a class token or position embeddings."""
    return isinstance(module, nn.Embedding) or not ("weight" in name or hasattr(module, "weight"))


def _centre_of_gain(gain: Tensor) -> float:
    """Around what a norm's gain is drawn: what its constructor set (1, or 0 where the forward adds 1)."""
    return round(float(gain.float().mean()))


def _fan_in(module: nn.Module, parameter: Tensor) -> int:
    transposed = type(module).__name__ == "Conv1D"  # stored [in, out]
    return int(parameter.shape[0] if transposed else math.prod(parameter.shape[1:]))


def _value(module: nn.Module, name: str, parameter: Tensor, noise: Tensor) -> Tensor:
    if _is_norm(module) and name == "weight":
        return _centre_of_gain(parameter) + GAIN_SCALE * noise.clamp(-2, 2)
    if parameter.ndim < 2:
        return BIAS_SCALE * noise
    if _is_embedding(module, name):
        return EMBEDDING_SCALE * noise
    return noise / math.sqrt(_fan_in(module, parameter))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill `model`'s parameters in place, reproducibly, activations near unit scale; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()  # tied parameters are drawn once
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(_value(module, name, parameter, noise))
    return model.eval()
