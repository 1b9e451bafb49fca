"""One group of heads that will share a key/value head: its weights, its moments, and what a merge answers.

Shape legend: Q query heads of the group, m of its key/value heads, D head_dim, Dv value_dim, E model width. All
arrays are float64. Everything a merge does is linear in a head's rows, so it is written as matrices that act on
[W | bias] from the left, and statistics are needed of projected features only, never of the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array


@dataclass(frozen=True)
class Group:
    """Weights of a group.

    Attributes:
        q: [Q, D, n + 1], k: [m, D, n' + 1], v: [m, Dv, n' + 1]; the last column is the bias, zeros without one.
        out: [Q, E, Dv], the columns of the output projection that read each query head; None if there is none.
        reads: for each query head the position among the m of the key/value head that it reads.
    """

    q: Array
    k: Array
    v: Array
    out: Array | None
    reads: tuple[int, ...]

    @property
    def members(self) -> int:
        return int(self.k.shape[0])


@dataclass(frozen=True)
class Moments:
    """Second moments of what a group computes, before any rotation.

    Attributes:
        queries: [Q, D, D], E[q qᵀ] with the bias inside.
        keys: [m D, m D], E[k kᵀ] of the group's stacked keys, with the bias inside.
        spread: [m D, m D], covariance of the stacked keys around the mean that each query's softmax takes: softmax
            ignores what it adds to all keys of a query.
        values: [Q, m Dv, m Dv], E[z zᵀ] of the stacked values as query head h attends to them, z = Σ_t p_ht v_t.
        means: [Q, m Dv], E[z].
    """

    queries: Array
    keys: Array
    spread: Array
    values: Array
    means: Array


@dataclass(frozen=True)
class Blocks:
    """How features of queries and keys may be combined without disturbing the rotation.

    Attributes:
        pairs: [F, 2], features that rotate together; one complex number each.
        free: features that do not rotate (or so slowly that it may be neglected); any matrix may act on them. The
            ones that turn least come first: a merge puts there what matters most.
    """

    pairs: Array
    free: Array

    @staticmethod
    def of(dim: int, partner: tuple[int, ...] | None, slow: tuple[int, ...] = ()) -> Blocks:
        """Blocks of a head: `partner` as in `Rotary` (None without rotation), `slow` features count as free,
        slowest first."""
        partners = tuple(range(dim)) if partner is None else partner
        turned = [d for d in range(dim) if partners[d] != d and not {d, partners[d]} & set(slow)]
        pairs = [(d, partners[d]) for d in turned if d < partners[d]]
        free = [*(d for d in range(dim) if partners[d] == d), *slow]
        return Blocks(np.array(pairs, dtype=np.int64).reshape(-1, 2), np.array(free, dtype=np.int64))

    def commuting(self, matrix: Array) -> Array:
        """The part of matrices [..., D, m D] that does not disturb the rotation: an orthogonal projection.

        Each rotating pair reads only itself, by a complex number, free features read all free ones.
        """
        dim = len(self.free) + 2 * len(self.pairs)
        if not len(self.pairs):
            return matrix
        found = np.zeros_like(matrix)
        first, second = self.pairs.T
        for start in range(0, matrix.shape[-1], dim):
            found[..., self.free[:, None], start + self.free] = matrix[..., self.free[:, None], start + self.free]
            same = (matrix[..., first, start + first] + matrix[..., second, start + second]) / 2
            across = (matrix[..., second, start + first] - matrix[..., first, start + second]) / 2
            found[..., first, start + first] = found[..., second, start + second] = same
            found[..., second, start + first], found[..., first, start + second] = across, -across
        return found


@dataclass(frozen=True)
class KeyMerge:
    """New keys ``key @ stacked keys`` [D, m D], and queries ``query[h] @ q_h`` [Q, D, D].

    `lost` is the part of the scores' energy that no choice of weights could keep in this form, 0 to 1; `energy` is the
    whole, where it was computed.
    """

    key: Array
    query: Array
    lost: float
    energy: float = 0.0


@dataclass(frozen=True)
class ValueMerge:
    """New values ``value @ stacked values`` [Dv, m Dv], output columns [Q, E, Dv], and what the output bias gains [E].

    `lost` and `energy` are as in `KeyMerge`, for the attention's output.
    """

    value: Array
    out: Array
    offset: Array
    lost: float
    energy: float = 0.0


def weight_moments(group: Group) -> Moments:
    """Moments under inputs of identity second moment, [x; 1] for queries and keys: the form without calibration.

    Attended values have the values' own moments then, and rows of the softmax that sum to one let the bias through.
    """
    keys = group.k.reshape(-1, group.k.shape[-1])
    values = group.v.reshape(-1, group.v.shape[-1])
    heads = len(group.reads)
    return Moments(
        queries=group.q @ group.q.transpose(0, 2, 1),
        keys=keys @ keys.T,
        spread=keys[:, :-1] @ keys[:, :-1].T,
        values=np.broadcast_to(values @ values.T, (heads, len(values), len(values))),
        means=np.broadcast_to(values[:, -1], (heads, len(values))),
    )


def complex_pairs(features: Array, pairs: Array) -> Array:
    """[..., D] -> [..., F], one complex number for each rotating pair."""
    return np.asarray(features[..., pairs[:, 0]] + 1j * features[..., pairs[:, 1]])


def complex_moment(moment: Array, members: int, pair: Array) -> Array:
    """[m, m], E[z z*] of one pair's complex keys out of their real second moment [m D, m D]."""
    dim = moment.shape[0] // members
    a, b = (np.arange(members) * dim + p for p in pair)
    real = moment[np.ix_(a, a)] + moment[np.ix_(b, b)]
    imaginary = moment[np.ix_(b, a)] - moment[np.ix_(a, b)]
    return np.asarray(real + 1j * imaginary)


def as_matrix(factor: complex) -> Array:
    """[2, 2]: multiplication by a complex number, on (real, imaginary)."""
    return np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])


def root(moment: Array) -> Array:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(moment)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def inverse_root(moment: Array, cut: float = 1e-10) -> Array:
    """Symmetric inverse square root; directions below `cut` of the largest eigenvalue are left out."""
    values, vectors = np.linalg.eigh(moment)
    kept = values > cut * max(float(values[-1]), 1e-300)
    inverse = np.where(kept, 1.0 / np.sqrt(np.where(kept, values, 1.0)), 0.0)
    return np.asarray((vectors * inverse) @ vectors.T)
