"""Operands of Fourier mixing, and how far from the oracle a kernel may be: a multiple of what rounding makes of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from codegen.ops.fourier_mixing.reference import fourier_mixing as oracle
from codegen.spec import FourierMixing

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""bfloat16's is that of cutting off, which is what Triton's interpreter does; cards round, and are twice as near."""

K = 8.0
"""Every result is a sum of all numbers of its sequence, each rounded about five times on its way (in both tables, in
the folded token, between the products): errors of independent terms come to about sqrt(5) roundoffs of the sequence's
norm, and the largest of many results to three or four times that."""

IN_SINGLE = {torch.float32: 24.0, torch.float16: 1.0, torch.bfloat16: 1.0}
"""For kernels that compute in single precision. A convolution is three transforms of up to eleven stages each, all of
whose results are rounded: errors of independent terms come to about six roundoffs of the sequence's norm, the largest
of many results to four times that. Half precisions see nothing of it: results are rounded once."""


def draw(
    spec: FourierMixing, dtype: torch.dtype, batch: int, tokens: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x, gain, bias)."""
    random = torch.Generator().manual_seed(batch * 1000 + tokens)
    x = torch.randn(batch, tokens, spec.hidden, generator=random).to(dtype)
    gain, bias = (torch.randn(spec.hidden, generator=random).to(dtype) for _ in range(2))
    return x, gain if spec.gain else None, bias if spec.bias else None


def distance(spec: FourierMixing, x: Tensor, gain: Tensor | None, bias: Tensor | None, found: Tensor) -> float:
    """The largest error in units of the floor."""
    arrays = [None if t is None else t.double().numpy() for t in (x, gain, bias)]
    assert arrays[0] is not None
    if found.shape != x.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    right = oracle(spec, arrays[0], *arrays[1:])
    norm = np.linalg.norm(arrays[0], axis=(1, 2))[:, None, None]
    scale = norm if arrays[1] is None else norm * np.abs(arrays[1])
    floor = ROUNDOFF[x.dtype] * (scale + np.abs(right)) + 1e-30
    return float((np.abs(found.double().numpy() - right) / floor).max())
