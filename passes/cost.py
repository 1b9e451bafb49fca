"""Arithmetic and memory of a program's attention before and after a plan, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from codegen.ops.grouped_query_attention.tiles import computed_scores
from codegen.sight import Pattern
from codegen.spec import LinearAttention, TokenMixing
from passes.dataflow import Flow, Node
from passes.match.attention import Matches
from passes.site import AttentionSite, Norm
from passes.targets.replacement import Replacement


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-adds (times two) of one forward pass on the recorded inputs; K/V bytes per token."""

    kv_bytes_per_token: int
    flops: int


Scores = Callable[[Pattern, int, int, int], int]
"""(pattern, heads, queries, keys) to how many scores are computed."""


def all_scores(pattern: Pattern, heads: int, queries: int, keys: int) -> int:
    """Where a pattern is a mask over all of them."""
    return heads * queries * keys


def costs(
    flow: Flow,
    matches: Matches,
    replacements: Sequence[Replacement],
    bytes_per_number: int,
    *,
    whole_caches: Collection[str] = (),
    whole_projections: Collection[str] = (),
    scores: Scores = computed_scores,
) -> tuple[Cost, Cost]:
    """(before, after). Flops count learned projections and both contractions of every site, or what mixes instead.

    `whole_caches` and `whole_projections` name rewritten sites that still cache, and project to, all heads. `scores`
    says how many scores of sparse attentions are computed. What is cached per token is what a full cache holds: that a
    query sees fewer keys does not free those that later ones see. Causal linear attention caches nothing per token.
    """
    mixed = {r.site.name: r.mixing for r in replacements if r.mixing is not None}
    linear = {r.site.name: r.linear for r in replacements if r.linear is not None}
    heads = {r.site.name: r.kv_heads for r in replacements}
    still = {name for name, spec in linear.items() if spec.attention.causal}  # their state is of one size
    cached = {name: (0, 0) if name in still else count for name, count in heads.items() if name not in whole_caches}
    computed = {name: count for name, count in heads.items() if name not in whole_projections}
    sites = matches.sites
    base = _projection_flops(flow) + sum(_contraction_flops(flow, matches, s) for s in sites)
    saved = sum(_saved_flops(flow, s, heads[s.name]) for s in sites if s.name in computed and s.name not in mixed)
    saved += sum(_mixing_saves(flow, matches, s, mixed[s.name]) for s in sites if s.name in mixed)
    sparse = {r.site.name: r.pattern for r in replacements if r.pattern}
    saved += sum(_sparse_saves(matches, s, sparse[s.name], scores) for s in sites if s.name in sparse)
    saved += sum(_linear_saves(flow, matches, s, linear[s.name]) for s in sites if s.name in linear)
    before = sum(_kv_numbers(s, (s.kv_heads, s.kv_heads)) for s in sites) * bytes_per_number
    after = sum(_kv_numbers(s, cached.get(s.name, (s.kv_heads, s.kv_heads))) for s in sites) * bytes_per_number
    return Cost(before, base), Cost(after, base - saved)


def parameters_removed(flow: Flow, replacements: Sequence[Replacement]) -> int:
    """How many weights fewer the rewritten sites hold; shared projections count once."""
    seen: set[tuple[str, str]] = set()
    removed = 0
    for r in replacements:
        if r.mixing is not None:
            removed += _mixing_removes(flow, r, r.mixing, seen)
            continue
        if r.linear is not None:
            fresh = {(o.projection.weight, role) for role, o in (("k", r.site.k), ("v", r.site.v))} - seen
            removed -= sum(tensor.size for tensor in r.tensors.values()) if fresh else 0
            seen.update(fresh)
            continue
        for role, operand in r.site.shared:
            key = (operand.projection.weight, role)
            if key in seen or f"{role}_weight" not in r.tensors:
                continue
            seen.add(key)
            weight, bias = r.tensors[f"{role}_weight"], r.tensors.get(f"{role}_bias")
            rows = operand.columns.size
            vectors = [bias, *(r.tensors.get(f"{role}_{part}") for part in ("gain", "shift"))]
            removed += (rows - len(weight)) * (weight.shape[1] + sum(v is not None for v in vectors))
    return removed


