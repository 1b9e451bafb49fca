"""Merged heads refined against what the attention is to give: by turns the output projection, and all before it.

The joint merge is the best of its form for scores and for outputs apart from each other, and by moments alone. What
counts is Σ ‖y* - y‖² over the calibration's tokens, y* what the original attention gave and y what the merged heads
give of the student's activations. It is made smaller in turns:

- given queries, keys and values, the output projection is linear least squares (`refitted`);
- given the output projection, y is linearised around the merged heads (passes/attention_jacobian.py), and a change δ of
  queries, keys and values is sought together: Gauss-Newton, damped as by Levenberg and Marquardt,

      (JᵀJ + λ M) δ = Jᵀ (y* - y),

  by conjugate gradients, each step of which passes over the batches once and writes no matrix JᵀJ down.

M is what JᵀJ would be if the sides of each matrix had nothing to do with each other, a Kronecker product for each head
(values: output columns ⊗ attended values; keys: queries ⊗ keys; queries: keys ⊗ queries; as in K-FAC, arXiv
1503.05671), and both damps and preconditions. Changes of rotated operands are kept to those that commute with the
rotation. A step is taken in part where all of it does not help, and not at all where no part does. Right side and
decision are of all queries, JᵀJ and M of some of them where there are many: the gradient tells what to change, the
curvature how far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.activations import Activations
from passes.attention_jacobian import Features, Linearised, repeated, summed
from passes.dataflow import Array
from passes.site import AttentionSite
from passes.weights.conjugate_gradients import Vector, added, conjugate_gradients
from passes.weights.group import Blocks
from passes.weights.merge import Freedom, Merged
from passes.weights.projection import SiteWeights
from passes.weights.refit import Folded

ROUNDS = 2
"""Steps of Gauss-Newton, each with a refit behind it."""
STEPS = 8
"""Of conjugate gradients in each."""
DAMPING = 0.1
"""λ; M is as large as JᵀJ where the sides are independent."""
CURVED, EACH = 2048, 8
"""Queries whose JᵀJ stands for that of all: so many, and so many for each feature of a new head's stacked old ones."""
LENGTHS = (1.0, 0.5, 0.25, 0.1)
"""Parts of a step that are tried."""
_FLOOR = 1e-4
"""Part of the mean eigenvalue that is added to the sides of M, so that they can be inverted."""

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Refinement:
    """One attention with everything that stays fixed while it is refined.

    Attributes:
        weights: of the original; `keys`, `values`: its heads that each new key and value head stands for.
        seen: the student's activations, and `reference` what the output projection is to give, batch by batch.
    """

    site: AttentionSite
    weights: SiteWeights
    freedom: Freedom
    keys: Groups
    values: Groups
    seen: Sequence[Activations]
    reference: Sequence[Array]

    @property
    def operands(self) -> tuple[str, ...]:
        """What may change: "q" and "k" together, and "v"."""
        bends = any(m.kind in {"softcap", "temperature"} for m in self.site.modifiers)
        scores = ("q", "k") if self.freedom.keys is None and not bends else ()
        return (*scores, *(("v",) if self.freedom.values is None else ()))

    @property
    def blocks(self) -> Blocks:
        """What changes of queries and keys may combine."""
        return Blocks.of(self.site.head_dim, self.freedom.partner, self.freedom.slow)


def refined(job: Refinement, merged: Merged) -> Merged:
    """Heads that were merged jointly, their output projection refitted, and both as much nearer as they come."""
    merged = refitted(job.site, merged, job.seen, job.reference)
    if not job.operands:
        return merged
    features = [
        Features.of(look, job.weights, merged.order, (job.keys, job.values), tokens(job.site, look, wished))
        for look, wished in zip(job.seen, job.reference, strict=True)
    ]
    for _ in range(ROUNDS):
        there = _step(job, merged, features)
        if there is None:
            break
        merged = refitted(job.site, replace(merged, weights=there), job.seen, job.reference)
    return merged


