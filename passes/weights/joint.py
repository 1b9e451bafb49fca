"""The joint low-rank merge: the shared key/value head of a group that keeps most of what the heads did together.

Keys without rotation. Head h's scores are x̃ᵀ S_h y with S_h = W̃_q,hᵀ W_k,h, of rank D. One shared key head can offer
one D-dimensional subspace, so the problem is the best rank-D factorisation of the stacked S_h. With whitening on both
sides its error is the scores' own,

    E (x̃ᵀ S_h y - q̂_hᵀ k̂)²,   q̂_h = B_h q_h,  k̂ = A k,  k the group's stacked keys,

and since x̃ enters through q_h and y through k only, everything happens between features: with C_h = E[q_h q_hᵀ], C the
moment of k and J_h = [.. C_h^½ ..] reading the key head of h, the matrix to factor is J C Jᵀ (rows of all h stacked).
With U its D leading eigenvectors, cut into U_h:

    A = Uᵀ J,      B_h = U_hᵀ C_h^-½,

rows by falling energy (where slowly turning features count as still, the weightiest rows then turn least),

because q_hᵀ k_h = (C_h^-½ q_h)ᵀ J_h k and J ≈ U Uᵀ J under C. C is centred the way softmax centres (`Moments.spread`)
where scores go straight into it.

Keys with rotation. For a frequency the score is Re(q* k e^{iφ}) of complex numbers; over uniform phases φ its mean
square is |q|²|k|²/2, so the frequencies separate and each is a rank-1 problem over the group's heads: with
d_h = E[|q_h|²]^½ and M the (uncentred) complex moment of the keys, u the leading eigenvector of diag(d) M diag(d),

    k̂ = Σ_h u_h* d_h k_h,      q̂_h = q_h · (u_h / d_h)*.

Values. Head h contributes W_o,h W_v,h (Σ_t p_ht x_t), that is O_h z_h with z_h its attended stacked values. The shared
value head is the best rank-Dv subspace of the stacked O_h under the pooled moment M of the z_h: with R = M^½ and U the
leading eigenvectors of R (Σ_h O_hᵀ O_h) R, the values become Uᵀ R^-1 times the stacked ones, and each head's output
columns are refitted under its own moment M_h, O'_h = O_h M_h Aᵀ (A M_h Aᵀ)^-1. Where the output projection has a bias,
moments are taken around the mean and the bias carries what that leaves.
"""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array
from passes.weights.group import (
    Blocks,
    Group,
    KeyMerge,
    Moments,
    ValueMerge,
    as_matrix,
    complex_moment,
    inverse_root,
    root,
)

_JITTER = 1e-10


def join_keys(group: Group, moments: Moments, blocks: Blocks, *, centred: bool) -> KeyMerge:
    """The shared key head of a group and its queries.

    Args:
        centred: scores go straight into a softmax, so that what is common to all keys of a query does not count.
            Only features that do not rotate profit.
    """
    dim, members, heads = group.k.shape[1], group.members, len(group.reads)
    key, query = np.zeros((dim, members * dim)), np.zeros((heads, dim, dim))
    kept = total = 0.0
    for pair in blocks.pairs:
        shared, turns, part, whole = _one_frequency(group, moments, pair)
        for j, factor in enumerate(shared):
            key[np.ix_(pair, j * dim + pair)] = as_matrix(factor)
        for h, factor in enumerate(turns):
            query[h][np.ix_(pair, pair)] = as_matrix(factor)
        kept, total = kept + part, total + whole
    if len(blocks.free):
        free, rows = blocks.free, _rows(blocks.free, members, dim)
        moment = (moments.spread if centred else moments.keys)[np.ix_(rows, rows)]
        few, turned, part, whole = _free_features(group, moments.queries[:, free][:, :, free], moment)
        key[np.ix_(free, rows)] = few
        for h in range(heads):
            query[h][np.ix_(free, free)] = turned[h]
        kept, total = kept + part, total + whole
    return KeyMerge(key, query, _lost(kept, total), total)


