"""Sparse attention during calibration: nothing is fitted, and the layers above see what the pattern leaves."""

from __future__ import annotations

from dataclasses import replace

from passes.activations import projected
from passes.paired_runs import PairedRuns
from passes.site import AttentionSite
from passes.targets.replacement import Replacement
from passes.targets.sparse import Sparse
from passes.weights.projection import site_weights


def see_less(pair: PairedRuns, site: AttentionSite, target: Sparse) -> Replacement:
    """The replacement of one site; the students go on from its output.

    Raises KeyError if its values cannot be followed.
    """
    done = target.transform(pair.flow, site, pair.matches.evidence[site.name], pair.sharing(site))
    weights = site_weights(pair.flow, site)
    if site.out is None or weights.out is None:  # there is no place at which the students could be told
        return done
    look = pair.look(site, weights)
    for run, seen, before in zip(pair.students, look.seen, look.reference, strict=True):
        run.put(site.out.output, projected(site, weights, replace(seen, pattern=done.pattern), before))
    return done
