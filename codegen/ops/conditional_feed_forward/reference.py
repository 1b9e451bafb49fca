"""Float64 oracle of the conditional feed-forward block: both branches work on all tokens, weights select."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.conditional import ConditionalFeedForward
from codegen.ops.activation.reference import activate
from codegen.ops.conditional_routing.reference import require_fitting, weights

Float64 = NDArray[np.float64]


def conditional_feed_forward(
    spec: ConditionalFeedForward,
    x: NDArray[Any],
    shown: NDArray[np.bool_] | None = None,
    *,
    soft: bool = False,
    **parameters: NDArray[Any],
) -> Float64:
    """[B, S, hidden] of x [B, S, hidden] and parameters of `ConditionalFeedForward.shapes`.

    Args:
        shown: [B, S], False for padding.
        soft: as in training.

    Raises:
        ValueError: if x or a parameter contradicts the spec, or a parameter is given or missing against it.
    """
    require_fitting(spec, x.shape, {name: array.shape for name, array in parameters.items()})
    held = {name: array.astype(np.float64) for name, array in parameters.items()}
    wide = x.astype(np.float64)
    weight = weights(spec.router, wide @ held["router"], shown, soft=soft)
    return _branch(spec, "light", wide, held) + weight[..., None] * _branch(spec, "heavy", wide, held)


def _branch(spec: ConditionalFeedForward, name: str, x: Float64, held: dict[str, Float64]) -> Float64:
    def product(role: str, given: Float64) -> Float64:
        return np.asarray(given @ held[f"{name}_{role}_weight"] + held.get(f"{name}_{role}_bias", 0.0))

    up = product("up", x)
    inner = activate(spec.activation, product("gate", x)) * up if spec.gated else activate(spec.activation, up)
    return product("down", inner)
