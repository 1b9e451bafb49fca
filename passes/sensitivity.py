"""How far the model's answer moves if one unit of sites alone is rewritten: perturb and measure, in one pass.

One run of the original goes from site to site. Behind each it branches: the branch is given what the rewritten site
would give, and only what follows is run again. Weights are fitted as in `passes.calibrate`, on some of the calibration
batches; drift is taken on the others, on which nothing was fitted. Sites that share weights are one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from passes.calibrate import rewritten
from passes.cost import costs, parameters_removed
from passes.dataflow import Array, Flow, Node, Value
from passes.drift import cosines, divergences
from passes.match.attention import Matches
from passes.paired_runs import PairedRuns
from passes.plan import Step
from passes.protocols import Probe, Trial
from passes.site import AttentionSite
from passes.targets.catalogue import AttentionTarget
from passes.targets.replacement import Replacement
from passes.weights.projection import site_weights

HELD = 4
"""Every how manieth batch is kept for measuring."""
ROWS = 256
"""Tokens of one batch whose answers are compared."""
LOGITS_FROM = 16
"""Narrower answers hold no distribution over tokens."""


@dataclass(frozen=True)
class Effect:
    """One unit, rewritten alone.

    Attributes:
        sites: names of the unit.
        drift: of the model's answer, averaged over tokens.
        local: relative root-mean-square error of the output of the unit's last site.
        kv, flops, parameters: what is saved: numbers in the cache per token, flops of a forward pass, weights.
    """

    sites: tuple[str, ...]
    target: AttentionTarget
    drift: float
    local: float
    kv: int
    flops: int
    parameters: int


@dataclass(frozen=True)
class Answer:
    """What the original answers on the batches that are measured.

    Attributes:
        kind: "kl" where the answer holds logits, in nats, else "cosine": 1 - cosine.
        rows: for each batch the answers compared, [n, features], and where they stand among all rows.
    """

    value: Value
    kind: str
    rows: tuple[tuple[Array, Array], ...]

    def drift(self, runs: Sequence[Trial], on_the_way: Sequence[Value]) -> float:
        """Run to the end and compare."""
        return float(np.mean(np.concatenate([
            self._moved(before, rows_of(_finished(run, self.value, on_the_way))[places])
            for run, (before, places) in zip(runs, self.rows, strict=True)
        ])))  # fmt: skip

    def _moved(self, before: Array, after: Array) -> Array:
        a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
        return divergences(a, b) if self.kind == "kl" else np.maximum(1.0 - cosines(a, b), 0.0)


class Sensitivity:
    """Measures units and whole plans against one recording of the original's answers.

    Raises ValueError if the program's output cannot be told.
    """

    def __init__(self, flow: Flow, matches: Matches, probe: Probe) -> None:
        self.flow, self.matches, self.probe = flow, matches, probe
        count = len(probe.trials())
        self.fitted = [count == 1 or i % HELD != HELD - 1 for i in range(count)]
        if count > 1 and all(self.fitted):
            self.fitted[-1] = False
        self.places = tuple(s.out.output for s in self._ordered(matches.sites) if s.out is not None)
        self.answer = self._recorded()

    @property
    def held(self) -> int:
        """Batches on which no weight is fitted; 0 if there is only one, on which all is done."""
        return self.fitted.count(False)

    def effects(
        self,
        units: Sequence[Sequence[AttentionSite]],
        tried: Callable[[Sequence[AttentionSite]], Sequence[AttentionTarget]],
        tell: Callable[[str], None] | None = None,
    ) -> tuple[list[Effect], dict[str, str]]:
        """Every unit with every target that `tried` names for it; and why a target was refused, by site name."""
        base = PairedRuns.start(self.flow, self.matches, self.probe, self.fitted)
        found: list[Effect] = []
        refused: dict[str, str] = {}
        for unit in sorted(units, key=lambda u: min(s.anchor for s in u)):
            first = self._ordered(unit)[0]
            if tell is not None:
                tell(first.name)
            targets = tried(unit)
            if targets:
                base.remember(first, site_weights(self.flow, first))
            for target in targets:
                branch = base.branch()
                done, reasons = rewritten(branch, [Step(s, target) for s in unit], refine=False)
                refused.update(reasons)
                if reasons:
                    continue
                effect = self._effect(branch, unit, target, done)
                if np.isfinite(effect.drift):
                    found.append(effect)
                else:
                    refused[first.name] = f"as {target.name} the model's answer is not finite"
        return found, refused

    def of_plan(self, steps: Sequence[Step]) -> float:
        """Drift with all of a plan's steps taken as they will be, each fitted to what those before it give."""
        runs = PairedRuns.start(self.flow, self.matches, self.probe, self.fitted)
        rewritten(runs, steps)
        return self.answer.drift(self._measured(runs.students), self.places)

    def _effect(
        self,
        branch: PairedRuns,
        unit: Sequence[AttentionSite],
        target: AttentionTarget,
        done: Mapping[str, Replacement],
    ) -> Effect:
        last = self._ordered(unit)[-1]
        local = self._local(branch, last)
        drift = self.answer.drift(self._measured(branch.students), self.places)
        replacements = [done[s.name] for s in unit]
        before, after = costs(self.flow, self.matches, replacements, 1)
        kv, flops = before.kv_bytes_per_token - after.kv_bytes_per_token, before.flops - after.flops
        removed = parameters_removed(self.flow, replacements)
        return Effect(tuple(s.name for s in unit), target, drift, local, kv, flops, removed)

    def _local(self, branch: PairedRuns, site: AttentionSite) -> float:
        assert site.out is not None
        place = site.out.output
        pairs = [
            (new.advance(place, {place})[place], old.advance(place, {place})[place])
            for new, old in zip(self._measured(branch.students), self._measured(branch.teachers), strict=True)
        ]
        moved = sum(float(np.sum((a - b).astype(np.float64) ** 2)) for a, b in pairs)
        size = sum(float(np.sum(b.astype(np.float64) ** 2)) for _, b in pairs)
        return float(np.sqrt(moved / max(size, 1e-30)))

    def _measured(self, runs: Sequence[Trial]) -> list[Trial]:
        return [r for r, fitted in zip(runs, self.fitted, strict=True) if not (fitted and self.held)]

    def _ordered(self, sites: Sequence[AttentionSite]) -> list[AttentionSite]:
        return sorted(sites, key=lambda s: s.anchor)

    def _recorded(self) -> Answer:
        value = main_output(self.flow, self.matches)
        runs = self._measured(self.probe.trials())
        counted = self._counted(runs)
        answers = [_finished(run, value, self.places) for run in runs]
        tables = {self.flow.weights[n.inputs[0]].shape[0] for n in self.flow.nodes if _is_table(self.flow, n)}
        width = answers[0].shape[-1]
        logits = width >= LOGITS_FROM and (width in tables or "logits" in value.lower())
        rows = [(rows_of(a), _places(a, c)) for a, c in zip(answers, counted, strict=True)]
        return Answer(value, "kl" if logits else "cosine", tuple((np.array(r[p]), p) for r, p in rows))

    def _counted(self, runs: Sequence[Trial]) -> list[Array | None]:
        """[B, S], tokens that are no padding, as the last self-attention has them."""
        own = [s for s in self._ordered(self.matches.sites) if not (s.cross or s.headwise or s.out is None)]
        if not own:
            return [None] * len(runs)
        looker = PairedRuns(self.flow, self.matches, self.probe, runs, (), [True] * len(runs))
        return [look.asking for look in looker.see(own[-1], site_weights(self.flow, own[-1]), runs)]


