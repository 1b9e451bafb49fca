"""Which target where: selectors, legality and sharing, decided before any weight is touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from passes.dataflow import Flow, Value
from passes.site import AttentionSite
from passes.targets.catalogue import AttentionTarget


class PlanError(ValueError):
    """A selector, or a number in a target, that does not fit; `hint` says what would."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Step:
    site: AttentionSite
    target: AttentionTarget


@dataclass(frozen=True)
class Plan:
    """What will be done, in execution order, and which selected sites will be left alone and why."""

    steps: tuple[Step, ...]
    refused: tuple[tuple[str, str], ...]


def select(selector: str, sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """Sites that a selector names.

    "all"; layer numbers and ranges ("3", "0-7", "0-3,8", "-4:" for the last four layers, "2:6"); "encoder",
    "decoder", "cross"; anything else is a regular expression searched in site names.
    Raises PlanError if it names nothing or is no regular expression.
    """
    names = _predicate(selector.strip(), sites)
    chosen = [s for s in sites if names(s)]
    if not chosen:
        layers = sorted({s.layer for s in sites})
        raise PlanError(
            f"layer selector {selector!r} selects no rewritable site",
            f"rewritable layers: {', '.join(map(str, layers)) or 'none'}; selectors: all, 0-7, -4:, encoder, decoder, "
            "cross, or a regular expression on site names",
        )
    return chosen


class Selectable(Protocol):
    """What a selector looks at: an attention or a feed-forward block."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def cross(self) -> bool: ...


_NUMBER = "[0-9]{1,18}"
_LAYERS = f"({_NUMBER}(-{_NUMBER})?|-?({_NUMBER})?:-?({_NUMBER})?)"
"""A layer, layers from one to another, or a slice of them."""


def named_by(selector: str, sites: Sequence[Selectable]) -> set[str]:
    """Names of the sites that a selector names; none is no error. Raises PlanError for a broken expression."""
    names = _predicate(selector.strip(), sites)
    return {s.name for s in sites if names(s)}


def _predicate(selector: str, sites: Sequence[Selectable]) -> Callable[[Selectable], bool]:
    if selector == "all":
        return lambda s: True
    if selector == "cross":
        return lambda s: s.cross
    if selector in {"encoder", "decoder"}:
        return lambda s: bool(re.search(rf"(^|[._/]){selector}([._/]|$)", s.name)) and not s.cross
    if not selector:  # as an expression it would name every site
        raise PlanError("the layer selector is empty", 'write "all" for all sites')
    if re.fullmatch(f"{_LAYERS}(,{_LAYERS})*", selector):
        wanted = _layer_numbers(selector, sorted({s.layer for s in sites}))
        return lambda s: s.layer in wanted
    try:
        pattern = re.compile(selector)
    except re.error as error:
        message = f"layer selector {selector!r} is not a valid regular expression: {error}"
        raise PlanError(message, "escape special characters") from error
    return lambda s: bool(pattern.search(s.name))


def _layer_numbers(selector: str, layers: list[int]) -> set[int]:
    wanted: set[int] = set()
    for part in selector.split(","):
        if ":" in part:
            start, stop = (int(p) if p else None for p in part.split(":"))
            wanted.update(layers[slice(start, stop)])
        elif "-" in part:
            low, high = map(int, part.split("-"))
            wanted.update(n for n in layers if low <= n <= high)
        else:
            wanted.add(int(part))
    return wanted


def make_plan(flow: Flow, sites: Sequence[AttentionSite], assignment: Mapping[str, AttentionTarget]) -> Plan:
    """Assign targets by selector (later selectors win) and check every site.

    Raises PlanError for a number that does not fit a site, listing sites and legal choices.
    """
    by_site: dict[str, AttentionTarget] = {}
    for selector, target in assignment.items():
        by_site.update({s.name: target for s in select(selector, sites)} if sites else {})
    reasons = _refusals(sites, by_site)
    chosen = [s for s in sites if s.name in by_site]
    steps = [Step(s, by_site[s.name]) for s in chosen if s.name not in reasons]
    _require_legal(steps)
    return Plan(tuple(steps), tuple((s.name, reasons[s.name]) for s in chosen if s.name in reasons))


def _refusals(sites: Sequence[AttentionSite], by_site: Mapping[str, AttentionTarget]) -> dict[str, str]:
    """Why selected sites cannot be rewritten, by name; one refusal carries over to all that share its weights."""
    reasons = {s.name: r for s in sites if s.name in by_site and (r := by_site[s.name].refuses(s)) is not None}
    shared = sharing(sites)
    while True:
        left = {name: target for name, target in by_site.items() if name not in reasons}
        more = {
            s.name: r for s in sites if s.name in left and (r := _partial_sharing(s, shared[s.name], left)) is not None
        }
        if not more:
            return reasons
        reasons |= more


def _require_legal(steps: Sequence[Step]) -> None:
    wrong = [(s, misfit) for s in steps if (misfit := s.target.misfit(s.site)) is not None]
    if not wrong:
        return
    first, reason = wrong[0]
    by_choices: dict[str, list[str]] = {}
    for s, misfit in wrong:
        if misfit.wanted == reason.wanted:
            by_choices.setdefault(misfit.legal, []).append(s.site.name)
    listed = "; ".join(f"{choices} at {_shortened(names)}" for choices, names in by_choices.items())
    raise PlanError(
        f"{first.target.name} does not fit {first.site.name} ({reason.present})", f"{reason.wanted}: {listed}"
    )


def _shortened(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _partial_sharing(
    site: AttentionSite, sharing: Sequence[AttentionSite], chosen: Mapping[str, AttentionTarget]
) -> str | None:
    """Sites that share a stored projection are rewritten together or not at all."""
    for other in sharing:
        if other.name != site.name and chosen.get(other.name) != chosen[site.name]:
            return f"it shares its weights with {other.name}, which is not rewritten to the same target"
    return None


def sharing(sites: Sequence[AttentionSite]) -> dict[str, list[AttentionSite]]:
    """By a site's name, the sites that use its key or value projection, itself among them, in their order."""
    users = _users(sites)
    order = {site.name: i for i, site in enumerate(sites)}
    found: dict[str, list[AttentionSite]] = {}
    for site in sites:
        mine = {s.name: s for weight in _key_value_weights(site) for s in users[weight]}
        found[site.name] = sorted(mine.values(), key=lambda s: order[s.name])
    return found


def _users(sites: Sequence[AttentionSite]) -> dict[Value, list[AttentionSite]]:
    users: dict[Value, list[AttentionSite]] = {}
    for site in sites:
        for weight in _key_value_weights(site):
            users.setdefault(weight, []).append(site)
    return users


def _key_value_weights(site: AttentionSite) -> set[Value]:
    return {operand.projection.weight for _, operand in site.shared}
