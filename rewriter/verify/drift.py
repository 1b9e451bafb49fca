"""How far two outputs lie apart: largest difference, cosine per token, KL of the distributions that logits mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.drift import cosines, divergences
from rewriter.verify.result import Fidelity

Array = NDArray[Any]

_ROWS = 1024
"""Rows that are widened to float64 at a time."""


@dataclass
class Drift:
    """Adds up the drift of several pairs of outputs.

    Attributes:
        logits: True if the last axis holds logits, so that KL means something.
        scale: largest magnitude seen in the original's outputs.
    """

    logits: bool
    scale: float = 0.0
    max_abs: float = 0.0
    _cosines: list[float] = field(default_factory=list)
    _kls: list[float] = field(default_factory=list)

    def add(self, before: Array, after: Array, keep: Array | None = None) -> None:
        """Compare two outputs of equal shape [..., features].

        Args:
            keep: which tokens count for cosine and KL, [...] without the last axis; padding does not.
                The largest difference is taken over everything.
        """
        if before.shape != after.shape:
            raise ValueError(f"outputs of shapes {before.shape} and {after.shape} cannot be compared")
        if before.size == 0:
            return
        width = before.shape[-1] if before.ndim else 1
        rows_before, rows_after = before.reshape(-1, width), after.reshape(-1, width)
        counted = np.ones(len(rows_before), dtype=bool) if keep is None else keep.reshape(-1)
        for start in range(0, len(rows_before), _ROWS):
            part = slice(start, start + _ROWS)
            x, y = rows_before[part].astype(np.float64), rows_after[part].astype(np.float64)
            self.scale = max(self.scale, float(np.abs(x).max()))
            self.max_abs = max(self.max_abs, float(np.abs(x - y).max()))
            x, y = x[counted[part]], y[counted[part]]
            self._cosines.extend(cosines(x, y).tolist())
            if self.logits:
                self._kls.extend(divergences(x, y).tolist())

    @property
    def relative(self) -> float:
        """Largest difference as a part of the original's largest magnitude."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    def fidelity(self) -> Fidelity | None:
        """The sums so far; None if nothing was added."""
        if not self._cosines:
            return None
        kl = float(np.mean(self._kls)) if self.logits else None
        return Fidelity(self.max_abs, float(np.mean(self._cosines)), kl)
