"""From names to a plan and replacements: the middle of the pipeline, the same for both doors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from passes.calibrate import calibrated
from passes.cost import costs, parameters_removed
from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.measure import site_error
from passes.plan import Plan, PlanError, make_plan, sharing
from passes.protocols import Probe
from passes.targets.catalogue import CATALOGUE, Target, find
from passes.targets.replacement import Replacement
from rewriter.errors import NothingToRewrite, UnknownTarget, UsageError
from rewriter.report.rewrite_report import Change, Refused, RewriteReport, SiteRow


@dataclass
class Stopwatch:
    """Wall seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Decision:
    """What will be installed, and what was selected and refused: (name, reason)."""

    target: str
    replacements: tuple[Replacement, ...]
    refused: tuple[tuple[str, str], ...]


def assignment(target: Any, layers: str | None) -> tuple[str, dict[str, Target]]:
    """(what to call it, target by selector) for a name, a target object or a mapping from selectors to either.

    Raises UnknownTarget, or UsageError for a mapping beside `layers`.
    """
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
    if found is None:
        names = ", ".join(e.name for e in CATALOGUE)
        raise UnknownTarget(f"unknown target {target!r}", hint=f"targets: {names} (see `rewriter targets`)")
    return found


KERNELS = ("auto", "off", "cpp", "triton")


def require_supported(kernels: str) -> None:
    """Options that this version does not have are refused instead of ignored."""
    if kernels not in KERNELS:
        choices = " or ".join(f'"{name}"' for name in KERNELS)
        raise UsageError(f"kernels={kernels!r} is not available in this version", hint=f"use {choices}")


def decide(
    flow: Flow, matches: Matches, target: Any, layers: str | None, probe: Callable[[Matches], Probe] | None = None
) -> Decision:
    """Plan and transform weights; with a probe, by statistics of calibration batches.

    Raises UnknownTarget, UsageError (selector or head count that does not fit) and NothingToRewrite.
    """
    name, by_selector = assignment(target, layers)
    if not matches.sites:
        raise nothing(matches)
    try:
        plan = make_plan(flow, matches.sites, by_selector)
    except PlanError as error:
        raise UsageError(str(error), hint=error.hint) from error
    useful, refused = _drop_idle(plan)
    if not useful.steps:
        reasons = "; ".join(f"{n}: {r}" for n, r in refused[:3])
        raise NothingToRewrite(f"none of the selected sites can be rewritten to {name}: {reasons}")
    if probe is not None:
        return Decision(
            name, calibrated(flow, matches, useful.steps, probe(matches)), (*_selected_refusals(matches), *refused)
        )
    replacements = tuple(
        step.target.transform(flow, step.site, matches.evidence[step.site.name], sharing(step.site, matches.sites))
        for step in useful.steps
    )
    return Decision(name, replacements, (*_selected_refusals(matches), *refused))


def is_causal(matches: Matches) -> bool:
    """Whether some attention hides later tokens: texts for such a model are joined."""
    return any(s.causal and not s.cross for s in matches.sites)


def _drop_idle(plan: Plan) -> tuple[Plan, tuple[tuple[str, str], ...]]:
    """Sites that have the wanted head count already need no rewriting."""
    idle = tuple(
        (s.site.name, f"it has {s.site.kv_heads} key/value heads already")
        for s in plan.steps
        if s.site.kv_heads == s.target.kv_heads
    )
    steps = tuple(s for s in plan.steps if s.site.kv_heads != s.target.kv_heads)
    return Plan(steps, plan.refused), (*plan.refused, *idle)


def _selected_refusals(matches: Matches) -> list[tuple[str, str]]:
    return [(r.name, r.reason) for r in matches.refusals]


def nothing(matches: Matches) -> NothingToRewrite:
    """The error for a model in which no site can be rewritten."""
    if matches.refusals:
        listed = "; ".join(f"{r.name}: {r.reason}" for r in matches.refusals[:3])
        return NothingToRewrite(
            f"none of {len(matches.refusals)} attentions can be rewritten: {listed}",
            hint="`rewriter inspect` lists every site with its reason",
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
) -> RewriteReport:
    """Put the report together; `parameters` is the model's count before. For the last two see `costs`."""
    before, after = costs(
        flow,
        matches,
        decision.replacements,
        bytes_per_number,
        whole_caches=whole_caches,
        whole_projections=whole_projections,
    )
    return RewriteReport(
        target=decision.target,
        sites=site_rows,
        refused=tuple(Refused(n, r) for n, r in decision.refused),
        parameters=Change(parameters, parameters - parameters_removed(decision.replacements)),
        kv_bytes_per_token=Change(before.kv_bytes_per_token, after.kv_bytes_per_token),
        flops=Change(before.flops, after.flops),
        fidelity=fidelity,
        seconds=dict(seconds),
    )
