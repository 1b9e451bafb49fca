"""Routers out of weights or data: a direction u, by whose products ``x u`` tokens are ranked.

A constant changes no rank, so none is kept. Scores have variance 1, where training with a soft selection begins well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array
from passes.weights.unit_refit import OutputSums

STEPS = 50
"""Of the power iteration."""


@dataclass(frozen=True)
class Router:
    """Attributes:
    direction: u [E], float64.
    explained: part of the importance's variance, each half of the tokens by the other half's fit.
    """

    direction: Array
    explained: float


@dataclass
class RouterSums:
    """Tokens and what a heavy branch is worth to each; add batches, then solve by least squares."""

    hidden: list[Array] = field(default_factory=list)
    importance: list[Array] = field(default_factory=list)

    def add(self, hidden: Array, importance: Array) -> None:
        """[N, E] and [N]."""
        self.hidden.append(np.asarray(hidden, dtype=np.float64))
        self.importance.append(np.asarray(importance, dtype=np.float64))

    def solve(self) -> Router:
        """The direction nearest the importance; where nothing tells tokens apart, zeros."""
        wanted = np.concatenate(self.importance)
        spread = float(wanted.std())
        width = self.hidden[0].shape[-1]
        if spread <= 1e-12 * max(float(np.abs(wanted).max(initial=0.0)), 1e-30):
            return Router(np.zeros(width), 0.0)
        sums, start = OutputSums(), 0
        for x in self.hidden:
            z = (wanted[start : start + len(x)] - wanted.mean()) / spread
            sums.add(x, z[:, None])
            start += len(x)
        fit = sums.solve(np.zeros((1, width)), np.zeros(1))
        direction = fit.tensors["out_weight"][0]
        size = float(np.concatenate([x @ direction for x in self.hidden]).std())
        return Router(direction / size if size > 0 else np.zeros(width), fit.explained)


def amplified(width: int, gram: Callable[[Array], Array]) -> Array:
    """[E]: the direction that a linear map enlarges most, where there is no data to rank tokens by.

    Args:
        gram: v [E] to MᵀM v. Of both signs it is the one that makes the largest number positive.
    """
    v = np.ones(width) + 1e-3 * np.arange(width)  # no symmetry of the weights can make this orthogonal to all
    for _ in range(STEPS):
        found = gram(v)
        size = float(np.linalg.norm(found))
        if size == 0:
            return np.zeros(width)
        v = found / size
    return np.asarray(v * np.sign(v[np.argmax(np.abs(v))]))