def main_output(flow: Flow, matches: Matches) -> Value:
    """The first output that depends on an attention and is none of its caches. Raises ValueError if there is none."""
    caches = {name for s in matches.sites for o in (s.k, s.v) for name, _ in o.presents}
    anchors = {s.anchor for s in matches.sites}
    for value in flow.outputs:
        if value not in caches and anchors & {n.index for n in flow.ancestors(value)}:
            return value
    raise ValueError("no output of the model depends on its attentions")


def rows_of(answer: Array) -> Array:
    """[..., features] -> [n, features]."""
    return answer.reshape(-1, answer.shape[-1])


def _finished(run: Trial, value: Value, on_the_way: Sequence[Value]) -> Array:
    for place in on_the_way:  # stops that all runs have in common, so that what a door prepares for them is shared
        run.advance(place, ())
    return run.advance(value, {value})[value]


def _places(answer: Array, counted: Array | None) -> Array:
    """At most `ROWS` rows of an answer, evenly spread over those that count."""
    rows = np.arange(int(np.prod(answer.shape[:-1])))
    if counted is not None and counted.shape == answer.shape[:-1]:
        rows = rows[counted.reshape(-1)]
    spread = np.linspace(0, len(rows) - 1, min(ROWS, len(rows)))
    return np.asarray(rows[np.unique(spread.astype(int))])


def _is_table(flow: Flow, node: Node) -> bool:
    """Whether ids look up rows of a matrix there."""
    weight = flow.weights.get(node.inputs[0]) if node.op == "Gather" else None
    return weight is not None and len(weight.shape) == 2
