"""The target "auto" from beginning to end: measure units, solve for the best mix, measure what the mix really does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from passes.budget import Budget, BudgetError, Choice, Totals, added, best_mix, frontier
from passes.cost import costs
from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.plan import Step, sharing
from passes.protocols import Probe
from passes.sensitivity import Effect, Sensitivity
from passes.site import AttentionSite
from passes.targets.auto import Auto
from passes.targets.catalogue import AttentionTarget

ROUNDS = 3
"""Plans that are measured until a drift budget is met."""
NEAR = 0.8
"""Part of a drift budget that a plan should use at least, if another one might."""


@dataclass(frozen=True)
class Mix:
    """One plan of the frontier: what it should do, by adding up what its units do alone.

    Attributes:
        drift: predicted.
        kv: part of the K/V bytes that is left.
        speed: factor by which flops fall.
        targets: for each unit, as in `Chosen.units`, the target's name or "keep".
    """

    drift: float
    kv: float
    speed: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """What was decided, and everything it rests on.

    Attributes:
        budget, kind: limits, and what drift is: "kl" in nats or "cosine" for 1 - cosine.
        units: names of the sites of each.
        effects: what each unit does alone, for every candidate.
        plan: the chosen mix, and its targets by site name, kept sites left out.
        measured: the plan's drift with weights fitted as a whole, on batches that are not fitted on.
        frontier: the best mixes, least saved first.
        held, batches: how many of the calibration batches were measured on, of all.
        refused: (site, reason) where nothing could be tried.
    """

    budget: Budget
    kind: str
    units: tuple[tuple[str, ...], ...]
    effects: tuple[Effect, ...]
    plan: Mix
    targets: dict[str, AttentionTarget]
    measured: float
    frontier: tuple[Mix, ...]
    held: int
    batches: int
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Unit:
    names: tuple[str, ...]
    effects: tuple[Effect, ...]
    choices: tuple[Choice, ...]
    """The first keeps the unit as it is."""

    def label(self, index: int) -> str:
        return self.effects[index - 1].target.name if index else "keep"


def choose(
    flow: Flow,
    matches: Matches,
    sites: Sequence[AttentionSite],
    target: Auto,
    probe: Probe,
    tell: Callable[[str], None] | None = None,
) -> Chosen:
    """The best plan for `sites` under the target's budget.

    Raises BudgetError if there is none, or the target has no budget; NoSolver without SciPy.
    """
    if target.budget is None:
        raise BudgetError("auto needs a budget", "give kv=0.5, speed=1.3 or drift=0.02")
    measure = Sensitivity(flow, matches, probe)
    units, refused = _units(sites, matches)
    effects, reasons = measure.effects(units, target.tried, tell)
    before = costs(flow, matches, (), 1)[0]
    totals = Totals(before.kv_bytes_per_token, before.flops)
    known = [_unit(unit, effects) for unit in units]
    choices = [u.choices for u in known]
    mix, measured = _settled(known, target.budget, totals, measure, matches)
    return Chosen(
        budget=target.budget,
        kind=measure.answer.kind,
        units=tuple(u.names for u in known),
        effects=tuple(effects),
        plan=_mix(known, mix, totals),
        targets={n: u.effects[i - 1].target for u, i in zip(known, mix, strict=True) if i for n in u.names},
        measured=measured,
        frontier=tuple(_mix(known, m, totals) for m in frontier(choices, totals)),
        held=measure.held,
        batches=len(measure.fitted),
        refused=(*refused, *reasons.items()),
    )


def _units(
    sites: Sequence[AttentionSite], matches: Matches
) -> tuple[list[tuple[AttentionSite, ...]], list[tuple[str, str]]]:
    """Sites that can only be rewritten together, and (name, reason) of those that cannot be chosen for."""
    names = {s.name for s in sites}
    found: dict[tuple[str, ...], tuple[AttentionSite, ...]] = {}
    refused: list[tuple[str, str]] = []
    for site in sites:
        unit = _closed(site, matches)
        outside = next((s.name for s in unit if s.name not in names), None)
        silent = next((s.name for s in unit if s.out is None), None)
        if outside is not None:
            refused.append((site.name, f"it shares its weights with {outside}, which is not selected"))
        elif silent is not None:
            refused.append((site.name, f"no output projection follows {silent}, so its effect cannot be measured"))
        elif run := next((s for s in unit if s.headwise), None):
            refused.append((site.name, f"{run.stays}, so its effect is not measured; share its heads by gqaN"))
        else:
            found[tuple(s.name for s in unit)] = unit
    return list(found.values()), refused


def _closed(site: AttentionSite, matches: Matches) -> tuple[AttentionSite, ...]:
    """The site and all that share weights with it, directly or through others, in execution order."""
    unit = {site.name: site}
    todo, shared = [site], sharing(matches.sites)
    while todo:
        for other in shared[todo.pop().name]:
            if other.name not in unit:
                unit[other.name] = other
                todo.append(other)
    return tuple(sorted(unit.values(), key=lambda s: s.anchor))


def _unit(sites: Sequence[AttentionSite], effects: Sequence[Effect]) -> _Unit:
    names = tuple(s.name for s in sites)
    mine = tuple(e for e in effects if e.sites == names)
    return _Unit(names, mine, (Choice(), *(Choice(e.drift, e.kv, e.flops) for e in mine)))


def _mix(units: Sequence[_Unit], mix: Sequence[int], totals: Totals) -> Mix:
    total = added([u.choices for u in units], mix)
    labels = tuple(u.label(i) for u, i in zip(units, mix, strict=True))
    return Mix(total.drift, totals.kv_left(total.kv), totals.speed(total.flops), labels)


def _settled(
    units: Sequence[_Unit], budget: Budget, totals: Totals, measure: Sensitivity, matches: Matches
) -> tuple[tuple[int, ...], float]:
    """The mix and its measured drift.

    Drift does not quite add up. Where it is limited, the limit on the sum is therefore corrected by what a measured
    plan's drift was of its sum, a few times; the best plan that was measured to be within the budget is taken.
    """
    choices, limit = [u.choices for u in units], budget.drift
    asked = budget
    tried: dict[tuple[int, ...], float] = {}
    for _ in range(ROUNDS if limit is not None else 1):
        mix = best_mix(choices, asked, totals)
        if mix in tried:
            break
        tried[mix] = measure.of_plan(_steps(units, mix, matches)) if any(mix) else 0.0
        predicted = added(choices, mix).drift
        if limit is None or not predicted or NEAR * limit <= tried[mix] <= limit:
            break
        asked = replace(budget, drift=limit * predicted / max(tried[mix], 1e-30))
    within = [m for m, drift in tried.items() if limit is None or drift <= limit]
    if not within:
        raise BudgetError(
            f"no plan was measured to stay within the budget {budget}",
            f"the nearest has a drift of {min(tried.values()):.3g}; allow that much, or more K/V heads",
        )
    best = max(within, key=lambda m: added(choices, m).kv + 1e-3 * added(choices, m).flops)
    return best, tried[best]


def _steps(units: Sequence[_Unit], mix: Sequence[int], matches: Matches) -> list[Step]:
    sites = {s.name: s for s in matches.sites}
    return [Step(sites[n], u.effects[i - 1].target) for u, i in zip(units, mix, strict=True) if i for n in u.names]
