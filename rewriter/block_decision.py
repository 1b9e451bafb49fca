"""What takes the place of which feed-forward blocks, and with which weights: the same for all doors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import Array, Flow
from passes.feed_forward_site import FeedForwardSite
from passes.match.attention import Matches
from passes.match.feed_forward import FeedForwards
from passes.plan import named_by
from passes.protocols import Probe
from passes.stacks import stacks
from passes.targets.block import BlockReplacement, block_error, surroundings
from passes.targets.conditional_feed_forward import ConditionalBlocks
from passes.targets.experts import Experts
from passes.targets.gated_pair import UnitBlocks
from rewriter.report.rewrite_report import SiteRow

MOST_TOKENS = 2048
"""Calibration tokens that a fit looks at."""

BlockTarget = Experts | ConditionalBlocks | UnitBlocks
"""What a feed-forward block can become."""


@dataclass(frozen=True)
class BlockDecision:
    """What will be installed at feed-forward blocks, a report row for each, and (name, reason) of what stays."""

    replacements: tuple[BlockReplacement, ...] = ()
    rows: tuple[SiteRow, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def without(self, failed: Mapping[str, str]) -> BlockDecision:
        """With these sites refused, by name with the reason."""
        return BlockDecision(
            tuple(r for r in self.replacements if r.site.name not in failed),
            tuple(r for r in self.rows if r.name not in failed),
            (*self.refused, *failed.items()),
        )

    def noting(self, names: Collection[str], note: str) -> BlockDecision:
        """With a further note in the rows of these sites."""
        rows = (replace(r, notes=(*r.notes, note)) if r.name in names else r for r in self.rows)
        return replace(self, rows=tuple(rows))

    @property
    def parameters_added(self) -> int:
        return sum(sum(t.size for t in r.tensors.values()) - _dense_size(r.site) for r in self.replacements)

    def flops_saved(self, flow: Flow) -> int:
        """On the recorded inputs, two for each multiplication."""
        return sum(_dense_flops(flow, r.site) - r.flops(flow) for r in self.replacements)


def decide_blocks(
    flow: Flow,
    matches: Matches,
    wanted: Mapping[str, BlockTarget],
    found: FeedForwards,
    probe: Callable[[], Probe] | None = None,
) -> BlockDecision:
    """`wanted` are targets by layer selector, later ones win; with a probe, weights are fitted."""
    by_site: dict[str, BlockTarget] = {}
    for selector, target in wanted.items():
        for stack in stacks([s for s in found.sites if s.name in named_by(selector, found.sites)]):
            by_site.update({s.name: target for s in target.chosen(stack)})
    around = {s.name: surroundings(flow, matches, s) for s in found.sites if s.name in by_site}
    refused: dict[str, str] = {}
    for site in (s for s in found.sites if s.name in by_site):
        if reason := by_site[site.name].refuses(site, around[site.name]):
            refused[site.name] = reason
        elif other := sharer(site, found.sites):
            refused[site.name] = f"it shares its weights with {other}"
    left = [s for s in found.sites if s.name in by_site and s.name not in refused]
    inputs = _inputs(left, probe()) if probe is not None and left else {}
    done = [
        by_site[s.name].fitted(flow, s, around[s.name], inputs[s.name])
        if s.name in inputs
        else by_site[s.name].transform(flow, s, around[s.name])
        for s in left
    ]
    rows = [
        SiteRow(r.site.name, r.before, r.after, r.exact, *block_error(flow, r), merge=r.merge, notes=r.notes)
        for r in done
    ]
    selected = {r.name: r.reason for r in found.refusals}
    return BlockDecision(tuple(done), tuple(rows), (*selected.items(), *refused.items()))


def sharer(site: FeedForwardSite, sites: Sequence[FeedForwardSite]) -> str | None:
    """The name of another block with the same weights."""
    return next((s.name for s in sites if s is not site and s.down.weight == site.down.weight), None)


def _inputs(sites: Sequence[FeedForwardSite], probe: Probe) -> dict[str, Array]:
    """[N, width] by site: what the original's blocks read on calibration batches."""
    seen: dict[str, list[Array]] = {s.name: [] for s in sites}
    for trial in probe.trials():
        for site in sites:
            value = site.up.projection.input
            held = trial.advance(site.up.projection.output, {value})[value]
            seen[site.name].append(np.asarray(held, dtype=np.float32).reshape(-1, site.width))
    joined = {name: np.concatenate(arrays) for name, arrays in seen.items()}
    return {name: x[:: max(1, -(-len(x) // MOST_TOKENS))] for name, x in joined.items()}


def _dense_size(site: FeedForwardSite) -> int:
    parts = [site.up] if site.gate is None else [site.up, site.gate]
    inner = sum(site.hidden * (site.width + (p.projection.bias is not None)) for p in parts)
    return inner + site.width * (site.hidden + (site.down.bias is not None))


def _tokens(flow: Flow, site: FeedForwardSite) -> int:
    return int(np.prod(flow.shape(site.up.projection.input)[:-1], dtype=np.int64))


def _dense_flops(flow: Flow, site: FeedForwardSite) -> int:
    return 2 * _tokens(flow, site) * site.width * site.hidden * (2 if site.gate is None else 3)