def refitted(site: AttentionSite, merged: Merged, looked: Sequence[Activations], reference: Sequence[Array]) -> Merged:
    """The output projection that answers the merged heads best, near the one they have."""
    weights = merged.weights
    assert weights.out is not None
    equations = Folded()
    constant = weights.out_bias is not None
    for look, wished in zip(looked, reference, strict=True):
        features = look.merged(weights)[look.asking]
        if constant:
            features = np.concatenate([features, np.ones((len(features), 1), features.dtype)], axis=1)
        equations.add(features, tokens(site, look, wished)[look.asking])
    known = weights.out.transpose(1, 0, 2).reshape(weights.out.shape[1], -1)
    if weights.out_bias is not None:
        known = np.concatenate([known, weights.out_bias[:, None]], axis=1)
    solved = equations.solve(known, constant=constant)
    columns = solved[:, :-1] if constant else solved
    out = columns.reshape(len(columns), site.heads, -1).transpose(1, 0, 2)
    bias = solved[:, -1] if constant else None
    return replace(merged, weights=replace(weights, out=out, out_bias=bias), refitted=True)


def tokens(site: AttentionSite, look: Activations, output: Array) -> Array:
    """[B, S, E] out of the output projection's result in whatever order its rows are."""
    batch, count = look.asking.shape
    if site.q.batch_first:
        return output.reshape(batch, count, -1)
    return np.asarray(output.reshape(count, batch, -1).swapaxes(0, 1))


def _step(job: Refinement, merged: Merged, features: Sequence[Features]) -> SiteWeights | None:
    """One step of Gauss-Newton; None where no length of it helps."""
    weights, every = merged.weights, _every(features)
    points: list[Linearised] = []
    pulled: list[Vector] = []
    missed = 0.0
    for feature in features:
        point = Linearised.at(feature, weights)
        missed += point.missed
        pulled.append(point.pulled(point.left, job.operands))
        points.append(point.thinned(every) if every > 1 else point)
    metric = _Metric.at(job, points, weights)
    share = sum(int(f.look.asking.sum()) for f in features) / sum(int(p.counted.sum()) for p in points)

    def system(change: Vector) -> Vector:
        image = _total([p.pulled(p.moved(change), job.operands) for p in points])
        return added(metric.kept(image), metric.kept(metric.forward(change)), DAMPING)

    right = metric.kept({name: matrix / share for name, matrix in _total(pulled).items()})
    change = conjugate_gradients(system, right, lambda v: metric.kept(metric.backward(v)), STEPS)
    for length in LENGTHS:
        there = _changed(job, merged, change, length)
        if sum(Linearised.at(f, there).missed for f in features) < missed:
            return there
    return None


