"""Gated attention units out of trained weights: one in an attention's place, one in a feed-forward's.

A unit (arXiv 2202.10447) is ``W_o (U ⊙ A V)`` with ``A = relu(q kᵀ / n + bias)²``, where query and key of a token are
scales and offsets of one vector z. Everything here is weights in, weights out; biases are the last column of matrices.

**One score for all heads.** Heads score tokens by x̃ᵢᵀ M_h x̃ⱼ with M_h = scale · W_q,hᵀ W_k,h and x̃ = [x; 1]. A unit
has one score, so the mean M of all heads stands for them. Rotations are left out of M; what depends on distance alone
is the bias's part.

**The shared base.** With z = Z x, scales g and offsets b a score is Σ_r (gq_r zᵢ_r + bq_r)(gk_r zⱼ_r + bk_r). Its
bilinear part Zᵀ diag(gq gk) Z is symmetric, whatever Z is, so the best it can do is the symmetric part of M. For tokens
with second moment C the mean squared error of scores is that of C^½ M_s C^½, of which the eigenvectors with the largest
eigenvalues, in magnitude, are the best subspace: Z = Vᵀ C^-½, gq gk = λ. What is linear in the query is the same for
all keys, to which a softmax is blind, and goes; what is linear in the key is a feature of z with gq = 0 and bq = 1.

**From the softmax to a square.** exp(s) and (1 + s / 2)² agree in value and slope at 0. Weights p_d that a token would
give by distance alone (a profile) become with scores √p_d + c s, squared: p_d (1 + 2 c s / √p_d + …), which is
softmax's p_d (1 + s) for c = √p_d / 2. A unit has one c for all distances: that of the profile's mean weight.

**A feed-forward is a unit that looks at no other token**: with scores 0 and a bias of 1 at distance 0, A is the
identity and W_o (U ⊙ V) what is left, with U = act(W_gate x) and V = W_up x, or V = 1 where nothing is gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array
from passes.weights.projection import SiteWeights


@dataclass(frozen=True)
class ScoreSubspace:
    """Attributes:
    base: [r, n + 1], rows of Z; the last column, of the constant, is zero.
    strength: [r], the eigenvalue of each row, largest magnitude first.
    key: [n + 1], what is added to a score by its key alone; likewise.
    explained: part of the mean squared symmetric score (of the part that depends on both tokens) that is kept.
    """

    base: Array
    strength: Array
    key: Array
    explained: float

    def scores(self, hidden: Array) -> Array:
        """[..., S, S] of [..., S, n]: row i, column j."""
        z = hidden @ self.base[:, :-1].T
        return np.asarray((z * self.strength) @ z.swapaxes(-1, -2) + (hidden @ self.key[:-1])[..., None, :])


def mean_score_map(weights: SiteWeights, group: Sequence[int], scale: float) -> Array:
    """[n + 1, n + 1]: the mean of W_q,hᵀ W_k,h over query heads, times the scale."""
    pairs = [weights.q[h].T @ weights.k[g] for h, g in enumerate(group)]
    return np.asarray(scale * np.mean(pairs, axis=0))


def score_subspace(score_map: Array, size: int, moment: Array | None = None) -> ScoreSubspace:
    """The best `size` features for scores x̃ᵢᵀ M x̃ⱼ.

    Args:
        score_map: M, [n + 1, n + 1].
        moment: [n, n], the second moment of x; None for uncorrelated features of equal size.
    """
    symmetric = (score_map + score_map.T)[:-1, :-1] / 2
    root, inverse = _roots(np.eye(len(symmetric)) if moment is None else moment)
    values, vectors = np.linalg.eigh(root @ symmetric @ root)
    order = np.argsort(-np.abs(values), kind="stable")[:size]
    rows = vectors[:, order].T @ inverse
    total = float((values**2).sum())
    explained = float((values[order] ** 2).sum()) / total if total > 0 else 1.0
    constant = np.zeros((len(rows), 1))
    key = np.append(score_map[-1, :-1], 0.0)
    return ScoreSubspace(np.concatenate([rows, constant], axis=1), values[order], key, explained)


def _roots(moment: Array) -> tuple[Array, Array]:
    """C^½ and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(moment)
    sizes = np.sqrt(np.maximum(values, 0.0))
    usable = sizes > 1e-7 * max(float(sizes.max(initial=0.0)), 1e-30)
    inverse = np.where(usable, 1 / np.where(usable, sizes, 1.0), 0.0)
    return (vectors * sizes) @ vectors.T, (vectors * inverse) @ vectors.T


# ------------------------------------------------------------------ profiles


