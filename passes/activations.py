"""One attention on one calibration batch: its operands before rotation, its softmax, and what new weights would give.

Everything is computed from the projections' inputs and the anchor's operands as the program computed them; rotations
are read off as what lies between the two. Shape legend: B batch, S queries, T keys, H query heads, N key/value heads,
D head_dim, Dv value_dim, F rotating pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from codegen.sight import Pattern, visible
from passes.dataflow import Array, Flow, Value
from passes.match.attention import Evidence
from passes.match.score_terms import apply_modifier
from passes.replay import recorded
from passes.site import AttentionSite, Operand
from passes.weights.group import Blocks, complex_pairs
from passes.weights.projection import SiteWeights

_HIDDEN = -1e4
"""Scores below are masked."""


def wanted(site: AttentionSite, evidence: Evidence) -> set[Value]:
    """Values that `Activations` needs of a batch."""
    path = evidence.path
    inputs = {o.projection.input for o in (site.q, site.k, site.v)}
    masks = {m.value for m in path.modifiers if m.value is not None}
    return inputs | {path.q.value, path.k.value} | masks


@dataclass(frozen=True)
class Activations:
    """What there is of one batch.

    Attributes:
        inputs: rows of q's, k's and v's projection inputs, [B, S or T, n + 1], the last feature 1.
        weights: [B, H, S, T], the original's softmax here.
        turns: for q and k the complex factor of each rotating pair, [B, S or T, F]; and of what does not rotate.
        shown: [B, T], keys that some query sees; asking: [B, S], queries that count.
        pattern: which of the keys queries see after the rewrite; empty where that does not change.
    """

    site: AttentionSite
    flow: Flow
    evidence: Evidence
    inputs: tuple[Array, Array, Array]
    weights: Array
    turns: tuple[tuple[Array, float], tuple[Array, float]]
    shown: Array
    asking: Array
    pattern: Pattern = ()

    def queries(self, weights: SiteWeights) -> Array:
        """[B, H, S, D] before rotation, with these weights; likewise `keys` and `values` [B, N, T, ...]."""
        return _heads(self.inputs[0], weights.q)

    def keys(self, weights: SiteWeights) -> Array:
        return _heads(self.inputs[1], weights.k)

    def values(self, weights: SiteWeights) -> Array:
        return _heads(self.inputs[2], weights.v)

    def merged(self, weights: SiteWeights) -> Array:
        """[B, S, H * Dv]: what the output projection reads if the site has these weights.

        Where a norm stands between projection and score, the original's softmax stands in for the new one.
        """
        values = self.values(weights)
        heads = self.weights.shape[1]
        index = np.arange(heads) // (heads // values.shape[1])
        attention = self.weights if self.site.bent else self._attention(weights)
        attention = narrowed(attention, self.pattern) if self.pattern else attention
        output = attention @ values[:, index]
        return np.asarray(output.transpose(0, 2, 1, 3).reshape(output.shape[0], output.shape[2], -1))

    def _attention(self, weights: SiteWeights) -> Array:
        query, keys = self.turned_queries(self.queries(weights)), self.turned_keys(self.keys(weights))
        heads = query.shape[1]
        return self.softmax(query, keys[:, np.arange(heads) * keys.shape[1] // heads])

    def softmax(self, query: Array, keys: Array) -> Array:
        """[B, H, S, T], of rotated queries [B, H, S, D] and keys [B, H, T, D]."""
        return _softmax(self.flow, self.evidence, query, keys)

    def turned_queries(self, query: Array, *, back: bool = False) -> Array:
        """[B, heads, S, D] rotated (and scaled) as the program does, or by the adjoint of that; likewise keys."""
        return self._turned(query, 0, back)

    def turned_keys(self, keys: Array, *, back: bool = False) -> Array:
        return self._turned(keys, 1, back)

    def _turned(self, plain: Array, which: int, back: bool) -> Array:
        factors, gain = self.turns[which]
        return _turned(plain, _pairs(self.site.k), factors.conj() if back else factors, gain)

    def largest_turn(self) -> Array:
        """[F]: how far each pair turns over the keys of this batch, in radians; 0 to pi."""
        factors = self.turns[1][0]
        return np.asarray(np.abs(np.angle(factors * factors[:, :1].conj())).max(axis=(0, 1), initial=0.0))


def activations(
    flow: Flow, site: AttentionSite, evidence: Evidence, weights: SiteWeights, seen: Mapping[Value, Array]
) -> Activations:
    """Look at one batch; `weights` are the site's own."""
    here = replace(flow, read=lambda name: seen[name] if name in seen else flow.read(name))
    q, k, attention = _scored(here, evidence)
    batch, heads = q.shape[:2]
    inputs = tuple(_by_token(seen[o.projection.input], o, batch) for o in (site.q, site.k, site.v))
    distinct = [site.group.index(n) * k.shape[1] // heads for n in range(site.kv_heads)]
    pairs = _pairs(site.k)
    turns = (
        _turns(_heads(inputs[0], weights.q), q, pairs, site.bent),
        _turns(_heads(inputs[1], weights.k), k[:, distinct], pairs, site.bent),
    )
    shown = attention.max(axis=(1, 2)) > 1e-12
    same = inputs[0].shape == inputs[1].shape and not site.cross
    asking = shown if same else np.ones((batch, q.shape[2]), dtype=bool)
    return Activations(site, here, evidence, (inputs[0], inputs[1], inputs[2]), attention, turns, shown, asking)


def _scored(flow: Flow, evidence: Evidence) -> tuple[Array, Array, Array]:
    """Queries and keys as `flow` has them at the scores, float32 [B, heads, tokens, D], and the softmax of these."""
    q, k = (
        np.asarray(recorded(flow, view, traced.tokens), dtype=np.float32)
        for view, traced in ((evidence.path.q, evidence.q), (evidence.path.k, evidence.k))
    )
    heads = q.shape[1]
    return q, k, _softmax(flow, evidence, q, k[:, np.arange(heads) * k.shape[1] // heads])


def attending(flow: Flow, evidence: Evidence) -> Array:
    """[B, T]: keys that some query sees, by the operands that `flow` has at the scores."""
    _, _, attention = _scored(flow, evidence)
    return np.asarray(attention.max(axis=(1, 2)) > 1e-12)


def projected(site: AttentionSite, weights: SiteWeights, look: Activations, like: Array) -> Array:
    """What the output projection gives with these weights, laid out as the program has it."""
    assert weights.out is not None
    columns = weights.out.transpose(1, 0, 2).reshape(weights.out.shape[1], -1)
    result = look.merged(weights) @ columns.T.astype(np.float32)
    if weights.out_bias is not None:
        result = result + weights.out_bias.astype(np.float32)
    ordered = result if site.q.batch_first else result.swapaxes(0, 1)
    return np.asarray(ordered.reshape(like.shape))


def narrowed(weights: Array, pattern: Pattern) -> Array:
    """Softmax weights [B, H, S, T] when only some keys are seen; what sinks among the scores took they go on taking."""
    heads, queries, keys = weights.shape[1:]
    rows, columns = np.arange(keys - queries, keys)[:, None], np.arange(keys)
    sights = [visible(sight, rows, columns) for sight in pattern]
    shown = np.stack([sights[head % len(sights)] for head in range(heads)])
    elsewhere = 1 - weights.sum(axis=-1, keepdims=True)
    left = weights * shown
    total = left.sum(axis=-1, keepdims=True) + elsewhere
    return np.asarray(left / np.maximum(total, np.float32(1e-30)))


def _by_token(x: Array, operand: Operand, batch: int) -> Array:
    """[B, tokens, n + 1] with a last feature of 1, from a projection's input in whatever order its rows have."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
    wide = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
    if operand.batch_first:
        return wide.reshape(batch, -1, wide.shape[-1])
    return wide.reshape(-1, batch, wide.shape[-1]).swapaxes(0, 1)


def _heads(inputs: Array, weights: Array) -> Array:
    """[B, heads, tokens, D]."""
    flat = inputs @ weights.reshape(-1, weights.shape[-1]).T.astype(np.float32)
    return np.asarray(flat.reshape(*flat.shape[:2], weights.shape[0], -1).transpose(0, 2, 1, 3))


def _pairs(operand: Operand) -> Array:
    return Blocks.of(operand.dim, None if operand.rotary is None else operand.rotary.partner).pairs


def _turns(plain: Array, anchor: Array, pairs: Array, normed: bool) -> tuple[Array, float]:
    """(complex factor [B, tokens, F] of each pair, factor of the rest), from operands before and at the anchor."""
    if normed:
        return np.ones((plain.shape[0], plain.shape[2], len(pairs)), np.complex64), 1.0
    before, after = complex_pairs(plain, pairs), complex_pairs(anchor, pairs)
    energy = (np.abs(before) ** 2).sum(axis=1)
    factors = (after * before.conj()).sum(axis=1) / np.maximum(energy, 1e-30)
    rest = [d for d in range(plain.shape[-1]) if d not in set(pairs.reshape(-1).tolist())]
    size = float((plain[..., rest] ** 2).sum())
    gain = float((plain[..., rest] * anchor[..., rest]).sum()) / size if size > 0 else 1.0
    return factors.astype(np.complex64), gain


def _turned(plain: Array, pairs: Array, factors: Array, gain: float) -> Array:
    out = plain * np.float32(gain)
    turned = complex_pairs(plain, pairs) * factors[:, None]
    out[..., pairs[:, 0]], out[..., pairs[:, 1]] = turned.real, turned.imag
    return out


def _softmax(flow: Flow, evidence: Evidence, query: Array, keys: Array) -> Array:
    """[B, H, S, T], float32; rows that are masked everywhere give zeros, columns of sinks are dropped."""
    scores = (query @ keys.swapaxes(-1, -2)) * np.float32(evidence.path.scale)
    for modifier in evidence.path.modifiers:
        scores = np.asarray(apply_modifier(flow, modifier, scores), dtype=np.float32)
    top = scores.max(axis=-1, keepdims=True)
    alive = top > _HIDDEN
    scores -= np.where(np.isfinite(top), top, np.float32(0))
    np.exp(scores, out=scores)
    scores *= alive / np.maximum(scores.sum(axis=-1, keepdims=True), np.float32(1e-30))
    return scores[..., : keys.shape[2]]
