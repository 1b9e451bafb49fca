"""How an attention's output moves with its queries, keys and values, on one batch: products with the Jacobian.

With rotated queries q and keys k, softmax rows p of the scores, values v, and output columns O_h of each head, the
output projection gives y = Σ_h O_h Σ_t p_ht v_t. To first order

    dy = Σ_h O_h Σ_t (p_ht dv_t + p_ht (ds_ht - Σ_u p_hu ds_hu) v_t),     ds_ht = scale (dq_h k_t + q_h dk_t),

whatever is added to the scores. Changes are matrices on projected features, as merges are (passes/weights/joint.py):
dq_h = Q_h q'_h, dk = K k', dv = V v', where q' are the original's queries and k', v' the stacked keys and values of the
heads that a new one stands for.

Shape legend as in passes/activations.py; m D and m Dv are widths of the stacked heads, E the model's width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.activations import Activations
from passes.dataflow import Array
from passes.weights.conjugate_gradients import Vector
from passes.weights.projection import SiteWeights


@dataclass(frozen=True)
class Features:
    """What changes act on, float32.

    Attributes:
        queries: [B, H, S, D] of the original, in the new order of heads, before rotation.
        keys, values: [B, N, T, m D] and [B, N, T, m Dv], the original's, stacked for each new head.
        wished: [B, S, E], what the output is to be.
    """

    look: Activations
    queries: Array
    keys: Array
    values: Array
    wished: Array

    @staticmethod
    def of(
        look: Activations,
        weights: SiteWeights,
        order: Sequence[int],
        groups: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
        wished: Array,
    ) -> Features:
        """`weights` are the original's, `groups` the heads that each new key head and value head stands for."""
        keys, values = look.keys(weights), look.values(weights)
        return Features(
            look,
            look.queries(weights)[:, list(order)],
            np.stack([flat(keys[:, list(members)]) for members in groups[0]], axis=1),
            np.stack([flat(values[:, list(members)]) for members in groups[1]], axis=1),
            np.asarray(wished, dtype=np.float32),
        )


@dataclass(frozen=True)
class Linearised:
    """An attention around some weights, on one batch.

    Attributes:
        attention: [B, H, S, T]; queries, keys, values: [B, H, tokens, ...], rotated, one for each query head.
        out: [H Dv, E].
        left: [B, S, E], wished less given; zero where no query counts.
        every: of the queries only each so manieth is there, and S counts these; see `thinned`.
    """

    features: Features
    attention: Array
    queries: Array
    keys: Array
    values: Array
    out: Array
    left: Array
    every: int = 1

    @staticmethod
    def at(features: Features, weights: SiteWeights) -> Linearised:
        """Around `weights`, which have an output projection."""
        assert weights.out is not None
        look, heads = features.look, len(weights.q)
        queries = look.turned_queries(look.queries(weights))
        keys = repeated(look.turned_keys(look.keys(weights)), heads)
        values = repeated(look.values(weights), heads)
        attention = look.weights if look.site.bent else look.softmax(queries, keys)
        out = weights.out.transpose(0, 2, 1).reshape(-1, weights.out.shape[1]).astype(np.float32)
        given = flat(attention @ values) @ out
        if weights.out_bias is not None:
            given = given + weights.out_bias.astype(np.float32)
        left = (features.wished - given) * look.asking[..., None]
        return Linearised(features, attention, queries, keys, values, out, left)

    def thinned(self, every: int) -> Linearised:
        """The same of each so manieth query: neighbours see nearly the same, and cost as much."""
        attention, queries = (np.ascontiguousarray(x[:, :, ::every]) for x in (self.attention, self.queries))
        return replace(self, attention=attention, queries=queries, left=self.left[:, ::every], every=every)

    @property
    def counted(self) -> Array:
        """[B, S], queries that count."""
        return self.features.look.asking[:, :: self.every]

    @property
    def missed(self) -> float:
        """Energy of what is left."""
        return float((self.left.astype(np.float64) ** 2).sum())

    def moved(self, change: Vector) -> Array:
        """[B, S, E]: the output's first-order change."""
        narrow = {name: matrix.astype(np.float32) for name, matrix in change.items()}
        look, old, heads = self.features.look, self.features, self.attention.shape[1]
        attended = np.zeros((*self.attention.shape[:3], self.values.shape[-1]), np.float32)
        if "v" in narrow:
            attended += self.attention @ repeated(_act(narrow["v"], old.values), heads)
        if "q" in narrow or "k" in narrow:
            scores = np.zeros_like(self.attention)
            if "q" in narrow:
                turned = look.turned_queries(_act(narrow["q"], old.queries))[:, :, :: self.every]
                scores += turned @ self.keys.swapaxes(-1, -2)
            if "k" in narrow:
                turned = repeated(look.turned_keys(_act(narrow["k"], old.keys)), heads)
                scores += self.queries @ turned.swapaxes(-1, -2)
            attended += self._through_softmax(scores) @ self.values
        moved: Array = (flat(attended) @ self.out) * self.counted[..., None]
        return moved

    def pulled(self, left: Array, operands: Collection[str]) -> Vector:
        """The adjoint of `moved`: from [B, S, E] to changes of these operands, float64."""
        look, old, heads = self.features.look, self.features, self.attention.shape[1]
        by_head = (left @ self.out.T).reshape(*left.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        found: Vector = {}
        if "v" in operands:
            found["v"] = _outer(summed(self.attention.swapaxes(-1, -2) @ by_head, old.values.shape[1]), old.values)
        if "q" in operands or "k" in operands:
            scores = self._through_softmax(by_head @ self.values.swapaxes(-1, -2))
            if "q" in operands:
                turned = np.zeros((*old.queries.shape[:3], self.keys.shape[-1]), np.float32)
                turned[:, :, :: self.every] = scores @ self.keys
                found["q"] = _outer(look.turned_queries(turned, back=True), old.queries)
            if "k" in operands:
                keys = summed(scores.swapaxes(-1, -2) @ self.queries, old.keys.shape[1])
                found["k"] = _outer(look.turned_keys(keys, back=True), old.keys)
        return found

    def _through_softmax(self, scores: Array) -> Array:
        """The softmax's derivative, symmetric, and the scale before it."""
        weighted = self.attention * scores
        weighted -= self.attention * weighted.sum(axis=-1, keepdims=True)
        return np.asarray(weighted * np.float32(self.features.look.evidence.path.scale))


def flat(heads: Array) -> Array:
    """[B, H, S, D] -> [B, S, H D]."""
    return np.asarray(heads.transpose(0, 2, 1, 3).reshape(heads.shape[0], heads.shape[2], -1))


def repeated(heads: Array, count: int) -> Array:
    """[B, N, ...] -> [B, count, ...], each head for its group."""
    return heads[:, np.arange(count) * heads.shape[1] // count]


def summed(heads: Array, count: int) -> Array:
    """[B, H, ...] -> [B, count, ...], the sum over each group: the adjoint of `repeated`."""
    return np.asarray(heads.reshape(len(heads), count, -1, *heads.shape[2:]).sum(axis=2))


def _act(matrices: Array, features: Array) -> Array:
    """[N, D, f] on [B, N, T, f]."""
    return np.asarray(features @ matrices.transpose(0, 2, 1))


def _outer(left: Array, right: Array) -> Array:
    """[N, D, f], float64: products of [B, N, T, D] and [B, N, T, f], summed over tokens."""
    a, b = (x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1, x.shape[-1]) for x in (left, right))
    return np.asarray(a.transpose(0, 2, 1) @ b, dtype=np.float64)
