"""Collecting a group's second moments batch by batch: one pass, float64 sums, nothing kept of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import Array
from passes.weights.group import Moments


@dataclass
class MomentSums:
    """Running sums for one group; `moments` divides them by the tokens seen."""

    _sums: dict[str, Array] = field(default_factory=dict)
    _queries: float = 0.0
    _keys: float = 0.0

    def add(self, queries: Array, keys: Array, values: Array, weights: Array, shown: Array, asking: Array) -> None:
        """One batch, features before any rotation.

        Args:
            queries: [B, Q, S, D], keys: [B, T, m D], values: [B, T, m Dv], each with the bias inside.
            weights: [B, Q, S, T], the attention's rows after softmax.
            shown: [B, T], keys that any query sees; asking: [B, S], queries that count.
        """
        keys = np.asarray(keys, dtype=np.float64)
        counted = keys[shown]
        mean = (keys * shown[..., None]).sum(axis=1) / np.maximum(shown.sum(axis=1), 1)[:, None]
        apart = (keys - mean[:, None])[shown]
        asked = np.asarray(queries.transpose(1, 0, 2, 3)[:, asking], dtype=np.float64)
        attended = np.asarray((weights @ values[:, None]).transpose(1, 0, 2, 3)[:, asking], dtype=np.float64)
        self._add("queries", asked.transpose(0, 2, 1) @ asked)
        self._add("keys", counted.T @ counted)
        self._add("spread", apart.T @ apart)
        self._add("values", attended.transpose(0, 2, 1) @ attended)
        self._add("means", attended.sum(axis=1))
        self._queries += float(asking.sum())
        self._keys += float(shown.sum())

    def _add(self, name: str, array: Array) -> None:
        wide = np.asarray(array, dtype=np.float64)
        self._sums[name] = wide if name not in self._sums else self._sums[name] + wide

    def moments(self) -> Moments:
        """Raises ValueError if no token was seen."""
        if not self._queries or not self._keys:
            raise ValueError("no token was seen")
        s = self._sums
        return Moments(
            queries=s["queries"] / self._queries,
            keys=s["keys"] / self._keys,
            spread=s["spread"] / self._keys,
            values=s["values"] / self._queries,
            means=s["means"] / self._queries,
        )
