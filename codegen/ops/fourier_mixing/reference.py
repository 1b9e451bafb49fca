"""Float64 oracle of Fourier mixing: the definition of right for every other implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.spec import FourierMixing

Float64 = NDArray[np.float64]


def fourier_mixing(
    spec: FourierMixing,
    x: NDArray[Any],
    gain: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
) -> Float64:
    """[B, S, hidden] of x [B, S, hidden]; gain and bias are [hidden] where the spec has them.

    The published layers compute ``fftn(x).real`` (FNet) and ``fftn(x).real - fftn(x).imag`` (Hartley) of each
    sequence, unnormalised.

    Raises:
        ValueError: if an operand's shape contradicts the spec, or one is given or missing against it.
    """
    if x.ndim != 3 or x.shape[-1] != spec.hidden:
        raise ValueError(f"x has shape {x.shape}, which contradicts {spec}")
    frequencies = np.fft.fft2(x.astype(np.float64), axes=(1, 2))
    mixed = frequencies.real - frequencies.imag if spec.hartley else frequencies.real
    for name, vector, wanted in (("gain", gain, spec.gain), ("bias", bias, spec.bias)):
        if (vector is not None) != wanted or (vector is not None and vector.shape != (spec.hidden,)):
            raise ValueError(f"{name} is {None if vector is None else vector.shape}, which contradicts {spec}")
    if gain is not None:
        mixed = mixed * gain.astype(np.float64)
    return np.asarray(mixed if bias is None else mixed + bias.astype(np.float64), dtype=np.float64)
