"""Float64 oracle of linear mixing: the definition of right for every other implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.spec import LinearMixing, Structure

Float64 = NDArray[np.float64]


def linear_mixing(
    spec: LinearMixing,
    x: NDArray[Any],
    sequence: NDArray[Any],
    features: NDArray[Any],
    bias: NDArray[Any] | None = None,
) -> Float64:
    """[B, S, hidden] of x [B, S, hidden] and parameters of `LinearMixing.shapes`.

    Raises:
        ValueError: if an operand's shape contradicts the spec, or one is given or missing against it.
    """
    shapes = {"sequence": sequence.shape, "features": features.shape}
    require_fitting(spec, x.shape, shapes | ({} if bias is None else {"bias": bias.shape}))
    over_tokens = matrix(spec.structure, sequence)[: x.shape[1], : x.shape[1]]
    over_features = matrix(spec.structure, features)
    over_features = over_features if spec.structure is Structure.DENSE else over_features.T
    mixed = np.einsum("bij,jk,ni->bnk", x.astype(np.float64), over_features, over_tokens, optimize=True)
    return np.asarray(mixed if bias is None else mixed + bias.astype(np.float64))


def matrix(structure: Structure, stored: NDArray[Any]) -> Float64:
    """[N, N] of what it is made of."""
    stored = stored.astype(np.float64)
    if structure is Structure.DENSE:
        return stored
    size = len(stored) if structure is Structure.CIRCULANT else (len(stored) + 1) // 2
    row, column = np.arange(size)[:, None], np.arange(size)
    index = (row - column) % size if structure is Structure.CIRCULANT else size - 1 + column - row
    return np.asarray(stored[index])


def require_fitting(spec: LinearMixing, x: tuple[int, ...], parameters: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where shapes contradict the spec."""
    if len(x) != 3 or x[2] != spec.hidden:
        raise ValueError(f"x has shape {x}, which contradicts {spec}")
    if parameters != spec.shapes:
        raise ValueError(f"parameters of shapes {parameters} contradict {spec}, which wants {spec.shapes}")
    if x[1] > spec.tokens:
        raise ValueError(f"a sequence of {x[1]} tokens is longer than the mixing matrix, which has {spec.tokens}")
