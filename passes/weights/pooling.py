"""Mean pooling of key/value heads (arXiv 2305.13245, section 2.1) as pure functions of arrays."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array


def mean_pool(weight: Array, heads_before: int, heads_after: int) -> Array:
    """Average contiguous groups of heads: [heads_before * dim, ...] -> [heads_after * dim, ...].

    Works on a weight [heads * dim, in] and on a bias [heads * dim] alike, also where its rows do not lie in one piece.
    Sums are taken in float64; the dtype of `weight` is restored. Where the heads of a group are equal bit for bit the
    result is that head, unchanged.

    Raises:
        ValueError: if `heads_after` does not divide `heads_before`, or `heads_before` the number of rows.
    """
    grouped = _grouped(weight, heads_before, heads_after)
    pooled: Array = grouped.mean(axis=1, dtype=np.float64).astype(weight.dtype)
    tied = [all(np.array_equal(head, heads[0]) for head in heads[1:]) for heads in grouped]  # up to the first other one
    pooled[tied] = grouped[tied, 0]  # a mean of equal numbers may be off by one unit in the last place
    return np.ascontiguousarray(pooled.reshape(-1, *weight.shape[1:]))


def legal_head_counts(heads: int, kv_heads: int) -> list[int]:
    """Every N to which `kv_heads` key/value heads of an attention with `heads` query heads can be pooled, ascending.

    N divides the query heads and the present key/value heads, so that groups are whole and of equal size.
    """
    return [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]


def ties(weight: Array, heads: int, groups: int) -> bool:
    """True if within each of `groups` contiguous groups all heads are equal bit for bit, so that pooling is exact.

    Raises:
        ValueError: as `mean_pool`.
    """
    grouped = _grouped(weight, heads, groups)
    bits = grouped.view(f"u{grouped.dtype.itemsize}")
    return all(np.array_equal(bits[:, i], bits[:, 0]) for i in range(1, grouped.shape[1]))


def _grouped(weight: Array, heads: int, groups: int) -> Array:
    """[heads * dim, ...] -> [groups, heads / groups, dim, ...]."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads do not fall into {groups} equal groups")
    if weight.shape[0] % heads:
        raise ValueError(f"{weight.shape[0]} rows are not a multiple of {heads} heads")
    return weight.reshape(groups, heads // groups, weight.shape[0] // heads, *weight.shape[1:])
