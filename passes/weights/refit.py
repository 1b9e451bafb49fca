"""Least squares for an output projection, with a ridge towards weights known beforehand.

How firmly the known weights are held decides how well the solution does on other text: a few thousand tokens leave
directions of the features that hardly occur, and a fit of those is noise. `Folded` asks the data: each half of every
batch says how well the other half's solutions do on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array

RIDGE = 1e-3
"""Weight of the known solution, relative to the mean energy of a feature."""
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Weights that are tried, on half of the tokens."""


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

    def missed(self, solved: Array) -> float:
        """What ``W = solved`` leaves of the targets' energy, less that energy itself."""
        return float(((solved @ self.gram) * solved).sum()) - 2 * float((solved * self.cross.T).sum())


@dataclass
class Folded:
    """As `NormalEquations`, with the ridge that does best across two halves of the tokens; add batches, then solve."""

    halves: tuple[NormalEquations, NormalEquations] = field(
        default_factory=lambda: (NormalEquations(), NormalEquations())
    )

    def add(self, features: Array, targets: Array) -> None:
        """[rows, F] and [rows, E]; the first half of the rows is one fold's, the second the other's."""
        middle = (len(features) + 1) // 2
        self.halves[0].add(features[:middle], targets[:middle])
        self.halves[1].add(features[middle:], targets[middle:])

    def solve(self, known: Array, *, constant: bool = False) -> Array:
        """[E, F], as `NormalEquations.solve` of all tokens.

        A ridge counts tokens: as many as half of them called for are enough for all, so it is halved.
        """
        first, second = self.halves
        across = [
            second.missed(first.solve(known, ridge=r, constant=constant))
            + first.missed(second.solve(known, ridge=r, constant=constant))
            for r in RIDGES
        ]
        whole = NormalEquations(first.gram + second.gram, first.cross + second.cross)
        return whole.solve(known, ridge=RIDGES[int(np.argmin(across))] / 2, constant=constant)