def _every(features: Sequence[Features]) -> int:
    """Which queries are enough for the curvature: each so manieth."""
    asking = sum(int(f.look.asking.sum()) for f in features)
    widest = max(features[0].keys.shape[-1], features[0].values.shape[-1])
    return max(1, asking // int(max(CURVED, EACH * widest)))


def _total(parts: Sequence[Vector]) -> Vector:
    first, *others = parts
    for other in others:
        first = added(first, other)
    return first


def _changed(job: Refinement, merged: Merged, change: Vector, length: float) -> SiteWeights:
    """The weights with this part of a change, which acts on rows of the original's."""
    old, new = job.weights, merged.weights

    def moved(role: str, weight: Array, rows: Array) -> Array:
        return weight + length * (change[role] @ rows) if role in change else weight

    def rows(heads: Array, groups: Groups) -> Array:
        return np.stack([heads[list(members)].reshape(-1, heads.shape[-1]) for members in groups])

    return replace(
        new,
        q=moved("q", new.q, old.q[list(merged.order)]),
        k=moved("k", new.k, rows(old.k, job.keys)),
        v=moved("v", new.v, rows(old.v, job.values)),
    )


@dataclass(frozen=True)
class _Metric:
    """M, for each operand as (left [N, D, D], right [N, f, f]), and what changes are kept to."""

    sides: dict[str, tuple[Array, Array]]
    inverse: dict[str, tuple[Array, Array]]
    blocks: Blocks

    @staticmethod
    def at(job: Refinement, points: Sequence[Linearised], weights: SiteWeights) -> _Metric:
        sides = {name: _sides(name, points, weights) for name in job.operands}
        sides = {name: (_floored(left), _floored(right)) for name, (left, right) in sides.items()}
        inverse = {name: (np.linalg.inv(left), np.linalg.inv(right)) for name, (left, right) in sides.items()}
        plain = _Metric(sides, inverse, job.blocks)
        size = {name: plain._size(name, points) for name in job.operands}
        return _Metric(
            {name: (left * size[name], right) for name, (left, right) in sides.items()},
            {name: (left / size[name], right) for name, (left, right) in inverse.items()},
            job.blocks,
        )

    def forward(self, change: Vector) -> Vector:
        return {name: self.sides[name][0] @ matrix @ self.sides[name][1] for name, matrix in change.items()}

    def backward(self, change: Vector) -> Vector:
        return {name: self.inverse[name][0] @ matrix @ self.inverse[name][1] for name, matrix in change.items()}

    def kept(self, change: Vector) -> Vector:
        """Without what would disturb a rotation."""
        return {name: matrix if name == "v" else self.blocks.commuting(matrix) for name, matrix in change.items()}

    def _size(self, name: str, points: Sequence[Linearised]) -> float:
        """JᵀJ of one operand in units of M, told by a random change."""
        left, right = (np.linalg.cholesky(side) for side in self.inverse[name])
        drawn = np.random.default_rng(0).standard_normal((len(left), left.shape[-1], right.shape[-1]))
        change = self.kept({name: left @ drawn @ right.transpose(0, 2, 1)})
        moved = sum(float((p.moved(change).astype(np.float64) ** 2).sum()) for p in points)
        return max(moved, 1e-30) / max(float((self.kept({name: drawn})[name] ** 2).sum()), 1e-30)


def _sides(name: str, points: Sequence[Linearised], weights: SiteWeights) -> tuple[Array, Array]:
    """Second moments on either side of an operand's changes, up to a factor."""
    if name == "v":
        assert weights.out is not None
        columns = weights.out.transpose(0, 2, 1) @ weights.out
        return summed(columns[None], len(weights.v))[0], _sum([_attended(p) for p in points])
    old = _sum([_moment(_seen(p, p.features.queries), p.counted) for p in points])
    if name == "q":
        keys = _sum([_spread(p, p.features.look.keys(weights)) for p in points])
        return repeated(keys[None], len(old))[0], old
    queries = _sum([_moment(_seen(p, p.features.look.queries(weights)), p.counted) for p in points])
    return summed(queries[None], len(weights.k))[0], _sum([_spread(p, p.features.keys) for p in points])


def _sum(moments: Sequence[Array]) -> Array:
    return np.asarray(sum(moments[1:], start=moments[0]))


def _seen(point: Linearised, queries: Array) -> Array:
    """[B, H, S, D]: those of the queries that the point has."""
    return queries[:, :, :: point.every]


def _moment(heads: Array, counted: Array) -> Array:
    """[N, f, f], float64, of [B, N, T, f] over the tokens that count [B, T]."""
    rows = np.asarray(heads.transpose(1, 0, 2, 3)[:, counted], dtype=np.float64)
    return np.asarray(rows.transpose(0, 2, 1) @ rows)


def _spread(point: Linearised, keys: Array) -> Array:
    """As `_moment`, around the mean of each sequence, which a softmax does not see."""
    shown = point.features.look.shown
    weight = shown[:, None, :, None] / np.maximum(shown.sum(axis=1), 1)[:, None, None, None]
    return _moment(keys - (keys * weight).sum(axis=2, keepdims=True), shown)


def _attended(point: Linearised) -> Array:
    """[N, m Dv, m Dv]: moments of the stacked values as each query head attends to them, added up."""
    values, heads = point.features.values, point.attention.shape[1]
    moments = _moment(point.attention @ repeated(values, heads), point.counted)
    return np.asarray(summed(moments[None], values.shape[1])[0])


def _floored(moment: Array) -> Array:
    """Positive definite."""
    size = moment.shape[-1]
    floor = _FLOOR * np.trace(moment, axis1=-2, axis2=-1) / size
    return np.asarray(moment + np.maximum(floor, 1e-30)[:, None, None] * np.eye(size))
