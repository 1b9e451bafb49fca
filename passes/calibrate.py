"""Merging and fitting with calibration: layer after layer, on what the layers before it have become.

Two runs of every batch go forward together. The teacher is the original; the student has every site so far replaced.
At a site the statistics are taken of the student's activations, heads are merged, and the output projection is refitted
by least squares: what the merged heads now give against what the teacher's attention gave. The student then goes on
from there. So errors do not add up unseen, and nothing but one layer's activations is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from passes.dataflow import Flow, Value
from passes.match.attention import Matches
from passes.merging_fit import merge_calibrated
from passes.mixing_fit import fit_mixing
from passes.paired_runs import PairedRuns
from passes.plan import Step
from passes.protocols import Probe
from passes.site import AttentionSite
from passes.sparse_run import see_less
from passes.sublayer import NoSublayer
from passes.targets.decoupled import DecoupledHeads
from passes.targets.grouped_query import GroupedQuery
from passes.targets.linear_attention import LinearHeads
from passes.targets.mixing import Fit
from passes.targets.replacement import Replacement
from passes.targets.sparse import Sparse
from passes.weights.merge import Merged


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
            if isinstance(step.target, GroupedQuery | DecoupledHeads):
                done[step.site.name] = merge_calibrated(pair, step.site, step.target, pooled, steps, refine=refine)
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