def harmonic_profile(span: int, *, causal: bool) -> Array:
    """[2 span - 1]: the weight of each distance from 1 - span up, falling with 1 / (1 + distance), of sum 1.

    Causal weights are those of earlier keys alone, at distances from 0 up. The nearest of them have most of the sum
    already, so that tokens with few keys before them are not far from a sum of 1 either.
    """
    distance = np.abs(np.arange(1 - span, span))
    weight = 1.0 / (1 + distance)
    if causal:
        weight[: span - 1] = 0.0
    return np.asarray(weight / weight.sum())


# ------------------------------------------------------------------ units


def attention_unit(
    weights: SiteWeights, group: Sequence[int], subspace: ScoreSubspace, profile: Array, divisor: int, base: int
) -> dict[str, Array]:
    """Operands of a unit in an attention's place, float64, by role; `heads` of scale and offset are query and key.

    Gates are 1 (weights 0, bias 1), values are the heads' side by side, the output projection is the attention's.

    Args:
        profile: [2 span - 1], from `harmonic_profile`.
        divisor: n.
        base: features of z; the first is for keys alone, `subspace` has at most base - 1, those left over are zero.
    """
    assert weights.out is not None
    expanded, width = weights.out.shape[0] * weights.out.shape[2], weights.q.shape[-1]
    values = np.concatenate([weights.v[g] for g in group])
    gates = np.zeros((expanded, width))
    gates[:, -1] = 1.0
    latent = np.zeros((base, width))
    latent[0], latent[1 : 1 + len(subspace.base)] = subspace.key, subspace.base
    strength = _slope(profile) * divisor
    scale, offset = np.zeros((2, base)), np.zeros((2, base))
    offset[0, 0], scale[1, 0] = strength, 1.0
    used = slice(1, 1 + len(subspace.base))
    sizes = np.sqrt(strength * np.abs(subspace.strength))
    scale[0, used], scale[1, used] = np.sign(subspace.strength) * sizes, sizes
    out = weights.out.transpose(1, 0, 2).reshape(weights.out.shape[1], expanded)
    bias = np.zeros(len(out)) if weights.out_bias is None else weights.out_bias
    return _operands(np.concatenate([gates, values, latent]), scale, offset, out, bias) | {
        "distances": np.sqrt(profile)
    }


def _slope(profile: Array) -> float:
    """c: half the root of the profile's mean weight, where it has any."""
    return 0.5 * float(np.sqrt(profile[profile > 0].mean()))


def feed_forward_unit(
    up: Array, gate: Array | None, down: Array, down_bias: Array | None, latent: Array, span: int, seen: float = 0.0
) -> dict[str, Array]:
    """Operands of a unit in a feed-forward's place, float64, by role; the activation is the spec's.

    Args:
        up: [F, n + 1], what is activated, or where there is a gate multiplied by the activated gate.
        gate: [F, n + 1] or None.
        down: [E, F]; down_bias: [E] or None.
        latent: [N, n + 1], a base that training may make use of; queries are 0, keys are z.
        seen: bias at all other distances. 0 is the feed-forward exactly, but a score of 0 gets no gradient, since the
            slope of its square is 0; a little more than 0 lets training find other tokens, and adds its square times
            their values.
    """
    if gate is None:
        gate, up = up, np.zeros_like(up)
        up[:, -1] = 1.0
    scale = np.stack([np.zeros(len(latent)), np.ones(len(latent))])
    distances = np.full(2 * span - 1, seen)
    distances[span - 1] = 1.0
    bias = np.zeros(len(down)) if down_bias is None else down_bias
    whole = np.concatenate([gate, up, latent])
    return _operands(whole, scale, np.zeros_like(scale), down, bias) | {"distances": distances}


def _operands(whole: Array, scale: Array, offset: Array, out: Array, bias: Array) -> dict[str, Array]:
    return {
        "expand_weight": np.ascontiguousarray(whole[:, :-1]),
        "expand_bias": np.ascontiguousarray(whole[:, -1]),
        "scale": scale,
        "offset": offset,
        "out_weight": np.ascontiguousarray(out),
        "out_bias": np.asarray(bias, dtype=np.float64),
    }


def chunked(operands: dict[str, Array], far: float) -> dict[str, Array]:
    """The same for mixed chunk attention, whose four heads are quadratic and linear queries, then keys.

    Every token of another chunk gets the score `far`, by the offsets of the first feature. All other linear queries are
    0 and linear keys are z, of which training may make use.
    """
    scale, offset = operands["scale"], operands["offset"]
    query, key = np.zeros_like(offset[0]), np.zeros_like(offset[0])
    query[0], key[0] = far, 1.0
    keys = np.ones_like(query)
    keys[0] = 0.0
    scales = np.stack([scale[0], np.zeros_like(query), scale[1], keys])
    return operands | {"scale": scales, "offset": np.stack([offset[0], query, offset[1], key])}
