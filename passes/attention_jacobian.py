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

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.activations import Activations
from passes.dataflow import Array
from passes.weights.conjugate_gradients import Vector
from passes.weights.projection import SiteWeights

_QUERIES = 128
"""That are worked on at a time."""


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
        spans: which queries attend to which keys, by stretches of queries.
        every: of the queries only each so manieth is there, and S counts these; see `thinned`.
    """

    features: Features
    attention: Array
    queries: Array
    keys: Array
    values: Array
    out: Array
    left: Array
    spans: tuple[tuple[slice, slice], ...]
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
        return Linearised(features, attention, queries, keys, values, out, left, _spans(attention))

    def thinned(self, every: int) -> Linearised:
        """The same of each so manieth query: neighbours see nearly the same, and cost as much."""
        attention, queries = (np.ascontiguousarray(x[:, :, ::every]) for x in (self.attention, self.queries))
        return replace(
            self, attention=attention, queries=queries, left=self.left[:, ::every], spans=_spans(attention), every=every
        )

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
        look, old = self.features.look, self.features
        queries = look.turned_queries(_act(narrow["q"], old.queries))[:, :, :: self.every] if "q" in narrow else None
        keys = look.turned_keys(_act(narrow["k"], old.keys)) if "k" in narrow else None
        values = _act(narrow["v"], old.values) if "v" in narrow else None
        attended = np.zeros((*self.attention.shape[:3], self.values.shape[-1]), np.float32)
        for at, asking, shown in self._parts():
            attention, here = self.attention[*at, asking, shown], attended[*at, asking]
            if values is not None:
                here += attention @ values[*self._shared(at, values), shown]
            scores = np.zeros_like(attention)
            if queries is not None:
                scores += queries[*at, asking] @ self.keys[*at, shown].T
            if keys is not None:
                scores += self.queries[*at, asking] @ keys[*self._shared(at, keys), shown].T
            if queries is not None or keys is not None:
                here += self._through_softmax(attention, scores) @ self.values[*at, shown]
        moved: Array = (flat(attended) @ self.out) * self.counted[..., None]
        return moved

    def pulled(self, left: Array, operands: Collection[str]) -> Vector:
        """The adjoint of `moved`: from [B, S, E] to changes of these operands, float64."""
        look, old, heads = self.features.look, self.features, self.attention.shape[1]
        by_head = (left @ self.out.T).reshape(*left.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        queries = np.zeros((*old.queries.shape[:3], self.keys.shape[-1]), np.float32)
        keys = np.zeros((*old.keys.shape[:3], self.keys.shape[-1]), np.float32)
        values = np.zeros((*old.values.shape[:3], self.values.shape[-1]), np.float32)
        thin = queries[:, :, :: self.every]
        for at, asking, shown in self._parts():
            attention, wished = self.attention[*at, asking, shown], by_head[*at, asking]
            if "v" in operands:
                values[*self._shared(at, values), shown] += attention.T @ wished
            if "q" in operands or "k" in operands:
                scores = self._through_softmax(attention, wished @ self.values[*at, shown].T)
                thin[*at, asking] = scores @ self.keys[*at, shown]
                keys[*self._shared(at, keys), shown] += scores.T @ self.queries[*at, asking]
        found = {
            "q": lambda: _outer(look.turned_queries(queries, back=True), old.queries),
            "k": lambda: _outer(look.turned_keys(keys, back=True), old.keys),
            "v": lambda: _outer(values, old.values),
        }
        return {name: found[name]() for name in ("v", "q", "k") if name in operands}

    def _parts(self) -> Iterator[tuple[tuple[int, int], slice, slice]]:
        """(sequence, head), some queries, and the keys that they attend to: small enough for the nearest caches."""
        batch, heads = self.attention.shape[:2]
        for at in itertools.product(range(batch), range(heads)):
            for asking, shown in self.spans:
                yield at, asking, shown

    def _shared(self, at: tuple[int, int], heads: Array) -> tuple[int, int]:
        """Where of [B, N, ...] the head is that a query head of all reads."""
        return at[0], at[1] * heads.shape[1] // self.attention.shape[1]

    def _through_softmax(self, attention: Array, scores: Array) -> Array:
        """The softmax's derivative, symmetric, and the scale before it; `scores` are used up."""
        scores *= attention
        scores -= attention * scores.sum(axis=-1, keepdims=True)
        scores *= np.float32(self.features.look.evidence.path.scale)
        return scores


def _spans(attention: Array) -> tuple[tuple[slice, slice], ...]:
    """Some queries of [B, H, S, T] at a time, with the keys from the first to the last that any of them attends to.

    Of a causal order that leaves half of all pairs out.
    """
    found = []
    for start in range(0, attention.shape[2], _QUERIES):
        asking = slice(start, start + _QUERIES)
        shown = np.flatnonzero(attention[:, :, asking].max(axis=(0, 1, 2), initial=0.0))
        if len(shown):
            found.append((asking, slice(int(shown[0]), int(shown[-1]) + 1)))
    return tuple(found)


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
