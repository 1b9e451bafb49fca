"""What a recorded attention's masks and biases say: which tokens are padding, and what scores get by distance.

Conditional attention knows hidden tokens and numbers by distance in buckets (arXiv 1910.10683), and nothing else;
whatever is more than that is told apart here.

Shape legend: B batch, H heads, S tokens, R buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_attention.reference import bucket
from passes.dataflow import Array, Flow
from passes.hidden_keys import HIDES
from passes.match.attention import Evidence
from passes.match.score_terms import total_bias
from passes.site import AttentionSite
from passes.sublayer import NoSublayer

FARTHEST = (128, 256, 512, 1024, 64, 32, 16)
"""Distances from which on there is one bucket, in the order in which they are tried: first the paper's, which is taken
where the recorded sequences are too short to tell."""


@dataclass(frozen=True)
class ByDistance:
    """Attributes:
    shown: bool [B, S], the recorded tokens that are no padding.
    table: [R, H] what is added to scores by bucket, None for nothing.
    farthest: the distance from which on there is one bucket.
    """

    shown: Array
    table: Array | None = None
    farthest: int = FARTHEST[0]


def by_distance(flow: Flow, site: AttentionSite, evidence: Evidence) -> ByDistance:
    """Raises NoSublayer where masks and biases say more than that."""
    modifiers = evidence.path.modifiers
    batch, tokens = (int(n) for n in evidence.q.tokens.rows.shape)
    bias = total_bias(flow, modifiers, (batch, site.heads, tokens, int(evidence.k.tokens.new.stop)))
    kept = np.broadcast_to(bias > HIDES, (batch, site.heads, tokens, bias.shape[-1]))
    shown = np.asarray(kept.any(axis=(1, 2)))
    counted = shown[:, None, :, None]  # a padded query may see what it likes
    if bool((counted & (kept != shown[:, None, None, :])).any()):
        raise NoSublayer("its mask hides more than padding: keys that some queries see and others do not")
    profile = _profile(np.where(kept, bias, 0.0), kept & counted)
    if not profile.any():
        return ByDistance(shown)
    read = sorted({v for m in modifiers if m.value for n in flow.ancestors(m.value) for v in n.inputs if v})
    for table, farthest in _candidates(flow, read, site.heads):
        found = _fits(table, farthest, profile)
        if found is not None:
            return ByDistance(shown, found, farthest)
    raise NoSublayer("its score bias is no stored number by head and distance in buckets (arXiv 1910.10683)")


def _profile(bias: Array, counts: Array) -> Array:
    """[H, 2 S - 1] of [B, H, S, S] by key minus query position, from 1 - S up. Raises NoSublayer if it tells more."""
    tokens = bias.shape[-1]
    at = np.arange(tokens)
    distance = at[None, :] - at[:, None] + tokens - 1
    found = np.zeros((bias.shape[1], 2 * tokens - 1))
    for place in range(2 * tokens - 1):
        here = np.broadcast_to(distance == place, bias.shape) & counts
        for head in range(bias.shape[1]):
            numbers = bias[:, head][here[:, head]]
            if numbers.size:
                if float(np.ptp(numbers)) > 1e-4 * max(float(np.abs(numbers).max()), 1.0):
                    raise NoSublayer("its score bias is more than a number by head and distance")
                found[head, place] = numbers.mean()
    return found


def _candidates(flow: Flow, read: Sequence[str], heads: int) -> Iterator[tuple[Array, int]]:
    for value in read:
        weight = flow.weights.get(value)
        if weight is not None and len(weight.shape) == 2 and weight.shape[1] == heads and weight.shape[0] % 4 == 0:
            table = np.asarray(flow.value(value), dtype=np.float64)
            yield from ((table, farthest) for farthest in FARTHEST if farthest > len(table) // 4)


def _fits(table: Array, farthest: int, profile: Array) -> Array | None:
    """The table times the factor that makes it the profile, None where none does. A distance that no counted query has
    is 0 in the profile, and is left out."""
    reach = profile.shape[1] // 2
    spec = ConditionalAttention(1, 1, 1, 1, buckets=len(table), farthest=farthest)
    expected = table[bucket(spec, np.arange(-reach, reach + 1))].T
    known = profile != 0
    factor = float((expected * profile)[known].sum()) / max(float((expected[known] ** 2).sum()), 1e-30)
    off = np.abs(factor * expected - profile)[known].max()
    return factor * table if off <= 1e-4 * max(float(np.abs(profile).max()), 1e-30) else None
