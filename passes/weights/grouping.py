"""Which key/value heads share a head: groups of one size in which heads cost least to merge.

How much two heads lose if they are merged, by the statistics and within the freedom of their attention, is a number for
each pair; groups are to have the smallest sum over their pairs. That is a balanced partition of a graph, for which
swaps of two heads between groups are tried until none helps, from the neighbours' grouping and from a greedy one. So
the result is never worse, by this measure, than neighbours together. Where heads of a group are not neighbours, query
heads change places with the columns of the output projection, which computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from passes.dataflow import Array
from passes.weights.group import Group, Moments, weight_moments
from passes.weights.joint import join_keys, join_values
from passes.weights.merge import Freedom, blocks_of, contiguous, cut, readers
from passes.weights.projection import SiteWeights

Groups = tuple[tuple[int, ...], ...]

_ENOUGH = 1e-9
"""Part of the whole loss by which a swap must help."""


def pairs(kv_heads: int) -> Groups:
    """Every two of an attention's key/value heads."""
    return tuple(combinations(range(kv_heads), 2))


def pair_losses(
    weights: SiteWeights, group: Sequence[int], freedom: Freedom, moments: Sequence[Moments] | None = None
) -> Array:
    """[N, N], symmetric, zeros on the diagonal: the energy of scores and of outputs that merging two heads loses, each
    as a part of what all pairs have.

    Args:
        group: for each query head the key/value head it reads.
        moments: statistics of each of `pairs`, `weight_moments` if None.
    """
    heads = len(weights.k)
    both = pairs(heads)
    parts = [cut(weights, m, h, group) for m, h in zip(both, readers(both, group), strict=True)]
    known = [weight_moments(p) for p in parts] if moments is None else list(moments)
    lost = np.zeros((2, heads, heads))
    total = np.zeros(2)
    for (i, j), part, moment in zip(both, parts, known, strict=True):
        for operand, (part_lost, energy) in enumerate(_losses(part, moment, freedom, weights.out_bias is not None)):
            lost[operand, i, j] = lost[operand, j, i] = part_lost * energy
            total[operand] += energy
    return np.asarray((lost / np.maximum(total, 1e-300)[:, None, None]).sum(axis=0))


def _losses(group: Group, moments: Moments, freedom: Freedom, offset: bool) -> list[tuple[float, float]]:
    """(part lost, energy) of scores, and of outputs, as far as each is merged jointly."""
    found = [(0.0, 0.0), (0.0, 0.0)]
    if freedom.keys is None:
        keys = join_keys(group, moments, blocks_of(group, freedom), centred=freedom.centred)
        found[0] = keys.lost, keys.energy
    if freedom.values is None and group.out is not None:
        values = join_values(group, moments, offset=offset)
        found[1] = values.lost, values.energy
    return found


def similar(losses: Array, groups: int) -> Groups:
    """Heads of each group, ascending, groups by their first head; as many in each.

    Raises ValueError if the heads do not fall into so many equal groups.
    """
    heads = len(losses)
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads do not fall into {groups} equal groups")
    tried = [_improved(start, losses) for start in (contiguous(heads, groups), _greedy(losses, groups))]
    best = min(tried, key=lambda g: _cost(g, losses))
    return tuple(sorted(tuple(sorted(members)) for members in best))


def _cost(groups: Sequence[Sequence[int]], losses: Array) -> float:
    return float(sum(losses[np.ix_(m, m)].sum() for m in map(list, groups))) / 2


def _greedy(losses: Array, groups: int) -> Groups:
    """One group after the other: the heads that are cheapest to join to the first that is left."""
    left, size = list(range(len(losses))), len(losses) // groups
    found: list[tuple[int, ...]] = []
    while left:
        members = [left.pop(0)]
        while len(members) < size:
            members.append(left.pop(int(np.argmin(losses[np.ix_(left, members)].sum(axis=1)))))
        found.append(tuple(members))
    return tuple(found)


def _improved(start: Groups, losses: Array) -> Groups:
    """Swap the two heads of different groups that help most, until none do."""
    groups = [list(members) for members in start]
    owner = {h: g for g, members in enumerate(groups) for h in members}
    enough = _ENOUGH * max(float(losses.sum()), 1e-300)
    while True:
        toward = np.stack([losses[:, members].sum(axis=1) for members in groups], axis=1)
        gains = [
            (
                toward[a, owner[a]]
                + toward[b, owner[b]]
                - toward[a, owner[b]]
                - toward[b, owner[a]]
                + 2 * losses[a, b],
                a,
                b,
            )
            for a, b in pairs(len(losses))
            if owner[a] != owner[b]
        ]
        gain, a, b = max(gains, default=(0.0, 0, 0))
        if gain <= enough:
            return tuple(map(tuple, groups))
        groups[owner[a]].remove(a)
        groups[owner[b]].remove(b)
        groups[owner[a]].append(b)
        groups[owner[b]].append(a)
        owner[a], owner[b] = owner[b], owner[a]
