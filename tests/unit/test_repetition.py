"""Which columns a projection computes and where they are laid, on invented layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.weights.repetition import Part, repetition


@given(
    heads=st.sampled_from([2, 4, 6]),
    dim=st.integers(1, 3),
    others=st.integers(0, 5),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_old_columns_are_made_from_new_ones(heads: int, dim: int, others: int, seed: int, data: st.DataObject) -> None:
    """Keys, values and other columns in any order: each is found again, each head of a group as the same."""
    kv_heads = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    order = np.random.default_rng(seed).permutation(2 * heads * dim + others)
    k, v = order[: 2 * heads * dim].reshape(2, heads, dim)
    laid = repetition(len(order), [Part(k, kv_heads), Part(v, kv_heads)])
    new_k, new_v = np.arange(2 * kv_heads * dim).reshape(2, kv_heads, dim) + 1000
    new = np.concatenate([laid.kept, new_k.reshape(-1), new_v.reshape(-1)])
    old = new[laid.index]
    assert np.array_equal(old[laid.kept], laid.kept) and len(laid.kept) == others
    group = np.arange(heads) * kv_heads // heads
    assert np.array_equal(old[k], new_k[group]) and np.array_equal(old[v], new_v[group])
    assert set(laid.index) == set(range(len(new)))


def test_columns_that_two_operands_read_cannot_be_laid_out() -> None:
    columns = np.arange(8).reshape(4, 2)
    with pytest.raises(ValueError, match="same columns"):
        repetition(8, [Part(columns, 2), Part(columns[::-1], 2)])
