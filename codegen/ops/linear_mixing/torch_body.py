"""Linear mixing in plain, differentiable torch.

Circulant matrices over whole sequences are a convolution on a circle: eagerly on CPUs two Fourier transforms do it in
a tenth of the time (512 tokens of 768 features: 2 ms against 26 ms). Everything else is written out for two products:
shorter sequences and Toeplitz matrices would need transforms of twice the size each way, which take longer (104 ms
against 34 ms).
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.ops.linear_mixing.reference import require_fitting
from codegen.spec import LinearMixing, Structure


def linear_mixing(
    spec: LinearMixing, x: Tensor, sequence: Tensor, features: Tensor, bias: Tensor | None = None
) -> Tensor:
    """[B, S, hidden] of x [B, S, hidden] and parameters of `LinearMixing.shapes`, in x's dtype.

    Raises:
        ValueError: if a sequence is longer than the matrix, or an operand contradicts the spec.
    """
    shapes = {"sequence": tuple(sequence.shape), "features": tuple(features.shape)}
    require_fitting(spec, tuple(x.shape), shapes | ({} if bias is None else {"bias": tuple(bias.shape)}))
    sequence, features = sequence.to(x.dtype), features.to(x.dtype)
    mixed = (by_transform if _prefers_transform(spec, x) else by_matrices)(spec, x, sequence, features)
    return mixed if bias is None else mixed + bias.to(x.dtype)


def by_matrices(spec: LinearMixing, x: Tensor, sequence: Tensor, features: Tensor) -> Tensor:
    """Without the bias, for any structure and length."""
    over_tokens, over_features = _first(matrix(spec.structure, sequence), x.shape[1]), matrix(spec.structure, features)
    return over_tokens @ (x @ (over_features if spec.structure is Structure.DENSE else over_features.T))


def by_transform(spec: LinearMixing, x: Tensor, sequence: Tensor, features: Tensor) -> Tensor:
    """Without the bias, for circulant matrices and the longest sequence."""
    kernel = torch.fft.fft(sequence)[:, None] * torch.fft.rfft(features)
    mixed: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * kernel, s=x.shape[1:])
    return mixed


def _first(whole: Tensor, tokens: int) -> Tensor:
    """The first rows and columns."""
    if not torch.compiler.is_compiling():
        return whole[:tokens, :tokens]
    index = torch.arange(tokens, device=whole.device)  # not a slice: captures would ask whether that is all of it
    return whole.index_select(0, index).index_select(1, index)


def _prefers_transform(spec: LinearMixing, x: Tensor) -> bool:
    if spec.structure is not Structure.CIRCULANT or torch.compiler.is_compiling():
        return False
    return x.shape[1] == spec.tokens and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def matrix(structure: Structure, stored: Tensor) -> Tensor:
    """[N, N] of what it is made of."""
    if structure is Structure.DENSE:
        return stored
    if structure is Structure.CIRCULANT:
        turned = stored.flip(0)
        stored = torch.cat((turned, turned[:-1]))
    return stored.unfold(0, (stored.shape[0] + 1) // 2, 1).flip(0)
