"""Float64 oracle of routed feed-forward blocks: the definition of right for every kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.ops.activation.reference import activate
from codegen.routed import RoutedFeedForward

Float64 = NDArray[np.float64]


def routed_feed_forward(
    spec: RoutedFeedForward,
    x: NDArray[Any],
    rows: NDArray[np.integer[Any]],
    weights: NDArray[Any],
    base: NDArray[Any] | None = None,
    **parameters: NDArray[Any],
) -> Float64:
    """[N, hidden]; operands as the spec has them.

    Raises:
        ValueError: if operands contradict the spec, or a token stands where the spec says that it does not.
    """
    require_fitting(spec, x.shape, rows.shape, weights.shape, {name: array.shape for name, array in parameters.items()})
    require_places(spec, x.shape[0], rows)
    held = {name: array.astype(np.float64) for name, array in parameters.items()}
    output = np.zeros(x.shape) if base is None else base.astype(np.float64)
    for expert in range(spec.experts):
        there = rows[expert] >= 0
        tokens = rows[expert][there]
        found = block(spec, expert, x[tokens].astype(np.float64), held)
        output[tokens] += weights[expert][there].astype(np.float64)[:, None] * found
    return output


def block(spec: RoutedFeedForward, expert: int, x: Float64, held: dict[str, Float64]) -> Float64:
    """[n, hidden]: what one block makes of x [n, hidden]."""

    def projected(name: str, given: Float64) -> Float64:
        bias = held.get(f"{name}_bias")
        product = given @ held[f"{name}_weight"][expert]
        return np.asarray(product if bias is None else product + bias[expert])

    up = projected("up", x)
    inner = activate(spec.activation, projected("gate", x)) * up if spec.gated else activate(spec.activation, up)
    return projected("down", inner)


def require_fitting(
    spec: RoutedFeedForward,
    x: tuple[int, ...],
    rows: tuple[int, ...],
    weights: tuple[int, ...],
    parameters: dict[str, tuple[int, ...]],
) -> None:
    """Raises ValueError where shapes contradict the spec."""
    if len(x) != 2 or x[1] != spec.hidden:
        raise ValueError(f"x has shape {x}, which contradicts {spec}")
    if len(rows) != 2 or rows[0] != spec.experts or weights != rows:
        raise ValueError(f"rows of shape {rows} and weights of shape {weights} contradict {spec}")
    if parameters != spec.shapes:
        wrong = {n for n in parameters.keys() | spec.shapes.keys() if parameters.get(n) != spec.shapes.get(n)}
        told = ", ".join(f"{n}: {parameters.get(n)} instead of {spec.shapes.get(n)}" for n in sorted(wrong))
        raise ValueError(f"parameters contradict {spec}: {told}")


def require_places(spec: RoutedFeedForward, tokens: int, rows: NDArray[np.integer[Any]]) -> None:
    """Raises ValueError where places hold what is no token, or one more often than the spec allows."""
    if rows.size and (rows.min() < -1 or rows.max() >= tokens):
        raise ValueError(f"rows must be tokens below {tokens}, or -1")
    apart = [rows.reshape(-1)] if spec.once else list(rows)
    for places in apart:
        found = places[places >= 0]
        if len(np.unique(found)) < len(found):
            raise ValueError("a token has two places" if spec.once else "an expert has a token twice")
