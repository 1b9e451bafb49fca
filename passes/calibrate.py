"""Merging and fitting with calibration: layer after layer, on what the layers before it have become.

Two runs of every batch go forward together. The teacher is the original; the student has every site so far replaced.
At a site the statistics are taken of the student's activations, heads are merged, and the output projection is refitted
by least squares: what the merged heads now give against what the teacher's attention gave. The student then goes on
from there. So errors do not add up unseen, and nothing but one layer's activations is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from passes.activations import Activations, projected
from passes.attention_jacobian import flat
from passes.dataflow import Flow, Value
from passes.match.attention import Matches
from passes.mixing_fit import fit_mixing
from passes.paired_runs import PairedRuns
from passes.plan import Step
from passes.protocols import Probe
from passes.refine import Refinement, refined, refitted
from passes.site import AttentionSite
from passes.sparse_run import see_less
from passes.sublayer import NoSublayer
from passes.targets.grouped_query import GroupedQuery, merge_site, tied
from passes.targets.linear_attention import LinearHeads
from passes.targets.mixing import Fit
from passes.targets.replacement import Replacement
from passes.targets.sparse import Sparse
from passes.weights.group import Moments
from passes.weights.grouping import Groups
from passes.weights.merge import Freedom, Merged, contiguous, readers
from passes.weights.moments import MomentSums
from passes.weights.projection import SiteWeights, site_weights

PAIRED = 4
"""Batches whose statistics decide which heads are alike."""
SLOW = 1.0
"""Radians over a calibration sequence up to which a rotating pair is merged as if it stood still."""


def calibrated(
    flow: Flow, matches: Matches, steps: Sequence[Step], probe: Probe, tell: Callable[[str], None] | None = None
) -> tuple[tuple[Replacement, ...], tuple[tuple[str, str], ...]]:
    """A replacement for each step, in order, and (site name, reason) where there can be none.

    `tell` is called with each site's name. Raises KeyError if a site's values cannot be followed through the program.
    """
    done, refused = rewritten(PairedRuns.start(flow, matches, probe), steps, tell)
    return tuple(done[s.site.name] for s in steps if s.site.name in done), refused


def rewritten(
    pair: PairedRuns, steps: Sequence[Step], tell: Callable[[str], None] | None = None, *, refine: bool = True
) -> tuple[dict[str, Replacement], tuple[tuple[str, str], ...]]:
    """As `calibrated`, on runs that are under way; the students then hold all replacements, behind the last site.

    Without `refine` joint merges are refitted only, which is several times faster.
    """
    done: dict[str, Replacement] = {}
    refused: list[tuple[str, str]] = []
    pooled: dict[tuple[Value, Value], Merged] = {}
    mixed: dict[tuple[Value, Value], Fit] = {}
    for step in sorted(steps, key=lambda s: s.site.anchor):
        if tell is not None:
            tell(step.site.name)
        try:
            if isinstance(step.target, GroupedQuery):
                done[step.site.name] = _merge(pair, step.site, step.target, pooled, steps, refine=refine)
            elif isinstance(step.target, LinearHeads):
                done[step.site.name] = _linear(pair, step.site, step.target)
            elif isinstance(step.target, Sparse):
                done[step.site.name] = see_less(pair, step.site, step.target)
            else:
                done[step.site.name] = fit_mixing(pair, step.site, step.target, mixed)
        except NoSublayer as reason:
            refused.append((step.site.name, str(reason)))
    return done, tuple(refused)


def _linear(pair: PairedRuns, site: AttentionSite, target: LinearHeads) -> Replacement:
    """Nothing is fitted, and the students go on with the original's attention: its features are not trained yet."""
    done = target.transform(pair.flow, site, pair.matches.evidence[site.name], pair.sharing(site))
    return replace(done, notes=(*done.notes, "calibration does not reach it: layers above are fitted to the original"))


def _merge(
    pair: PairedRuns,
    site: AttentionSite,
    target: GroupedQuery,
    pooled: dict[tuple[Value, Value], Merged],
    steps: Sequence[Step],
    *,
    refine: bool,
) -> Replacement:
    if tied(pair.flow, site, target.kv_heads):
        return target.pooled(pair.flow, site)
    method = target.method(True)
    weights, freedom = site_weights(pair.flow, site), pair.freedom(site)
    if site.out is None or weights.out is None:  # nowhere to put what changes: the closed form without statistics
        return target.merged(pair.flow, site, merge_site(pair.flow, site, target, freedom, method=method), method)
    plain = merge_site(pair.flow, site, target, freedom, method=method)
    if plain.exact:  # turned copies of each other need no statistics, and lose nothing
        return target.merged(pair.flow, site, plain, method)
    key = (site.k.projection.weight, site.v.projection.weight)
    shared = len(pair.sharing(site)) > 1
    if shared and key not in pooled:
        pooled[key] = _pooled(pair, site, target, freedom, weights, [s for s in steps if s.site in pair.sharing(site)])
    look = pair.look(site, weights)
    if shared:
        merged = pooled[key]
    else:
        seen = pair.fit(look.seen)
        freedom = replace(freedom, slow=_slow(site, seen))
        groups = target.groups(weights, site, freedom, lambda both: _moments(site, both, weights, seen[:PAIRED]))
        moments = _moments(site, groups, weights, seen)
        merged = merge_site(pair.flow, site, target, freedom, moments, method=method, groups=groups)
        reference = pair.fit(look.reference)
        if refine and method == "joint":
            merged = refined(Refinement(site, weights, freedom, groups, groups, seen, reference), merged)
        else:
            merged = refitted(site, merged, seen, reference)
    for run, seen_here, before in zip(pair.students, look.seen, look.reference, strict=True):
        run.put(site.out.output, projected(site, merged.weights, seen_here, before))
    return target.merged(pair.flow, site, merged, method)


def _pooled(
    pair: PairedRuns,
    site: AttentionSite,
    target: GroupedQuery,
    freedom: Freedom,
    weights: SiteWeights,
    unit: Sequence[Step],
) -> Merged:
    """Sites that share weights are merged once, by the teacher's statistics at all of them."""
    runs = pair.probe.trials()
    seen: list[Activations] = []
    for other in sorted((s.site for s in unit), key=lambda s: s.anchor):
        seen += pair.fit(pair.see(other, weights, runs))
    groups = contiguous(site.kv_heads, target.kv_heads)
    moments = _moments(site, groups, weights, seen)
    freedom = replace(freedom, slow=_slow(site, seen))
    return merge_site(pair.flow, site, target, freedom, moments, method=target.method(True), groups=groups)


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
