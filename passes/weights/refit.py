"""Least squares for an output projection, with a ridge towards weights known beforehand.

How firmly the known weights are held decides how well the solution does on other text: a few thousand tokens leave
directions of the features that hardly occur, and a fit of those is noise. `Folded` asks the data: each half of every
batch says how well the other half's solutions do on it. All ridges of one half share an eigendecomposition.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array

RIDGE = 1e-3
"""Weight of the known solution, relative to the mean energy of a feature."""
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Weights that are tried, on half of the tokens."""
_FREE = 1e-9
"""Weight of a constant feature that no ridge is to hold, relative to its energy."""


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
        weight = np.full(len(self.gram), max(ridge * self.energy(constant), 1e-30))
        if constant:
            weight[-1] = _FREE * max(float(self.gram[-1, -1]), 1e-30)
        right = self.cross + weight[:, None] * known.T
        return np.asarray(np.linalg.solve(self.gram + np.diag(weight), right).T)

    def energy(self, constant: bool) -> float:
        """Of a feature, on average; without the last one where that is constant."""
        count = len(self.gram) - int(constant)
        return float(np.trace(self.gram[:count, :count])) / max(count, 1)

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
        across = missed_across(first, second, known, RIDGES, constant=constant)
        across += missed_across(second, first, known, RIDGES, constant=constant)
        whole = NormalEquations(first.gram + second.gram, first.cross + second.cross)
        return whole.solve(known, ridge=RIDGES[int(np.argmin(across))] / 2, constant=constant)


def missed_across(
    own: NormalEquations, other: NormalEquations, known: Array, ridges: tuple[float, ...], *, constant: bool
) -> Array:
    """[len(ridges)]: ``other.missed(own.solve(known, ridge))``, up to one number that is the same for all ridges.

    With W = known + Δ and R = cross - gram knownᵀ a ridge leaves (gram + λ) Δᵀ = R. A constant's own row gives its
    weight, Δ_c = (R_c - gᵀ Δ) / n, and leaves (S + λ) Δᵀ = r for the others, S = U diag(s) Uᵀ. So Δᵀ = U diag(d) z with
    z = Uᵀ r and d = 1 / (s + λ), in which what the other half misses is a quadratic form, dᵀ A d - 2 bᵀ d.
    """
    count = len(own.gram) - int(constant)
    here, there = (half.cross - half.gram @ known.T for half in (own, other))
    lift = np.eye(len(own.gram), count)  # from Δ to Δ and Δ_c
    square, right = own.gram[:count, :count], here[:count]
    if constant:
        lift[-1] = -own.gram[-1, :count] / (own.gram[-1, -1] * (1 + _FREE))
        square, right = square + np.outer(own.gram[:count, -1], lift[-1]), right + np.outer(lift[-1], here[-1])
        there = there - np.outer(other.gram[:, -1], here[-1] / (own.gram[-1, -1] * (1 + _FREE)))
    sizes, basis = np.linalg.eigh((square + square.T) / 2)
    turned, lifted = basis.T @ right, lift @ basis
    form = (lifted.T @ other.gram @ lifted) * (turned @ turned.T)
    slope = ((lifted.T @ there) * turned).sum(axis=1)
    weights = np.maximum(np.asarray(ridges) * own.energy(constant), 1e-30)
    parts = 1.0 / (np.maximum(sizes, 0.0) + weights[:, None])
    return np.asarray(((parts @ form) * parts).sum(axis=1) - 2 * parts @ slope)
