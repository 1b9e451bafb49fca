"""The original and the rewritten program on the same calibration batches, stopped at the same places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from passes.activations import Activations, activations, wanted
from passes.dataflow import Array, Flow
from passes.match.attention import Matches
from passes.plan import sharing
from passes.protocols import Probe, Trial
from passes.site import AttentionSite
from passes.targets.freedom import freedom_of
from passes.weights.merge import Freedom
from passes.weights.projection import SiteWeights

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """One site on each batch.

    Attributes:
        reference: what the teacher's output projection gave, laid out as the program has it.
        seen: the student's activations.
    """

    reference: list[Array]
    seen: list[Activations]


@dataclass
class PairedRuns:
    """Teacher and student runs of all batches, side by side.

    Attributes:
        fitted: for each batch whether weights are fitted on it; the others only run along.
    """

    flow: Flow
    matches: Matches
    probe: Probe
    teachers: Sequence[Trial]
    students: Sequence[Trial]
    fitted: Sequence[bool]
    _known: dict[str, Look] = field(default_factory=dict)

    @staticmethod
    def start(flow: Flow, matches: Matches, probe: Probe, fitted: Sequence[bool] | None = None) -> PairedRuns:
        """Both at their beginning."""
        teachers = probe.trials()
        return PairedRuns(flow, matches, probe, teachers, probe.trials(), fitted or [True] * len(teachers))

    @property
    def ahead(self) -> bool:
        """Whether the runs began behind a site that is still to be replaced."""
        return bool(self._known)

    def sharing(self, site: AttentionSite) -> list[AttentionSite]:
        return sharing(self.matches.sites)[site.name]

    def freedom(self, site: AttentionSite) -> Freedom:
        return freedom_of(self.flow, site, self.matches.evidence[site.name], self.sharing(site))

    def look(self, site: AttentionSite, weights: SiteWeights) -> Look:
        """The site in both runs, which then stand behind it."""
        if site.name in self._known:
            return self._known[site.name]
        assert site.out is not None
        place = site.out.output
        return Look([t.advance(place, {place})[place] for t in self.teachers], self.see(site, weights, self.students))

    def see(self, site: AttentionSite, weights: SiteWeights, runs: Sequence[Trial]) -> list[Activations]:
        """The site's activations on each batch; the runs then stand behind it."""
        return self._observed(site, weights, runs).seen

    def remember(self, site: AttentionSite, weights: SiteWeights) -> None:
        """Look at a site in the teacher alone, for branches that start behind it and change nothing above."""
        self._known = {site.name: self._observed(site, weights, self.teachers)}

    def branch(self) -> PairedRuns:
        """Runs of their own from where the teacher stands: a student in which nothing is replaced so far."""
        teachers, students = ([t.fork() for t in self.teachers] for _ in range(2))
        return PairedRuns(self.flow, self.matches, self.probe, teachers, students, self.fitted, dict(self._known))

    def fit(self, batches: Sequence[T]) -> list[T]:
        """Of something for each batch, what weights are fitted on."""
        return [b for b, fitted in zip(batches, self.fitted, strict=True) if fitted]

    def _observed(self, site: AttentionSite, weights: SiteWeights, runs: Sequence[Trial]) -> Look:
        assert site.out is not None
        evidence, place = self.matches.evidence[site.name], site.out.output
        names = (wanted(site, evidence) - set(self.flow.weights)) | {place}
        values = [run.advance(place, names) for run in runs]
        return Look([v[place] for v in values], [activations(self.flow, site, evidence, weights, v) for v in values])
