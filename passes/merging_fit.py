"""Merging the heads of one site with calibration: statistics, the merge, its refinement, on the student's activations.

What decides is in passes/weights/ and passes/refine.py; here is which of it a site gets, and what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from passes.activations import Activations, projected
from passes.attention_jacobian import flat
from passes.dataflow import Flow, Value
from passes.paired_runs import PairedRuns
from passes.plan import Step
from passes.refine import Refinement, refined, refitted
from passes.refit_by_running import can_run, run_refitted
from passes.site import AttentionSite
from passes.targets.decoupled import DecoupledHeads, merge_apart
from passes.targets.grouped_query import GroupedQuery, merge_site, tied
from passes.targets.replacement import Replacement
from passes.weights.group import Moments
from passes.weights.grouping import Groups
from passes.weights.merge import Freedom, Merged, Method, contiguous, readers
from passes.weights.moments import MomentSums
from passes.weights.projection import SiteWeights, merges_in_order, site_weights

PAIRED = 4
"""Batches whose statistics decide which heads are alike."""
SLOW = 1.0
"""Radians over a calibration sequence up to which a rotating pair is merged as if it stood still."""

Merging = GroupedQuery | DecoupledHeads
"""Targets that merge key/value heads."""
Both = tuple[Groups, Groups]
"""Heads that each new key head, and each new value head, stands for."""


def merge_calibrated(
    pair: PairedRuns,
    site: AttentionSite,
    target: Merging,
    pooled: dict[tuple[Value, Value], Merged],
    steps: Sequence[Step],
    *,
    refine: bool,
) -> Replacement:
    """One site's heads merged by statistics of the students, which then go on with the result.

    `pooled` holds what sites that share weights have become so far; `steps` are all that are taken.
    """
    apart = site.joined or site.headwise or site.by_blocks  # statistics are of one projection's tokens, in its order
    if isinstance(target, GroupedQuery) and apart:
        return _without_statistics(pair, site, target)
    if isinstance(target, GroupedQuery) and site.interleaved:
        order = pair.freedom(site)
        if order.order is not None or _equal(pair.flow, site, target):
            return target.gathered(pair.flow, site, order.order)
    elif _equal(pair.flow, site, target):
        return target.pooled(pair.flow, site)
    method = target.method(True)
    weights, freedom = site_weights(pair.flow, site), pair.freedom(site)
    if site.out is None or weights.out is None:  # nowhere to put what changes: the closed form without statistics
        return target.merged(pair.flow, site, _closed(pair.flow, site, target, freedom, method), method)
    plain = _closed(pair.flow, site, target, freedom, method)
    if plain.exact:  # turned copies of each other need no statistics, and lose nothing
        return target.merged(pair.flow, site, plain, method)
    key = (site.k.projection.weight, site.v.projection.weight)
    shared = len(pair.sharing(site)) > 1
    if shared and key not in pooled:
        pooled[key] = _pooled(pair, site, target, freedom, weights, [s for s in steps if s.site in pair.sharing(site)])
    ahead = [run.fork() for run in pair.students] if site.hidden_bias == "keys" and can_run(pair, site) else None
    look = pair.look(site, weights)
    if shared:
        merged = pooled[key]
    else:
        seen = pair.fit(look.seen)
        freedom = replace(freedom, slow=_slow(site, seen))
        groups = _groups(site, target, weights, freedom, seen)
        moments = _both_moments(site, groups, weights, seen)
        merged = _closed(pair.flow, site, target, freedom, method, groups, moments)
        reference = pair.fit(look.reference)
        if refine and method == "joint":
            merged = refined(Refinement(site, weights, freedom, *groups, seen, reference), merged)
        else:
            merged = refitted(site, merged, seen, reference)
    if ahead is not None:  # what shared keys make of the bias is known by running only
        pair.students = ahead
        return run_refitted(pair, target.merged(pair.flow, site, merged, method), look.reference)
    for run, seen_here, before in zip(pair.students, look.seen, look.reference, strict=True):
        run.put(site.out.output, projected(site, merged.weights, seen_here, before))
    return target.merged(pair.flow, site, merged, method)


def _without_statistics(pair: PairedRuns, site: AttentionSite, target: GroupedQuery) -> Replacement:
    """Merged as the weights tell, and the output projection refitted to what the program then gives."""
    made = target.pooled(pair.flow, site)
    if made.exact or not can_run(pair, site):
        return made
    made = replace(made, may_average=target.merge in (None, "mean"))
    freedom, method = pair.freedom(site), target.method(True)
    free = None in (freedom.keys, freedom.values) and not site.joined and merges_in_order(pair.flow, site)
    if free and method != "mean":
        made = target.merged(pair.flow, site, _closed(pair.flow, site, target, freedom, method), method)
    return run_refitted(pair, made)


def _pooled(
    pair: PairedRuns,
    site: AttentionSite,
    target: Merging,
    freedom: Freedom,
    weights: SiteWeights,
    unit: Sequence[Step],
) -> Merged:
    """Sites that share weights are merged once, by the teacher's statistics at all of them."""
    runs = pair.probe.trials()
    seen: list[Activations] = []
    for other in sorted((s.site for s in unit), key=lambda s: s.anchor):
        seen += pair.fit(pair.see(other, weights, runs))
    if isinstance(target, DecoupledHeads):
        groups = target.groups(site)
    else:
        groups = (contiguous(site.kv_heads, target.kv_heads),) * 2
    moments = _both_moments(site, groups, weights, seen)
    freedom = replace(freedom, slow=_slow(site, seen))
    return _closed(pair.flow, site, target, freedom, target.method(True), groups, moments)


