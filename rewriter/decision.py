"""From names to a plan and replacements: the middle of the pipeline, the same for both doors."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from codegen.ops.grouped_query_attention.tiles import computed_scores
from passes.arithmetic import arithmetic
from passes.calibrate import calibrated
from passes.choose import Chosen
from passes.cost import Scores, costs, parameters_removed
from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.match.feed_forward import FeedForwards
from passes.measure import site_error
from passes.picture import Drawing, distinct, feed_forward_picture, refusal_picture, site_picture
from passes.plan import Plan, PlanError, Step, make_plan, named_by, sharing
from passes.protocols import Probe
from passes.site import AttentionSite
from passes.sublayer import NoSublayer
from passes.targets.auto import Auto
from passes.targets.catalogue import CATALOGUE, AttentionTarget, Layered, Target, find
from passes.targets.colt5 import Colt5
from passes.targets.grouped_query import describe
from passes.targets.replacement import Replacement
from rewriter import progress
from rewriter.auto_choice import Settled, as_auto, settle, with_choice
from rewriter.block_decision import BlockDecision, decide_blocks
from rewriter.errors import NothingToRewrite, UnknownTarget, UsageError
from rewriter.report.choice import ChoiceReport
from rewriter.report.rewrite_report import Change, Refused, RewriteReport, SiteRow


@dataclass
class Stopwatch:
    """Seconds by stage.

    Attributes:
        clock: what tells them.
    """

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self.clock()
        try:
            with progress.task(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start


@dataclass(frozen=True)
class Decision:
    """What will be installed, and what was selected and is not.

    Attributes:
        refused: (name, reason).
        kept: sites that the target leaves as they are by its definition, with the reason.
        blocks: the same for feed-forward blocks.
        chosen: how the plan came about, where it was chosen under a budget.
    """

    target: str
    replacements: tuple[Replacement, ...]
    refused: tuple[tuple[str, str], ...]
    kept: tuple[tuple[AttentionSite, str], ...] = ()
    blocks: BlockDecision = field(default_factory=BlockDecision)
    chosen: Chosen | None = None


def assignment(target: Any, layers: str | None) -> tuple[str, dict[str, Target]]:
    """(what to call it, target by selector) for a name, a target object or a mapping from selectors to either.

    Nothing is assigned yet where the target is "auto" and has not been chosen for. Raises UnknownTarget, or UsageError
    for a mapping beside `layers`.
    """
    if isinstance(target, Settled):
        return target.name, {f"^{re.escape(name)}$": t for name, t in target.chosen.targets.items()}
    if (automatic := as_auto(target)) is not None:
        return automatic.name, {}
    if isinstance(target, Mapping):
        if layers is not None:
            raise UsageError("layers beside a mapping of targets", hint="the mapping's keys select layers already")
        resolved = {str(selector): _resolve(t) for selector, t in target.items()}
        return ", ".join(f"{s}: {t.name}" for s, t in resolved.items()), resolved
    resolved_one = _resolve(target)
    return resolved_one.name, {layers if layers is not None else "all": resolved_one}


def _resolve(target: Any) -> Target:
    if isinstance(target, Target):
        return target
    found = find(target) if isinstance(target, str) else None
    if isinstance(found, Auto) or isinstance(target, Auto):
        raise UsageError("auto decides about all selected sites and cannot be one target among others",
                         hint='use target="auto" with layers=...')  # fmt: skip
    if found is None:
        names = ", ".join(e.name for e in CATALOGUE)
        raise UnknownTarget(f"unknown target {target!r}", hint=f"targets: {names} (see `rewriter targets`)")
    return found


LISTS = "`rewriter inspect` lists every site with what it can become, or why it cannot"
KERNELS = ("auto", "off", "cpp", "triton", "cuda")


def require_supported(kernels: str) -> None:
    """Options that this version does not have are refused instead of ignored."""
    if kernels not in KERNELS:
        choices = " or ".join(f'"{name}"' for name in KERNELS)
        raise UsageError(f"kernels={kernels!r} is not available in this version", hint=f"use {choices}")


def decide(
    flow: Flow,
    matches: Matches,
    target: Any,
    layers: str | None,
    probe: Callable[[Matches], Probe] | None = None,
    blocks: Callable[[], FeedForwards] = FeedForwards,
) -> Decision:
    """Plan and transform weights; with a probe, by statistics of calibration batches.

    `blocks` finds feed-forward blocks, for targets that change them; without it they stay as they are.

    Raises UnknownTarget, UsageError (selector or head count that does not fit) and NothingToRewrite.
    """
    assignment(target, layers)
    if not matches.sites:
        raise nothing(matches)
    if (automatic := as_auto(target)) is not None:
        target, layers = settle(flow, matches, automatic, layers, None if probe is None else probe(matches)), None
    name, by_selector = assignment(target, layers)
    changed = _decide_blocks(flow, matches, by_selector, probe, blocks)
    try:
        plan = make_plan(flow, matches.sites, _for_attentions(matches, by_selector))
    except PlanError as error:
        raise UsageError(str(error), hint=error.hint) from error
    steps, refused = _drop_idle(plan)
    steps, kept, bound = _drop_kept(steps, matches.sites)
    refused = (*refused, *bound)
    done: tuple[Replacement, ...] = ()
    if steps:
        transformed = (
            _transform(flow, matches, steps) if probe is None else _calibrated(flow, matches, steps, probe(matches))
        )
        done, refused = transformed[0], (*refused, *transformed[1])
    if not done and not changed.replacements:
        reasons = "; ".join(f"{n}: {r}" for n, r in (*changed.refused, *refused, *((s.name, r) for s, r in kept))[:3])
        raise NothingToRewrite(f"none of the selected sites can be rewritten to {name}: {reasons}", hint=LISTS)
    refused = (*_selected_refusals(matches), *refused, *changed.refused)
    if not isinstance(target, Settled):
        return Decision(name, done, refused, kept, changed)
    left, untried = with_choice(matches, target.chosen, {n for n, _ in refused})
    return Decision(name, done, (*refused, *untried), (*kept, *left), changed, target.chosen)


def _for_attentions(matches: Matches, by_selector: Mapping[str, Target]) -> dict[str, AttentionTarget]:
    """What targets for whole layers do to attentions, by selector; cross-attentions may get a target of their own."""
    found: dict[str, AttentionTarget] = {}
    for selector, target in by_selector.items():
        found[selector] = target.mixing if isinstance(target, Layered) else target
        if isinstance(target, Colt5):
            crossing = named_by(selector, [s for s in matches.sites if s.cross])
            found |= {f"^{re.escape(name)}$": target.crossing for name in sorted(crossing)}
    return found


def _decide_blocks(
    flow: Flow,
    matches: Matches,
    by_selector: Mapping[str, Target],
    probe: Callable[[Matches], Probe] | None,
    blocks: Callable[[], FeedForwards],
) -> BlockDecision:
    wanted = {s: t.blocks for s, t in by_selector.items() if isinstance(t, Layered)}
    if not wanted:
        return BlockDecision()
    given = None if probe is None else lambda: probe(matches)
    return decide_blocks(flow, matches, wanted, blocks(), given)


def _calibrated(
    flow: Flow, matches: Matches, steps: Sequence[Step], probe: Probe
) -> tuple[tuple[Replacement, ...], tuple[tuple[str, str], ...]]:
    """Site after site; how many are done is shown when the next one begins."""
    begun = itertools.count()
    with progress.task("calibrating", len(steps), "sites") as advance:
        return calibrated(flow, matches, steps, probe, lambda _: advance(next(begun)))


def _transform(
    flow: Flow, matches: Matches, steps: Sequence[Step]
) -> tuple[tuple[Replacement, ...], tuple[tuple[str, str], ...]]:
    """New weights without calibration, and what turned out not to be rewritable."""
    done: list[Replacement] = []
    refused: list[tuple[str, str]] = []
    shared = sharing(matches.sites)
    for step in steps:
        evidence = matches.evidence[step.site.name]
        try:
            done.append(step.target.transform(flow, step.site, evidence, shared[step.site.name]))
        except NoSublayer as reason:
            refused.append((step.site.name, str(reason)))
    return tuple(done), tuple(refused)


def is_causal(matches: Matches) -> bool:
    """Whether some attention hides later tokens: texts for such a model are joined."""
    return any(s.causal and not s.cross for s in matches.sites)


def _drop_idle(plan: Plan) -> tuple[tuple[Step, ...], tuple[tuple[str, str], ...]]:
    """Sites that are as wanted already need no rewriting."""
    idle = {s.site.name: reason for s in plan.steps if (reason := s.target.idle(s.site)) is not None}
    steps = tuple(s for s in plan.steps if s.site.name not in idle)
    return steps, (*plan.refused, *idle.items())


def _drop_kept(
    steps: Sequence[Step], sites: Sequence[AttentionSite]
) -> tuple[tuple[Step, ...], tuple[tuple[AttentionSite, str], ...], tuple[tuple[str, str], ...]]:
    """(steps left to do, sites that a target leaves as they are, sites refused for sharing weights with those)"""
    reasons: dict[str, str] = {}
    for target in dict.fromkeys(s.target for s in steps):
        reasons |= target.keeps([s.site for s in steps if s.target == target])
    kept = tuple((s.site, reasons[s.site.name]) for s in steps if s.site.name in reasons)
    left = [s for s in steps if s.site.name not in reasons]
    shared = sharing(sites)
    tied = {s.site.name: o.name for s in left for o in shared[s.site.name] if o.name in reasons}
    bound = tuple((name, f"it shares its weights with {other}, which stays") for name, other in tied.items())
    return tuple(s for s in left if s.site.name not in tied), kept, bound


def _selected_refusals(matches: Matches) -> list[tuple[str, str]]:
    return [(r.name, r.reason) for r in matches.refusals]


def nothing(matches: Matches) -> NothingToRewrite:
    """The error for a model in which no site can be rewritten."""
    if matches.refusals:
        listed = "; ".join(f"{r.name}: {r.reason}" for r in matches.refusals[:3])
        return NothingToRewrite(
            f"none of {len(matches.refusals)} attentions can be rewritten: {listed}",
            hint=LISTS,
        )
    return NothingToRewrite(
        "the model has no attention: no softmax weighs value tokens by query-key scores",
        hint="`rewriter inspect` lists what was looked at",
    )


def rows(flow: Flow, matches: Matches, replacements: Sequence[Replacement]) -> tuple[SiteRow, ...]:
    """Report rows with the error that each step makes at its own site."""
    found = []
    for r in replacements:
        measured = site_error(flow, matches.evidence[r.site.name], r)
        error, floor = measured if measured is not None else (None, None)
        found.append(SiteRow(r.site.name, r.before, r.after, r.exact, error, floor, merge=r.merge, notes=r.notes))
    return tuple(found)


def with_kept(matches: Matches, decision: Decision, site_rows: Sequence[SiteRow]) -> tuple[SiteRow, ...]:
    """Rows of rewritten sites, and of those that the target leaves as they are, in execution order."""
    before = {site.name: describe(site) for site, _ in decision.kept}
    kept = [
        SiteRow(s.name, before[s.name], before[s.name], True, 0.0, 1.0, merge="none", notes=(r,))
        for s, r in decision.kept
    ]
    order = {site.name: site.anchor for site in matches.sites}
    order |= {r.site.name: r.site.anchor for r in decision.blocks.replacements}
    return tuple(sorted((*site_rows, *kept, *decision.blocks.rows), key=lambda row: order[row.name]))


def report(
    flow: Flow,
    matches: Matches,
    decision: Decision,
    site_rows: tuple[SiteRow, ...],
    *,
    parameters: int,
    bytes_per_number: int,
    seconds: Mapping[str, float],
    fidelity: Any = None,
    whole_caches: Collection[str] = (),
    whole_projections: Collection[str] = (),
    scores: Scores = computed_scores,
) -> RewriteReport:
    """Put the report together; `parameters` is the model's count before. For the last three see `costs`."""
    before, after = costs(
        flow,
        matches,
        decision.replacements,
        bytes_per_number,
        whole_caches=whole_caches,
        whole_projections=whole_projections,
        scores=scores,
    )
    after = replace(after, flops=after.flops - decision.blocks.flops_saved(flow))
    explained = (
        arithmetic(
            flow,
            matches,
            decision.replacements,
            (before, after),
            bytes_per_number,
            whole_caches=whole_caches,
            scores=scores,
        )
        if matches.sites
        else None
    )
    return RewriteReport(
        target=decision.target,
        sites=with_kept(matches, decision, site_rows),
        refused=tuple(Refused(n, r) for n, r in decision.refused),
        parameters=Change(
            parameters,
            parameters - parameters_removed(flow, decision.replacements) + decision.blocks.parameters_added,
        ),
        kv_bytes_per_token=Change(before.kv_bytes_per_token, after.kv_bytes_per_token),
        flops=Change(before.flops, after.flops),
        fidelity=fidelity,
        seconds=dict(seconds),
        arithmetic=explained,
        drawings=_drawings(flow, matches, decision),
        choice=None if decision.chosen is None else ChoiceReport(decision.chosen),
    )


def _drawings(flow: Flow, matches: Matches, decision: Decision) -> tuple[Drawing, ...]:
    """Of what the report speaks of: sites and blocks that are rewritten, and attentions that are not understood."""
    refused = {name for name, _ in decision.refused}
    shown = [(r.site.anchor, site_picture(flow, r.site)) for r in decision.replacements]
    shown += [(r.site.anchor, feed_forward_picture(flow, r.site)) for r in decision.blocks.replacements]
    shown += [
        (r.anchor, refusal_picture(flow, r))
        for r in matches.refusals
        if r.name in refused and r.anchor >= 0  # others lie in control flow
    ]
    return distinct(picture for _, picture in sorted(shown, key=lambda pair: pair[0]))
