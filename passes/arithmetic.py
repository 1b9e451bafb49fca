"""The arithmetic behind a report's totals: which sites add up to the K/V cache, and how cost grows with length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from codegen.spec import DecoupledAttention, GroupedQueryAttention, LinearAttention, LinearMixing, Spec
from passes.cost import Cost, Scores, all_scores
from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.site import AttentionSite
from passes.targets.replacement import Replacement

LENGTHS = tuple(2**power for power in range(7, 16))
"""Sequence lengths of the curve, in tokens."""


@dataclass(frozen=True)
class CacheTerm:
    """Sites that add the same to a K/V cache: ``sites * kv_heads * (head_dim + value_dim)`` numbers per token.

    Where keys and values differ in their number of heads each is a term of its own, with the other's size 0.

    Attributes:
        kv_before, kv_after: heads that are cached; 0 where a cache is no longer needed.
    """

    sites: int
    kv_before: int
    kv_after: int
    head_dim: int
    value_dim: int

    @property
    def numbers(self) -> tuple[int, int]:
        """Numbers per token (before, after)."""
        width = self.sites * (self.head_dim + self.value_dim)
        return self.kv_before * width, self.kv_after * width


@dataclass(frozen=True)
class Work:
    """Flops of one forward pass over `batch` sequences of `tokens` tokens.

    Attributes:
        mixing: what mixes tokens: both products of each attention, or what takes their place.
        projections: everything that works on each token by itself, such as projections and feed-forward.
    """

    tokens: int
    mixing: tuple[int, int]
    projections: tuple[int, int]
    batch: int = 1

    @property
    def total(self) -> tuple[int, int]:
        return self.mixing[0] + self.projections[0], self.mixing[1] + self.projections[1]


@dataclass(frozen=True)
class Arithmetic:
    """Where the totals come from.

    Attributes:
        bytes_per_number: of a cached number.
        cache: terms that add up to the cache per token.
        recorded: the pass that the model was captured with.
        curve: one sequence of growing length without a past, both sides of a cross-attention equally long; up to the
            longest that every mixing matrix reaches.
    """

    bytes_per_number: int
    cache: tuple[CacheTerm, ...]
    recorded: Work
    curve: tuple[Work, ...]


def arithmetic(
    flow: Flow,
    matches: Matches,
    replacements: Sequence[Replacement],
    costs: tuple[Cost, Cost],
    bytes_per_number: int,
    *,
    whole_caches: Collection[str] = (),
    scores: Scores = all_scores,
) -> Arithmetic:
    """`costs` are the totals (before, after) that are to be explained; `whole_caches` and `scores` are as
    there.

    What is not token mixing is taken to grow with the number of tokens, which leaves out that a pooler or a
    classifier may look at one token only.
    """
    specs = {r.site.name: r.spec for r in replacements}
    shapes = [matches.evidence[s.name].q.tokens.rows.shape for s in matches.sites]
    batch, tokens = (int(n) for n in max(shapes, key=lambda shape: int(shape[1])))
    old = sum(_recorded(flow, matches, s, None, scores) for s in matches.sites)
    new = sum(_recorded(flow, matches, s, specs.get(s.name), scores) for s in matches.sites)
    recorded = Work(tokens, (old, new), (costs[0].flops - old, costs[1].flops - new), batch)
    curve = tuple(_at(n, recorded, matches.sites, specs, scores) for n in lengths(specs.values()))
    return Arithmetic(bytes_per_number, _cache_terms(matches.sites, specs, whole_caches), recorded, curve)


def lengths(specs: Iterable[Spec]) -> tuple[int, ...]:
    """At least two of what sequences may be long, in tokens, in ascending order."""
    limit = min((spec.tokens for spec in specs if isinstance(spec, LinearMixing)), default=LENGTHS[-1])
    usual = tuple(n for n in LENGTHS if n < limit)
    return (*usual, limit) if usual else (max(limit // 2, 1), max(limit, 2))


def _recorded(flow: Flow, matches: Matches, site: AttentionSite, spec: Spec | None, scores: Scores) -> int:
    evidence = matches.evidence[site.name]
    batch, queries = (int(n) for n in evidence.q.tokens.rows.shape)
    return mixing_flops(site, spec, batch, queries, int(evidence.k.tokens.new.stop), scores)


def mixing_flops(
    site: AttentionSite, spec: Spec | None, batch: int, queries: int, keys: int, scores: Scores = all_scores
) -> int:
    """Of a site as it is (`spec` None) or as it will be; products that a mask hides are counted."""
    if isinstance(spec, DecoupledAttention):
        spec = spec.attention
    if spec is None or isinstance(spec, GroupedQueryAttention):
        count = site.heads * queries * keys
        if spec is not None and spec.pattern:
            count = scores(spec.pattern, site.heads, queries, keys)
        return 2 * batch * count * (site.head_dim + site.value_dim)
    return spec.flops(batch, queries)


def _at(length: int, recorded: Work, sites: Sequence[AttentionSite], specs: dict[str, Spec], scores: Scores) -> Work:
    mixing = tuple(
        sum(mixing_flops(s, chosen.get(s.name), 1, length, length, scores) for s in sites) for chosen in ({}, specs)
    )
    seen = recorded.batch * recorded.tokens
    projections = tuple(flops * length // seen for flops in recorded.projections)
    return Work(length, (mixing[0], mixing[1]), (projections[0], projections[1]))


def _cache_terms(
    sites: Sequence[AttentionSite], specs: dict[str, Spec], whole_caches: Collection[str]
) -> tuple[CacheTerm, ...]:
    kinds = Counter(kind for site in sites for kind in _cached(site, specs.get(site.name), whole_caches))
    return tuple(CacheTerm(count, *kind) for kind, count in kinds.items())


def _cached(
    site: AttentionSite, spec: Spec | None, whole_caches: Collection[str]
) -> tuple[tuple[int, int, int, int], ...]:
    """(heads before, heads after, head_dim, value_dim) of a site; of keys and of values where they differ."""
    if isinstance(spec, DecoupledAttention):
        return (
            (site.kv_heads, spec.key_heads, site.head_dim, 0),
            (site.kv_heads, spec.value_heads, 0, site.value_dim),
        )
    return ((site.kv_heads, _cached_heads(site, spec, whole_caches), site.head_dim, site.value_dim),)


def _cached_heads(site: AttentionSite, spec: Spec | None, whole_caches: Collection[str]) -> int:
    if spec is None or site.name in whole_caches:
        return site.kv_heads
    if isinstance(spec, LinearAttention):
        return 0 if spec.attention.causal else spec.attention.kv_heads
    return spec.kv_heads if isinstance(spec, GroupedQueryAttention) else 0