def _equal(flow: Flow, site: AttentionSite, target: Merging) -> bool:
    """Whether the heads of every group are the same bit for bit."""
    if isinstance(target, DecoupledHeads):
        return target.tied(flow, site)
    return tied(flow, site, target.kv_heads)


def _closed(
    flow: Flow,
    site: AttentionSite,
    target: Merging,
    freedom: Freedom,
    method: Method,
    groups: Both | None = None,
    moments: tuple[Sequence[Moments], Sequence[Moments]] | None = None,
) -> Merged:
    """The merge alone; by the weights where there are no statistics."""
    if isinstance(target, DecoupledHeads):
        return merge_apart(flow, site, target, freedom, moments, method=method)
    same, known = (None if both is None else both[0] for both in (groups, moments))
    return merge_site(flow, site, target, freedom, known, method=method, groups=same)  # type: ignore[arg-type]


def _groups(
    site: AttentionSite, target: Merging, weights: SiteWeights, freedom: Freedom, seen: Sequence[Activations]
) -> Both:
    if isinstance(target, DecoupledHeads):
        return target.groups(site)
    found = target.groups(weights, site, freedom, lambda both: _moments(site, both, weights, seen[:PAIRED]))
    return found, found


def _both_moments(
    site: AttentionSite, groups: Both, weights: SiteWeights, seen: Sequence[Activations]
) -> tuple[list[Moments], list[Moments]]:
    keys = _moments(site, groups[0], weights, seen)
    return keys, keys if groups[1] == groups[0] else _moments(site, groups[1], weights, seen)


def _moments(site: AttentionSite, groups: Groups, weights: SiteWeights, looked: Sequence[Activations]) -> list[Moments]:
    reading = readers(groups, site.group)
    sums = [MomentSums() for _ in groups]
    for look in looked:
        q, k, v = look.queries(weights), look.keys(weights), look.values(weights)
        for members, heads, total in zip(groups, reading, sums, strict=True):
            total.add(
                q[:, heads],
                flat(k[:, list(members)]),
                flat(v[:, list(members)]),
                look.weights[:, heads],
                look.shown,
                look.asking,
            )
    return [total.moments() for total in sums]


def _slow(site: AttentionSite, looked: Sequence[Activations]) -> tuple[int, ...]:
    """Features of pairs that hardly turn over any calibration sequence, slowest first."""
    if site.k.rotary is None or site.bent:
        return ()
    turns = np.max([look.largest_turn() for look in looked], axis=0)
    partner = site.k.rotary.partner
    pairs = [(d, partner[d]) for d in range(len(partner)) if d < partner[d]]
    return tuple(d for i in np.argsort(turns, kind="stable") if turns[i] <= SLOW for d in pairs[i])
