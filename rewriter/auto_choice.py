"""The target "auto" on its way through the pipeline: its budget, the choice, and what the choice leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from passes.budget import Budget, BudgetError, NoSolver
from passes.choose import Chosen, choose
from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.plan import PlanError, select
from passes.protocols import Probe
from passes.site import AttentionSite
from passes.targets.auto import Auto
from passes.targets.catalogue import find
from rewriter import progress
from rewriter.errors import NothingToRewrite, RewriteError, UsageError


@dataclass(frozen=True)
class Settled:
    """The target "auto" after the choice: an ordinary target for each site that changes."""

    name: str
    chosen: Chosen


def with_budget(target: Any, budget: Any) -> Any:
    """`target` with a budget that was given beside it, as a `Budget` or its text.

    Raises UsageError for a budget that cannot be read, or beside a target that is not "auto".
    """
    found = find(target) if isinstance(target, str) else target
    if budget is None or found is None:  # an unknown name is refused where names are read
        return target
    if not isinstance(found, Auto):
        raise UsageError("only the target auto takes a budget", hint='use target="auto", or leave the budget out')
    try:
        return replace(found, budget=budget if isinstance(budget, Budget) else Budget.parse(str(budget)))
    except BudgetError as error:
        raise UsageError(str(error), hint=error.hint) from error


def as_auto(target: Any) -> Auto | None:
    """The target if it is "auto" and still has to be chosen for."""
    found = find(target) if isinstance(target, str) else target
    return found if isinstance(found, Auto) else None


def settle(flow: Flow, matches: Matches, target: Auto, layers: str | None, probe: Probe | None) -> Settled:
    """Choose for every selected site. Raises UsageError, NothingToRewrite, RewriteError (no SciPy)."""
    if probe is None:
        raise UsageError(
            "auto needs calibration: what each site loses is measured on it", hint="give calibration (--calibration)"
        )
    try:
        sites = select(layers if layers is not None else "all", matches.sites)
        chosen = _chosen(flow, matches, sites, target, probe)
    except (PlanError, BudgetError) as error:
        raise UsageError(str(error), hint=error.hint) from error
    except NoSolver as error:
        raise RewriteError(str(error), hint='pip install "rewriter[auto]"') from error
    if not chosen.targets:
        reasons = "; ".join(f"{n}: {r}" for n, r in chosen.refused[:3])
        raise NothingToRewrite(
            f"under the budget {chosen.budget} every site stays as it is{f' ({reasons})' if reasons else ''}",
            hint="allow more drift, or ask for fewer K/V bytes",
        )
    return Settled(target.name, chosen)


def _chosen(flow: Flow, matches: Matches, sites: Sequence[AttentionSite], target: Auto, probe: Probe) -> Chosen:
    """Site after site is tried; how many are done is shown when the next one begins."""
    begun = itertools.count()
    with progress.task("measuring", len(sites), "sites") as advance:
        return choose(flow, matches, sites, target, probe, lambda _: advance(next(begun)))


def with_choice(
    matches: Matches, chosen: Chosen, refused: Collection[str]
) -> tuple[tuple[tuple[AttentionSite, str], ...], tuple[tuple[str, str], ...]]:
    """(sites that the choice leaves as they are, (name, reason) of what it could not try and is not `refused` yet)"""
    weighed = {name for unit in chosen.units for name in unit}
    reason = f"it stays: auto spends the budget {chosen.budget} elsewhere"
    kept = tuple((s, reason) for s in matches.sites if s.name in weighed - set(chosen.targets))
    return kept, tuple(r for r in chosen.refused if r[0] not in {*weighed, *refused})
