"""Fewer heads behind an unchanged layout: which columns of a projection are computed, and where each is laid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array


@dataclass(frozen=True)
class Part:
    """One operand of a projection and what its heads become.

    Attributes:
        columns: [heads, dim], the projection's column for each head and feature.
        kv_heads: heads that remain; new head ``h * kv_heads // heads`` stands for head ``h``.
    """

    columns: Array
    kv_heads: int


@dataclass(frozen=True)
class Repetition:
    """How the old columns are made from fewer new ones: ``old[..., c] = new[..., index[c]]``.

    Attributes:
        kept: old columns that no operand claims, in order; the first of the new ones. The operands' heads follow,
            head-major, in the order of the parts.
        index: [features], for each old column the new one that it repeats.
    """

    kept: Array
    index: Array


def repetition(features: int, parts: Sequence[Part]) -> Repetition:
    """Lay out a projection of `features` columns so that the heads of each part are computed once and repeated.

    Raises ValueError if two parts claim the same column, or a part one column twice.
    """
    claimed = np.concatenate([p.columns.reshape(-1) for p in parts]) if parts else np.empty(0, np.int64)
    if len(np.unique(claimed)) != len(claimed):
        raise ValueError("two operands read the same columns of one projection")
    kept = np.setdiff1d(np.arange(features), claimed)
    index = np.full(features, -1, np.int64)
    index[kept] = np.arange(len(kept))
    start = len(kept)
    for part in parts:
        heads, dim = part.columns.shape
        new = np.arange(heads) * part.kv_heads // heads
        index[part.columns] = start + new[:, None] * dim + np.arange(dim)[None]
        start += part.kv_heads * dim
    return Repetition(kept, index)
