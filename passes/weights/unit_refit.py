"""A unit's output projection and bias by least squares, near those that it had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array
from passes.weights.refit import NormalEquations


@dataclass(frozen=True)
class OutputFit:
    """Attributes:
    tensors: ``out_weight`` [E, F] and ``out_bias`` [E], perhaps among others.
    explained: the part of the output's energy that the fit accounts for; constant: the part that a constant would.
    """

    tensors: Mapping[str, Array]
    explained: float
    constant: float

    def output(self, prepared: Array) -> Array:
        """[..., E] of what the projection reads, [..., F]."""
        return np.asarray(prepared @ self.tensors["out_weight"].T + self.tensors["out_bias"])


@dataclass
class OutputSums:
    """Sums over tokens; add batches, then solve."""

    equations: NormalEquations = field(default_factory=NormalEquations)
    energy: float = 0.0

    def add(self, features: Array, output: Array) -> None:
        """[rows, F] and [rows, E]."""
        x, y = (np.asarray(a, dtype=np.float64) for a in (features, output))
        self.equations.add(np.concatenate([x, np.ones((len(x), 1))], axis=1), y)
        self.energy += float((y**2).sum())

    def solve(self, weight: Array, bias: Array) -> OutputFit:
        """Near `weight` [E, F] where tokens leave it open; the bias is free."""
        gram, cross = self.equations.gram, self.equations.cross
        solved = self.equations.solve(np.concatenate([weight, bias[:, None]], axis=1), constant=True)
        missed = self.energy - 2 * float((solved * cross.T).sum()) + float(((solved @ gram) * solved).sum())
        mean_energy = float((cross[-1] ** 2).sum()) / max(float(gram[-1, -1]), 1e-30)
        total = max(self.energy, 1e-30)
        tensors = {"out_weight": solved[:, :-1], "out_bias": solved[:, -1]}
        return OutputFit(tensors, 1.0 - missed / total, mean_energy / total)
