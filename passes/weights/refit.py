"""Least squares for an output projection, with a ridge towards weights known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array

RIDGE = 1e-3
"""Weight of the known solution, relative to the mean energy of a feature."""


@dataclass
class NormalEquations:
    """Sums over tokens of features [F] and targets [E], float64; add batches, then solve."""

    gram: Array = field(default_factory=lambda: np.zeros((0, 0)))
    cross: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, features: Array, targets: Array) -> None:
        """[rows, F] and [rows, E]."""
        x, y = (np.asarray(a, dtype=np.float64) for a in (features, targets))
        gram, cross = x.T @ x, x.T @ y
        self.gram, self.cross = (gram, cross) if not self.gram.size else (self.gram + gram, self.cross + cross)

    def solve(self, known: Array, *, ridge: float = RIDGE, constant: bool = False) -> Array:
        """[E, F]: minimises Σ ‖y - W x‖² + λ ‖W - known‖², λ = ridge · mean energy of a feature.

        Args:
            constant: the last feature is 1; the ridge does not hold its weight.
        """
        count = len(self.gram) - int(constant)
        weight = np.full(len(self.gram), ridge * float(np.trace(self.gram[:count, :count])) / max(count, 1))
        weight = np.maximum(weight, 1e-30)
        if constant:
            weight[-1] = 1e-9 * max(float(self.gram[-1, -1]), 1e-30)
        right = self.cross + weight[:, None] * known.T
        return np.asarray(np.linalg.solve(self.gram + np.diag(weight), right).T)
