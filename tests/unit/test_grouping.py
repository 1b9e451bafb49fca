"""Balanced groups by similarity, beside trying every partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest

from passes.weights.group import Moments, weight_moments
from passes.weights.grouping import pair_losses, pairs, similar
from passes.weights.merge import Freedom, contiguous, cut, merge_heads, readers
from passes.weights.projection import SiteWeights


def partitions(heads: Sequence[int], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    if not heads:
        yield ()
        return
    for others in combinations(heads[1:], size - 1):
        rest = [h for h in heads[1:] if h not in others]
        yield from (((heads[0], *others), *more) for more in partitions(rest, size))


def cost(groups: Sequence[Sequence[int]], losses: np.ndarray) -> float:
    return float(sum(losses[a, b] for members in groups for a, b in combinations(members, 2)))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_nearly_the_best_of_all(groups: int) -> None:
    ours, best, neighbours = [], [], []
    for seed in range(12):
        losses = np.random.default_rng(seed).random((8, 8))
        losses = (losses + losses.T) * (1 - np.eye(8))
        found = similar(losses, groups)
        assert sorted(h for members in found for h in members) == list(range(8))
        assert {len(members) for members in found} == {8 // groups}
        ours.append(cost(found, losses))
        best.append(min(cost(p, losses) for p in partitions(range(8), 8 // groups)))
        neighbours.append(cost(contiguous(8, groups), losses))
    assert np.all(np.array(ours) <= np.array(neighbours) + 1e-12)
    assert np.mean(ours) <= 1.03 * np.mean(best) < 0.9 * np.mean(neighbours)


def test_heads_that_do_not_fall_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="equal groups"):
        similar(np.zeros((8, 8)), 3)


def attention(seed: int, copies: Sequence[int]) -> SiteWeights:
    """Eight heads; head h turns key/value head `copies[h]` by an orthogonal matrix of its own."""
    rng = np.random.default_rng(seed)
    k, v, q = (rng.standard_normal((8, 4, 17)) for _ in range(3))
    out = rng.standard_normal((8, 16, 4))
    for h, of in enumerate(copies):
        turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
        k[h], v[h] = turn @ k[of], turn @ v[of]
    return SiteWeights(q, k, v, out, None)


def test_turned_copies_find_each_other() -> None:
    copies = (0, 1, 2, 3, 2, 0, 3, 1)
    weights = attention(0, copies)
    losses = pair_losses(weights, range(8), Freedom())
    assert similar(losses, 4) == ((0, 5), (1, 7), (2, 4), (3, 6))
    merged = merge_heads(weights, range(8), similar(losses, 4), "joint", Freedom())
    assert merged.exact and merged.order == (0, 5, 1, 7, 2, 4, 3, 6) and not merged.in_place
    neighbours = merge_heads(weights, range(8), contiguous(8, 4), "joint", Freedom())
    assert not neighbours.exact, "control"


def test_statistics_of_pairs_say_the_same_where_they_are_the_weights() -> None:
    weights = attention(1, range(8))
    both = pairs(8)
    parts = [cut(weights, m, h, range(8)) for m, h in zip(both, readers(both, range(8)), strict=True)]
    moments: list[Moments] = [weight_moments(p) for p in parts]
    plain = pair_losses(weights, range(8), Freedom())
    assert np.allclose(plain, pair_losses(weights, range(8), Freedom(), moments))
    assert not np.allclose(plain, pair_losses(weights, range(8), Freedom(), moments[::-1])), "control"


def test_an_operand_that_is_averaged_does_not_count() -> None:
    weights = attention(2, range(8))
    both = pair_losses(weights, range(8), Freedom())
    keys = pair_losses(weights, range(8), Freedom(values="a reason"))
    values = pair_losses(weights, range(8), Freedom(keys="a reason"))
    assert np.allclose(both, keys + values) and keys.max() > 0 and values.max() > 0
