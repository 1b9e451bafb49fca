"""The original and the rewritten program on the same calibration batches, stopped at the same places."""

from __future__ import annotations

from collections.abc import Sequence

from passes.activations import Activations, activations, wanted
from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.plan import sharing
from passes.protocols import Probe, Trial
from passes.site import AttentionSite
from passes.targets.freedom import freedom_of
from passes.weights.merge import Freedom
from passes.weights.projection import SiteWeights


class PairedRuns:
    """Teacher and student runs of all batches, side by side."""

    def __init__(self, flow: Flow, matches: Matches, probe: Probe) -> None:
        self.flow, self.matches, self.probe = flow, matches, probe
        self.teachers: Sequence[Trial] = probe.trials()
        self.students: Sequence[Trial] = probe.trials()

    def sharing(self, site: AttentionSite) -> list[AttentionSite]:
        return sharing(site, self.matches.sites)

    def freedom(self, site: AttentionSite) -> Freedom:
        return freedom_of(self.flow, site, self.matches.evidence[site.name], self.sharing(site))

    def see(self, site: AttentionSite, weights: SiteWeights, runs: Sequence[Trial]) -> list[Activations]:
        """The site's activations on each batch; the runs then stand behind it."""
        assert site.out is not None
        evidence = self.matches.evidence[site.name]
        names = (wanted(site, evidence) - set(self.flow.weights)) | {site.out.output}
        seen = [run.advance(site.out.output, names) for run in runs]
        return [activations(self.flow, site, evidence, weights, values) for values in seen]
