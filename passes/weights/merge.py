"""One attention's heads merged group by group: which merge each operand allows, and the new weights.

Merging keys turns queries, and merging values changes what the output projection reads; an operand for which that is
not possible is averaged instead, and the merge says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from passes.dataflow import Array
from passes.weights.alignment import align_keys, align_values
from passes.weights.group import Blocks, Group, KeyMerge, Moments, ValueMerge, weight_moments
from passes.weights.joint import join_keys, join_values
from passes.weights.projection import SiteWeights

Method = Literal["mean", "aligned", "joint"]

METHODS: tuple[Method, ...] = ("mean", "aligned", "joint")

EXACT = 4e-12
"""Part of a group's energy that roundings of float32 weights account for: (16 units in the last place) squared."""


@dataclass(frozen=True)
class Freedom:
    """What may be done to one attention beyond averaging.

    Attributes:
        partner: as in `Rotary`; None without rotation.
        keys, values: why the operand can only be averaged; None if it can be merged otherwise.
        centred: scores go straight into a softmax.
        slow: rotating features that are treated as if they did not, pair by pair, slowest first.
        order: why query heads cannot change places; None if they can, so that any heads may form a group.
    """

    partner: tuple[int, ...] | None = None
    keys: str | None = None
    values: str | None = None
    centred: bool = True
    slow: tuple[int, ...] = ()
    order: str | None = None


@dataclass(frozen=True)
class Merged:
    """New weights of one attention, float64; as `SiteWeights` with fewer key/value heads.

    Attributes:
        weights: query heads in the order of `order`.
        order: the old query head at each new place.
        lost_keys, lost_values: worst over groups of what a merge of this form could not keep; None where averaged.
        notes: operands that were averaged, and why; under "order" why no other heads than neighbours form groups.
        refitted: the output projection has been refitted since.
        sampled: losses are of calibration data; other inputs may lose more.
    """

    weights: SiteWeights
    order: tuple[int, ...]
    lost_keys: float | None
    lost_values: float | None
    notes: Mapping[str, str] = field(default_factory=dict)
    refitted: bool = False
    sampled: bool = False

    @property
    def in_place(self) -> bool:
        """Whether every query head stands where it stood."""
        return self.order == tuple(range(len(self.order)))

    @property
    def moves_output(self) -> bool:
        """Whether the output projection changes."""
        return self.refitted or self.lost_values is not None

    @property
    def combined(self) -> tuple[str, ...]:
        """Operands whose features were combined within heads; the others were averaged."""
        losses = (("keys", self.lost_keys), ("values", self.lost_values))
        return tuple(operand for operand, lost in losses if lost is not None)

    @property
    def exact(self) -> bool:
        """Whether nothing but roundings is lost, on whatever input."""
        losses = (self.lost_keys, self.lost_values)
        return not self.sampled and all(lost is not None and lost <= EXACT for lost in losses)


def contiguous(kv_heads: int, groups: int) -> tuple[tuple[int, ...], ...]:
    """Key/value heads of each group, neighbours together."""
    size = kv_heads // groups
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))


def readers(groups: Sequence[Sequence[int]], group: Sequence[int]) -> list[list[int]]:
    """For each group the query heads that read it; `group` is the key/value head of each query head."""
    return [[h for kv in members for h in range(len(group)) if group[h] == kv] for members in groups]


def cut(weights: SiteWeights, members: Sequence[int], heads: Sequence[int], group: Sequence[int]) -> Group:
    """One group's part of an attention."""
    place = {kv: i for i, kv in enumerate(members)}
    return Group(
        q=weights.q[list(heads)],
        k=weights.k[list(members)],
        v=weights.v[list(members)],
        out=None if weights.out is None else weights.out[list(heads)],
        reads=tuple(place[group[h]] for h in heads),
    )


def merge_heads(
    weights: SiteWeights,
    group: Sequence[int],
    groups: Sequence[Sequence[int]],
    method: Method,
    freedom: Freedom,
    moments: Sequence[Moments] | None = None,
) -> Merged:
    """Merge an attention's key/value heads.

    Args:
        group: for each query head the key/value head it reads.
        groups: key/value heads of each new head, all of one size; see `contiguous`.
        moments: statistics of each group, `weight_moments` if None.

    Raises ValueError for groups of different sizes.
    """
    if len({len(members) for members in groups}) != 1:
        raise ValueError("groups must be of one size")
    reading = readers(groups, group)
    parts = [cut(weights, m, h, group) for m, h in zip(groups, reading, strict=True)]
    known = [weight_moments(p) for p in parts] if moments is None else list(moments)
    notes = _notes(weights, method, freedom)
    keys = [_keys(p, m, method, freedom) for p, m in zip(parts, known, strict=True)]
    values = [_values(p, m, method, freedom, weights) for p, m in zip(parts, known, strict=True)]
    order = [h for heads in reading for h in heads]
    merged = SiteWeights(
        q=_in_order([k.query @ p.q for k, p in zip(keys, parts, strict=True)]),
        k=np.stack([k.key @ p.k.reshape(-1, p.k.shape[-1]) for k, p in zip(keys, parts, strict=True)]),
        v=np.stack([v.value @ p.v.reshape(-1, p.v.shape[-1]) for v, p in zip(values, parts, strict=True)]),
        out=None if weights.out is None else _in_order([v.out for v in values]),
        out_bias=None if weights.out_bias is None else weights.out_bias + sum(v.offset for v in values),
    )
    lost_keys = None if "keys" in notes or method == "mean" else max(k.lost for k in keys)
    lost_values = None if "values" in notes or method == "mean" else max(v.lost for v in values)
    return Merged(merged, tuple(order), lost_keys, lost_values, notes, sampled=moments is not None)


def _notes(weights: SiteWeights, method: Method, freedom: Freedom) -> dict[str, str]:
    if method == "mean":
        return {}
    values = freedom.values
    if values is None and weights.out is None:
        values = "no output projection reads the heads in order"
    found = (("keys", freedom.keys), ("values", values))
    return {operand: reason for operand, reason in found if reason is not None}


def _keys(group: Group, moments: Moments, method: Method, freedom: Freedom) -> KeyMerge:
    dim = group.k.shape[1]
    if method == "mean" or freedom.keys is not None:
        identity = np.eye(dim)
        key = np.tile(identity, (1, group.members)) / group.members
        return KeyMerge(key, np.broadcast_to(identity, (len(group.reads), dim, dim)), 1.0)
    if method == "aligned":
        return align_keys(group, moments, Blocks.of(dim, freedom.partner))
    return join_keys(group, moments, blocks_of(group, freedom), centred=freedom.centred)


def blocks_of(group: Group, freedom: Freedom) -> Blocks:
    """What may be combined in keys that are merged jointly: slow features count as free."""
    return Blocks.of(group.k.shape[1], freedom.partner, freedom.slow)


def _values(group: Group, moments: Moments, method: Method, freedom: Freedom, weights: SiteWeights) -> ValueMerge:
    if method == "mean" or freedom.values is not None or group.out is None:
        value = np.tile(np.eye(group.v.shape[1]), (1, group.members)) / group.members
        out = np.zeros((len(group.reads), 0, 0)) if group.out is None else group.out
        return ValueMerge(value, out, np.zeros(out.shape[1]), 1.0)
    if method == "aligned":
        return align_values(group, moments)
    return join_values(group, moments, offset=weights.out_bias is not None)


def _in_order(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts)
