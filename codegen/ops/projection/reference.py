"""A linear layer with its activation in float64: the definition of right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.ops.activation.reference import activate
from codegen.projection import Projection


def projection(
    spec: Projection, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """[B, S, outputs] of x [B, S, inputs], weight [outputs, inputs] and bias [outputs].

    Raises ValueError if an operand contradicts the spec.
    """
    require_fitting(spec, x.shape, weight.shape, None if bias is None else bias.shape)
    found = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        found = found + bias.astype(np.float64)
    return found if spec.activation is None else activate(spec.activation, found)


def require_fitting(
    spec: Projection, x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    """Raises ValueError for shapes that contradict the spec."""
    fits = len(x) == 3 and x[2] == spec.inputs and weight == (spec.outputs, spec.inputs)
    if not fits or bias not in (None, (spec.outputs,)):
        raise ValueError(f"operands of shape {x}, {weight} and {bias} contradict {spec}")