def _mixing_removes(flow: Flow, replacement: Replacement, spec: TokenMixing, seen: set[tuple[str, str]]) -> int:
    """All projections and q/k norms of the sublayer, less what the mix has of its own."""
    site = replacement.site
    rows = {role: (o.projection, o.columns.size) for role, o in (("q", site.q), ("k", site.k), ("v", site.v))}
    sizes = {(p.weight, role): count * (spec.hidden + (p.bias is not None)) for role, (p, count) in rows.items()}
    if site.out is not None:
        sizes[site.out.weight, "out"] = spec.hidden * (site.heads * site.value_dim + (site.out.bias is not None))
    for role, operand in (("q", site.q), ("k", site.k), ("v", site.v)):
        if operand.norm is not None:
            sizes |= {(value, role): size for value, size in _norm_weights(flow, operand.norm)}
    fresh = {key: size for key, size in sizes.items() if key not in seen}
    seen.update(fresh)
    own = sum(tensor.size for tensor in replacement.tensors.values()) if fresh else 0
    return sum(fresh.values()) - own


def _norm_weights(flow: Flow, norm: Norm) -> list[tuple[str, int]]:
    """(value, size) of the vectors that a norm multiplies by and adds."""
    before = {node.index for node in flow.ancestors(norm.input)}
    inside = [node for node in flow.ancestors(norm.output) if node.index not in before]
    read = dict.fromkeys(v for node in inside for v in node.inputs if v in flow.weights)
    return [(v, math.prod(flow.shape(v))) for v in read if flow.shape(v)]


def _mixing_saves(flow: Flow, matches: Matches, site: AttentionSite, spec: TokenMixing) -> int:
    nodes = {o.projection.node for o in (site.q, site.k, site.v)} | ({site.out.node} if site.out is not None else set())
    projections = sum(_node_flops(flow, flow.nodes[i]) for i in nodes)
    batch, tokens = (int(n) for n in matches.evidence[site.name].q.tokens.rows.shape)
    return projections + _contraction_flops(flow, matches, site) - spec.flops(batch, tokens)


def _linear_saves(flow: Flow, matches: Matches, site: AttentionSite, spec: LinearAttention) -> int:
    batch, queries, _ = _sizes(matches, site)
    return _contraction_flops(flow, matches, site) - spec.flops(batch, queries)


def _sparse_saves(matches: Matches, site: AttentionSite, pattern: Pattern, scores: Scores) -> int:
    """What the scores take that are not computed any more."""
    batch, queries, keys = _sizes(matches, site)
    left = scores(pattern, site.heads, queries, keys)
    return 2 * batch * (site.heads * queries * keys - left) * (site.head_dim + site.value_dim)


def _sizes(matches: Matches, site: AttentionSite) -> tuple[int, int, int]:
    """Batch, queries and keys of the recorded run."""
    evidence = matches.evidence[site.name]
    batch = len(evidence.q.tokens.rows)
    queries, keys = (max(int(p.tokens.new.stop) for p in t.parts) for t in (evidence.q, evidence.k))
    return batch, queries, keys


def _kv_numbers(site: AttentionSite, kv_heads: tuple[int, int]) -> int:
    return kv_heads[0] * site.head_dim + kv_heads[1] * site.value_dim


def _contraction_flops(flow: Flow, matches: Matches, site: AttentionSite) -> int:
    batch, queries, keys = _sizes(matches, site)
    return 2 * batch * site.heads * queries * keys * (site.head_dim + site.value_dim)


def _saved_flops(flow: Flow, site: AttentionSite, kv_heads: tuple[int, int]) -> int:
    saved = 0
    parts = [(part, left) for o, left in zip((site.k, site.v), kv_heads, strict=True) for part in o.parts]
    for operand, left in parts:
        shape = flow.shape(operand.projection.input)
        rows = 1
        for size in shape[:-1]:
            rows *= size
        saved += 2 * rows * shape[-1] * (operand.heads - left) * operand.dim
    return saved


def _projection_flops(flow: Flow) -> int:
    """Two flops per weight and row, for every projection whose input was recorded."""
    return sum(_node_flops(flow, node) for node in flow.nodes)


def _node_flops(flow: Flow, node: Node) -> int:
    operands = flow.projection_operands(node)
    if operands is None or node.op == "Conv":
        return 0
    try:
        rows = math.prod(flow.shape(node.inputs[operands[0]])[:-1])
    except KeyError:
        return 0
    return 2 * rows * math.prod(flow.shape(node.inputs[operands[1]]))
