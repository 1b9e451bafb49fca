"""A unit's output projection and bias by least squares, near those that it had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array
from passes.weights.refit import NormalEquations

RIDGES = tuple(10.0**power for power in range(-4, 4))
"""Weights of the known projection that are tried, relative to the mean energy of a feature."""


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
class _Fold:
    """Sums over half of the tokens, and the energy of their outputs."""

    equations: NormalEquations = field(default_factory=NormalEquations)
    energy: float = 0.0

    def missed(self, solved: Array) -> float:
        """Of the energy, by a solution [E, F + 1]."""
        product = 2 * float((solved * self.equations.cross.T).sum())
        return self.energy - product + float(((solved @ self.equations.gram) * solved).sum())


@dataclass
class OutputSums:
    """Sums over tokens; add batches, then solve.

    What is near the known projection generalises, what is nearest to the tokens at hand need not: averages over a
    sequence are alike for all its tokens, so that few directions have most of the energy, and a fit of the others is
    noise. How firmly the known projection is held is therefore told by each half of every batch on the other.
    """

    folds: tuple[_Fold, _Fold] = field(default_factory=lambda: (_Fold(), _Fold()))

    def add(self, features: Array, output: Array) -> None:
        """[rows, F] and [rows, E]."""
        x, y = (np.asarray(a, dtype=np.float64) for a in (features, output))
        x, middle = np.concatenate([x, np.ones((len(x), 1))], axis=1), (len(x) + 1) // 2
        for fold, rows in zip(self.folds, (slice(0, middle), slice(middle, None)), strict=True):
            fold.equations.add(x[rows], y[rows])
            fold.energy += float((y[rows] ** 2).sum())

    def solve(self, weight: Array, bias: Array) -> OutputFit:
        """Near `weight` [E, F] as firmly as the halves tell; the bias is free. `explained` is what each half's fit
        accounts for of the other half, `constant` what a constant does of both."""
        known = np.concatenate([weight, bias[:, None]], axis=1)
        across = {ridge: self._across(known, ridge) for ridge in RIDGES}
        best = min(across, key=lambda ridge: across[ridge])
        first, second = (fold.equations for fold in self.folds)
        whole = NormalEquations(first.gram + second.gram, first.cross + second.cross)
        solved = whole.solve(known, ridge=best, constant=True)
        total = max(sum(fold.energy for fold in self.folds), 1e-30)
        mean_energy = float((whole.cross[-1] ** 2).sum()) / max(float(whole.gram[-1, -1]), 1e-30)
        tensors = {"out_weight": solved[:, :-1], "out_bias": solved[:, -1]}
        return OutputFit(tensors, 1.0 - across[best] / total, mean_energy / total)

    def _across(self, known: Array, ridge: float) -> float:
        """Energy that each half's fit misses of the other half."""
        first, second = self.folds
        pairs = ((first, second), (second, first))
        return sum(other.missed(own.equations.solve(known, ridge=ridge, constant=True)) for own, other in pairs)
