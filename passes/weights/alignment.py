"""Merging heads after turning them towards each other (arXiv 2412.20677), as pure functions of arrays.

An attention does not change if a value head is turned by an orthogonal R and its output columns by Rᵀ, nor if key and
query are turned alike. Before heads are averaged, each is therefore turned to where it is nearest to the others: the
generalised Procrustes problem

    minimise  Σ_h ‖R_h W_h - M‖²  over orthogonal R_h,  M = mean of R_h W_h,

solved by turns: for given M the best R_h is the polar factor of M W_hᵀ = Σ_j R_j (W_j W_hᵀ) / m, which needs nothing
but the heads' mutual second moments W_j C W_hᵀ. Under a rotary embedding only rotations that commute with it are
allowed: for each frequency one unit complex number, for which the same iteration is a power iteration on phases.

The mean of heads that do not agree is shorter than they are; the merged head gets the members' mean Frobenius norm.
"""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array
from passes.weights.group import Blocks, Group, KeyMerge, Moments, ValueMerge, as_matrix, complex_moment

_ROUNDS = 200
_SETTLED = 1e-13


def align_values(group: Group, moments: Moments) -> ValueMerge:
    """Turn value heads, fold the inverse into the output columns, average, restore the norm.

    Raises ValueError without an output projection.
    """
    if group.out is None:
        raise ValueError("values can only be turned where an output projection follows")
    moment = moments.values.mean(axis=0)
    turns = procrustes(moment, group.members)
    factor = _restored(turns, moment)
    value = np.concatenate(list(turns), axis=1) * (factor / group.members)
    out = np.stack([o @ turns[r].T for o, r in zip(group.out, group.reads, strict=True)])
    return ValueMerge(value, out, np.zeros(out.shape[1]), _disagreement(turns, moment))


def align_keys(group: Group, moments: Moments, blocks: Blocks) -> KeyMerge:
    """Turn key heads and their queries within what the rotation allows, average, restore the norm."""
    dim, members = group.k.shape[1], group.members
    turns = np.zeros((members, dim, dim))
    for pair in blocks.pairs:
        for h, phase in enumerate(_phases(complex_moment(moments.keys, members, pair))):
            turns[h][np.ix_(pair, pair)] = as_matrix(phase)
    if len(blocks.free):
        rows = _rows(blocks.free, members, dim)
        for h, turn in enumerate(procrustes(moments.keys[np.ix_(rows, rows)], members)):
            turns[h][np.ix_(blocks.free, blocks.free)] = turn
    factor = _restored(turns, moments.keys)
    key = np.concatenate(list(turns), axis=1) * (factor / members)
    return KeyMerge(key, turns[list(group.reads)], _disagreement(turns, moments.keys))


def procrustes(moment: Array, members: int) -> Array:
    """[m, D, D]: orthogonal matrices that turn heads towards their mean, from their stacked second moment [m D, m D].

    Starts from the best turn of each head onto the first, which is the answer where heads are turned copies.
    """
    dim = moment.shape[0] // members
    mutual = moment.reshape(members, dim, members, dim).transpose(0, 2, 1, 3)
    turns = np.stack([polar(mutual[0, h]) for h in range(members)])
    before = -np.inf
    for _ in range(_ROUNDS):
        for h in range(members):
            toward = sum((turns[j] @ mutual[j, h] for j in range(members) if j != h), np.zeros((dim, dim)))
            turns[h] = polar(toward) if members > 1 else np.eye(dim)
        agreement = sum(
            float(np.sum(turns[j] @ mutual[j, h] * turns[h])) for j in range(members) for h in range(members)
        )
        if agreement - before <= _SETTLED * abs(agreement):
            break
        before = agreement
    return np.asarray(turns)


def polar(matrix: Array) -> Array:
    """The orthogonal matrix nearest to a square one."""
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right)


def _phases(moment: Array) -> Array:
    """[m] unit complex numbers r that maximise Σ_jh r_j E[z_j z_h*] r_h*."""
    members = len(moment)
    vectors = np.linalg.eigh(moment)[1]
    phases = _unit(vectors[:, -1].conj())
    for _ in range(_ROUNDS):
        before = phases.copy()
        for h in range(members):
            pull = sum((phases[j] * moment[j, h] for j in range(members) if j != h), 0j)
            phases[h] = _unit(np.array([pull]))[0] if members > 1 else 1.0
        if np.abs(phases - before).max() <= _SETTLED:
            break
    return np.asarray(phases)


def _unit(numbers: Array) -> Array:
    size = np.abs(numbers)
    return np.where(size > 1e-300, numbers / np.maximum(size, 1e-300), 1.0)


def _restored(turns: Array, moment: Array) -> float:
    """Factor that gives the mean head the members' mean Frobenius norm (under the moment)."""
    members, dim = len(turns), turns.shape[1]
    combined = np.concatenate(list(turns), axis=1) / members
    energies = np.diag(moment).reshape(members, dim).sum(axis=1)
    length = np.sqrt(max(float(np.sum(combined @ moment * combined)), 0.0))
    return float(np.sqrt(np.maximum(energies, 0.0)).mean()) / length if length > 1e-150 else 1.0


def _disagreement(turns: Array, moment: Array) -> float:
    """The part of the heads' energy that their mean does not hold."""
    combined = np.concatenate(list(turns), axis=1) / len(turns)
    total = float(np.trace(moment))
    return max(1.0 - len(turns) * float(np.sum(combined @ moment * combined)) / max(total, 1e-300), 0.0)


def _rows(features: Array, members: int, dim: int) -> Array:
    return np.asarray((np.arange(members)[:, None] * dim + features).reshape(-1))