def join_values(group: Group, moments: Moments, *, offset: bool) -> ValueMerge:
    """The shared value head of a group, and its output columns.

    Args:
        offset: the output projection has a bias that may take up a constant.

    Raises ValueError without an output projection.
    """
    if group.out is None:
        raise ValueError("values can only be merged jointly where an output projection follows")
    dim, members, width = group.v.shape[1], group.members, group.out.shape[1]
    reading = np.zeros((len(group.reads), width, members * dim))
    for h, member in enumerate(group.reads):
        reading[h][:, member * dim : (member + 1) * dim] = group.out[h]
    each = np.asarray(moments.values)
    if offset:
        each = each - moments.means[:, :, None] * moments.means[:, None, :]
    pooled = each.mean(axis=0)
    half = root(pooled)
    stacked = reading.reshape(-1, members * dim)
    energy, vectors = np.linalg.eigh(half @ (stacked.T @ stacked) @ half)
    leading = vectors[:, ::-1][:, :dim]
    value = leading.T @ inverse_root(pooled)
    out = np.stack([refitted(o, m, value) for o, m in zip(reading, each, strict=True)])
    left = np.einsum("hed,hd->e", reading - out @ value, moments.means) if offset else np.zeros(width)
    kept, total = float(energy[::-1][:dim].sum()), float(energy.sum())
    return ValueMerge(value, out, left, _lost(kept, total), total)


def refitted(reading: Array, moment: Array, value: Array) -> Array:
    """[E, Dv]: the output columns that answer `reading` best from ``value @ z`` where E[z zᵀ] is `moment`."""
    small = value @ moment @ value.T
    small = small + np.eye(len(small)) * (_JITTER * max(float(np.trace(small)) / len(small), 1e-300))
    return np.asarray(np.linalg.solve(small, value @ moment @ reading.T).T)


def _one_frequency(group: Group, moments: Moments, pair: Array) -> tuple[Array, Array, float, float]:
    """(factors of the keys [m], of the queries [Q], energy kept, energy in all) of one complex feature."""
    reads = list(group.reads)
    moment = complex_moment(moments.keys, group.members, pair)[np.ix_(reads, reads)]
    size = np.sqrt(np.maximum(moments.queries[:, pair, pair].sum(axis=1), 0.0))
    energy, vectors = np.linalg.eigh(size[:, None] * moment * size)
    leading = vectors[:, -1]
    shared = np.zeros(group.members, dtype=np.complex128)
    np.add.at(shared, reads, leading.conj() * size)
    alive = size > 1e-12 * max(float(size.max(initial=0.0)), 1e-300)
    turns = np.where(alive, leading.conj() / np.where(alive, size, 1.0), 0.0)
    return shared, turns, float(energy[-1]) / 2, float(energy.sum()) / 2


def _free_features(group: Group, queries: Array, moment: Array) -> tuple[Array, Array, float, float]:
    """(A [f, m f], B [Q, f, f], energy kept, energy in all) over f features that do not rotate."""
    count = queries.shape[1]
    joined = np.zeros((len(group.reads) * count, len(moment)))
    for h, member in enumerate(group.reads):
        joined[h * count : (h + 1) * count, member * count : (member + 1) * count] = root(queries[h])
    energy, vectors = np.linalg.eigh(joined @ moment @ joined.T)
    leading = vectors[:, ::-1][:, :count]
    by_head = leading.reshape(len(group.reads), count, count)
    turned = np.stack([u.T @ inverse_root(c) for u, c in zip(by_head, queries, strict=True)])
    return leading.T @ joined, turned, float(energy[::-1][:count].sum()), float(energy.sum())


def _lost(kept: float, total: float) -> float:
    return min(max(1.0 - kept / total, 0.0), 1.0) if total > 0 else 0.0


def _rows(features: Array, members: int, dim: int) -> Array:
    """Positions of `features` of every member among stacked heads, member by member."""
    return np.asarray((np.arange(members)[:, None] * dim + features).reshape(-1))
