"""Least squares feature by feature: a factor and a constant that bring one signal nearest another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array


@dataclass(frozen=True)
class DiagonalFit:
    """``y = gain * x + bias``, per feature.

    Attributes:
        gain, bias: [E], float64.
        explained: the part of Σ y² that the fit accounts for; constant: the part that the bias alone would.
    """

    gain: Array
    bias: Array
    explained: float
    constant: float

    @property
    def tensors(self) -> dict[str, Array]:
        """By role."""
        return {"gain": self.gain, "bias": self.bias}

    def output(self, prepared: Array) -> Array:
        """Of the signal x, the last axis its features."""
        return np.asarray(prepared * self.gain + self.bias)


@dataclass
class DiagonalSums:
    """Sums over tokens, float64; add batches, then solve."""

    count: int = 0
    sums: Array = field(default_factory=lambda: np.zeros((5, 0)))

    def add(self, x: Array, y: Array) -> None:
        """[rows, E] each."""
        a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
        found = np.stack([v.sum(axis=0) for v in (a, b, a * a, b * b, a * b)])
        self.sums = found if not self.sums.size else self.sums + found
        self.count += len(a)

    def solve(self) -> DiagonalFit:
        """The best gain and bias; a feature of x that never varies gets a gain of 0."""
        n = max(self.count, 1)
        mean_x, mean_y, xx, yy, xy = self.sums / n
        variance, covariance = xx - mean_x**2, xy - mean_x * mean_y
        varies = variance > 1e-12 * np.maximum(xx, 1e-300)
        gain = np.where(varies, covariance / np.where(varies, variance, 1.0), 0.0)
        bias = mean_y - gain * mean_x
        energy = max(float(yy.sum()), 1e-300)
        left = yy - mean_y**2 - gain * covariance
        return DiagonalFit(gain, bias, 1 - float(left.sum()) / energy, float((mean_y**2).sum()) / energy)
