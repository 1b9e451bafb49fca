"""Fourier mixing in plain, differentiable torch.

Eagerly on CPUs the fast transform wins at every length (at 512 tokens of 768 features 1.1 ms against 7.4 ms). Matrix
products take its place on accelerators at short lengths, where they run on matrix units, and wherever torch captures a
graph, since compilers and exporters have no complex numbers. They work on half of the spectrum: of real numbers the
frequency (-k, -d) is the conjugate of (k, d), so features above the middle are read off those below it.

Shape legend: B batch, S tokens, D features, H = D // 2 + 1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from codegen.spec import FourierMixing

SHORT = 512
"""Tokens up to which accelerators multiply by matrices."""

WIDE = (torch.float32, torch.float64)
"""What is computed in; other dtypes are widened to float32, whose transform every device has."""


def fourier_mixing(spec: FourierMixing, x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """[B, S, D] of x [B, S, D], in x's dtype; gain and bias are [D] where the spec has them.

    Raises:
        ValueError: if x has another shape, or gain or bias is given or missing against the spec.
    """
    if x.dim() != 3 or x.shape[-1] != spec.hidden:
        raise ValueError(f"x has shape {tuple(x.shape)}, which contradicts {spec}")
    if (gain is not None) != spec.gain or (bias is not None) != spec.bias:
        raise ValueError(f"gain and bias must be given as {spec} says")
    wide = x if x.dtype in WIDE else x.float()
    mixed: Tensor = by_matrices(spec, wide) if _prefers_matrices(wide) else by_fast_transform(spec, wide)
    if gain is not None:
        mixed = mixed * gain.to(wide.dtype)
    if bias is not None:
        mixed = mixed + bias.to(wide.dtype)
    return mixed.to(x.dtype)


def by_fast_transform(spec: FourierMixing, x: Tensor) -> Tensor:
    """[B, S, D] by torch.fft, without gain and bias."""
    frequencies = torch.fft.fft(torch.fft.fft(x, dim=2), dim=1)
    real: Tensor = frequencies.real
    return real - frequencies.imag if spec.hartley else real


def by_matrices(spec: FourierMixing, x: Tensor) -> Tensor:
    """[B, S, D] by products with real matrices on half of the spectrum, without gain and bias."""
    cos_features, sin_features = tables(spec.hidden, spec.half, x)  # [D, H]
    cos_tokens, sin_tokens = tables(x.shape[1], x.shape[1], x)  # [S, S]
    even, odd = x @ cos_features, x @ sin_features
    real = cos_tokens @ even - sin_tokens @ odd
    if not spec.hartley:
        return _with_mirror(spec, real, real)
    imaginary = sin_tokens @ even + cos_tokens @ odd
    return _with_mirror(spec, real + imaginary, real - imaginary)


def tables(size: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / size for i < size, j < columns, [size, columns], kept for the next call."""
    if torch.compiler.is_compiling():
        return _tables(size, columns, like.dtype, like.device)
    return _kept_tables(size, columns, like.dtype, like.device)


@functools.lru_cache(maxsize=16)
def _kept_tables(size: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # a kept tensor must be fit for training too
        return _tables(size, columns, dtype, device)


def _tables(size: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    turns = torch.arange(size, device=device)[:, None] * torch.arange(columns, device=device) % size
    angles = turns.to(dtype) * (2 * math.pi / size)  # the remainder first: large angles have no precise cosine
    return angles.cos(), angles.sin()


def _with_mirror(spec: FourierMixing, left: Tensor, source: Tensor) -> Tensor:
    """All D features out of the first H, and of what those above them are at the opposite token frequency."""
    tokens = source.shape[1]
    opposite = -torch.arange(tokens, device=source.device) % tokens
    right = source[..., 1 : spec.hidden - spec.half + 1].flip(-1).index_select(1, opposite)
    return torch.cat((left, right), dim=2)


def _prefers_matrices(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.device.type != "cpu" and x.shape[1] <= SHORT)
