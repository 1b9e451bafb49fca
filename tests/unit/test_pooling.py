"""Mean pooling of key/value heads: values, dtypes, legality, exactness on tied heads."""

from __future__ import annotations

import numpy as np
import pytest

from passes.weights.pooling import legal_head_counts, mean_pool, ties


def _random(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(("before", "after", "dim"), [(12, 4, 3), (8, 1, 5), (6, 3, 1), (4, 4, 2)])
def test_rows_are_means_of_contiguous_groups(before: int, after: int, dim: int) -> None:
    weight = _random(before * dim, 7)
    pooled = mean_pool(weight, before, after)
    group = before // after
    for head in range(after):
        members = [weight[(head * group + i) * dim : (head * group + i + 1) * dim] for i in range(group)]
        np.testing.assert_allclose(pooled[head * dim : (head + 1) * dim], sum(members) / group, rtol=0, atol=1e-6)
    assert pooled.shape == (after * dim, 7)
    if group > 1:  # strided groups would be another result
        strided = weight.reshape(group, after, dim, 7).mean(0).reshape(-1, 7)
        assert not np.allclose(pooled, strided, atol=1e-3) or after == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_weight_seen_sideways_gives_the_same_bits(dtype: str) -> None:
    """Stored [in, heads * dim], it is pooled where it lies."""
    weight = _random(24, 33, dtype=dtype)
    weight[4:8] = weight[:4]  # the first two of six heads
    view = np.asfortranarray(weight)
    assert not view.flags.c_contiguous
    for groups in (1, 2, 3, 6):
        pooled = mean_pool(view, 6, groups)
        assert pooled.flags.c_contiguous and (pooled == mean_pool(weight, 6, groups)).all()
        assert ties(view, 6, groups) == ties(weight, 6, groups) == (groups == 6)
    assert ties(view[:8], 2, 1), "the control: heads that are equal"
    assert not ties(np.asfortranarray(np.array([0.0, -0.0])), 2, 1), "bits count, not values"


def test_a_bias_is_pooled_like_a_weight() -> None:
    weight = _random(12, 1)
    np.testing.assert_array_equal(mean_pool(weight[:, 0], 6, 2), mean_pool(weight, 6, 2)[:, 0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_dtype_is_restored(dtype: str) -> None:
    assert mean_pool(_random(8, 3, dtype=dtype), 4, 2).dtype == np.dtype(dtype)


def test_sums_are_taken_in_float64() -> None:
    big = np.array([[6e4], [6e4], [-6e4], [0.5]], dtype=np.float16)
    assert mean_pool(big, 4, 1)[0, 0] == np.float16((6e4 + 6e4 - 6e4 + 0.5) / 4)  # a float16 sum overflows
    wide = np.array([[1e8], [1.0], [-1e8], [1.0]], dtype=np.float32)
    assert mean_pool(wide, 4, 1)[0, 0] == np.float32(0.5)  # a float32 sum loses a 1.0


@pytest.mark.parametrize("group", [2, 3, 5, 7])
def test_tied_heads_are_returned_bit_for_bit(group: int) -> None:
    head = _random(2, 4, 9, seed=group)
    tied = np.repeat(head, group, axis=0).reshape(-1, 9)
    assert ties(tied, 2 * group, 2)
    np.testing.assert_array_equal(mean_pool(tied, 2 * group, 2), head.reshape(-1, 9))


def test_one_perturbed_element_unties() -> None:
    tied = np.repeat(_random(2, 4, 9), 3, axis=0).reshape(-1, 9)
    tied[17, 3] = np.nextafter(tied[17, 3], np.float32(np.inf))
    assert not ties(tied, 6, 2)
    assert ties(tied, 6, 6)


def test_ties_compares_bits() -> None:
    assert not ties(np.array([0.0, -0.0], dtype=np.float32), 2, 1)
    assert ties(np.array([np.nan, np.nan], dtype=np.float32), 2, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "legal"),
    [
        (12, 12, [1, 2, 3, 4, 6, 12]),
        (9, 3, [1, 3]),
        (32, 8, [1, 2, 4, 8]),
        (7, 7, [1, 7]),
        (16, 1, [1]),
    ],
)
def test_legal_head_counts(heads: int, kv_heads: int, legal: list[int]) -> None:
    assert legal_head_counts(heads, kv_heads) == legal


@pytest.mark.parametrize(("before", "after"), [(6, 4), (6, 0), (5, 5)])
def test_unequal_groups_are_refused(before: int, after: int) -> None:
    with pytest.raises(ValueError, match="heads"):
        mean_pool(_random(12, 2), before, after)
