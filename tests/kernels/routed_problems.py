"""Operands of routed feed-forward blocks, and how far from the oracle a kernel may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegen.activation import Activation
from codegen.ops.activation.reference import activate
from codegen.ops.routed_feed_forward.reference import routed_feed_forward
from codegen.routed import RoutedFeedForward
from tests.kernels.linear_problems import ROUNDOFF

K = 4.0
"""Kernels may be this many times as far off as the floor."""

SPECS = {
    "experts": RoutedFeedForward(24, 40, 3, up_bias=True, down_bias=True),
    "gated, odd widths": RoutedFeedForward(19, 35, 2, Activation.SILU, gated=True, up_bias=True),
    "one place": RoutedFeedForward(16, 48, 4, Activation.RELU_SQUARED, down_bias=True, once=True),
    "heavy branch": RoutedFeedForward(40, 33, 1, Activation.GELU, gated=True, once=True),
}


@dataclass(frozen=True)
class Operands:
    """x and base [N, H], rows and weights [E, M], and parameters."""

    x: Tensor
    rows: Tensor
    weights: Tensor
    parameters: dict[str, Tensor]
    base: Tensor | None = None


def draw(
    spec: RoutedFeedForward, dtype: torch.dtype, tokens: int, places: int, *, filled: float = 0.7, based: bool = False
) -> Operands:
    """Random operands; of several experts the second is empty, and about `filled` of the others' places are taken."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    rows = torch.full((spec.experts, places), -1)
    free = torch.randperm(tokens, generator=random)
    for expert in range(spec.experts):
        if expert == 1:
            continue
        wanted = [m for m in range(places) if float(torch.rand((), generator=random)) < filled]
        order = free if spec.once else torch.randperm(tokens, generator=random)
        wanted = wanted[: len(order)]
        rows[expert, wanted] = order[: len(wanted)]
        free = free[len(wanted) :]
    parameters = {name: (normal(*s) / (s[1] ** 0.5 if len(s) == 3 else 1)).to(dtype) for name, s in spec.shapes.items()}
    base = normal(tokens, spec.hidden).to(dtype) if based else None
    weights = torch.rand(spec.experts, places, generator=random)
    return Operands(normal(tokens, spec.hidden).to(dtype), rows, weights, parameters, base)


def distance(spec: RoutedFeedForward, x: Operands, output: Tensor) -> float:
    """The largest error in units of what rounding makes of both products, of what lies between them, of each expert's
    answer and of the result."""
    rounded = ROUNDOFF[x.x.dtype]
    held = {name: p.double().numpy() for name, p in x.parameters.items()}
    given, rows, weights = x.x.double().numpy(), x.rows.numpy(), x.weights.double().numpy()
    base = None if x.base is None else x.base.double().numpy()
    right = routed_feed_forward(spec, given, rows, weights, base, **held)
    floor = np.abs(right) * rounded + 1e-30
    for expert in range(spec.experts):
        there = rows[expert] >= 0
        tokens, weight = rows[expert][there], weights[expert][there][:, None]
        floor[tokens] += weight * _block_floor(spec, expert, given[tokens], held, rounded)
    return float((np.abs(output.double().numpy() - right) / floor).max(initial=0.0))


def _block_floor(
    spec: RoutedFeedForward, expert: int, x: NDArray[Any], held: dict[str, NDArray[Any]], rounded: float
) -> NDArray[Any]:
    """[n, H], of one expert's answers."""
    single = 2.0**-22  # sums, and products of float32 that are made of several

    def product(name: str, given: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """What it is, and what it is made of in magnitude."""
        matrix, bias = held[f"{name}_weight"][expert], held.get(f"{name}_bias")
        vector = 0.0 if bias is None else bias[expert]
        return given @ matrix + vector, np.abs(given) @ np.abs(matrix) + np.abs(vector)

    up, up_size = product("up", x)
    if spec.gated:
        gate, gate_size = product("gate", x)
        active = activate(spec.activation, gate)
        inner = active * up
        error = (np.abs(active) * up_size + _slope(spec, gate) * gate_size * np.abs(up)) * single
    else:
        inner = activate(spec.activation, up)
        error = _slope(spec, up) * up_size * single
    error = error + np.abs(inner) * (rounded + single)
    answer, size = product("down", inner)
    return np.asarray(error @ np.abs(held["down_weight"][expert]) + size * single + np.abs(answer) * rounded)


def _slope(spec: RoutedFeedForward, x: NDArray[Any]) -> NDArray[Any]:
    """No activation is steeper anywhere; those of a sigmoid reach 1.13."""
    return 2 * np.abs(x) if spec.activation is Activation.RELU_SQUARED else np.full_like(x, 1.2)
