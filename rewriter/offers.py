"""What each site of a model can become: the targets that `rewriter.inspect` offers, which `optimize` then does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from codegen.spec import Structure
from passes.dataflow import Flow
from passes.feed_forward_site import FeedForwardSite
from passes.hidden_keys import padding_obstacle
from passes.match.attention import Matches
from passes.match.feed_forward import FeedForwards
from passes.plan import sharing
from passes.site import AttentionSite
from passes.sublayer import NoSublayer, sublayer
from passes.targets.block import surroundings
from passes.targets.catalogue import Layered
from passes.targets.colt5 import Colt5
from passes.targets.decoupled import DecoupledHeads
from passes.targets.fourier import HYBRID, Fourier
from passes.targets.gated_pair import gated_pair
from passes.targets.gated_unit import Form, GatedUnit
from passes.targets.grouped_query import GroupedQuery
from passes.targets.linear_attention import LinearHeads
from passes.targets.linear_mixing import LinearMixer
from passes.targets.sparse import SparseFixed, SparseStrided, Window
from passes.targets.sparse_mixer import sparse_mixer
from rewriter.block_decision import sharer
from rewriter.errors import UnsupportedModel

Kind = Literal["file", "module", "graph"]
"""What targets depend on beside the sites themselves."""
Limit = Callable[[str], bool]
"""Whether a target, by name, is left to a site."""

SPARSE = (sparse_mixer(), sparse_mixer(fast=True))
IN_MODULES_OF_THEIR_OWN = (Window(), SparseFixed(), SparseStrided(), LinearHeads())
"""What torch modules do in a generated module only, since their own forward attends to all keys."""
PAIRS = tuple(gated_pair(form) for form in get_args(Form))
_WHOLE: tuple[Layered, ...] = (*SPARSE, *PAIRS, Colt5())
_KEEPING = ((Fourier(keep=HYBRID).name, Fourier(keep=HYBRID)), *((t.name, t.mixing) for t in SPARSE))
"""What targets that keep some attentions do to the others, by the target's name."""


def offers(
    flow: Flow, matches: Matches, blocks: FeedForwards, kind: Kind, limits: Mapping[str, Limit]
) -> dict[str, tuple[str, ...]]:
    """By name of the attention or the feed-forward block, the targets that would change it.

    `limits` says of some names which targets are left to them (see `limits_of_modules`).
    """
    found = _without_idle(matches.sites, {s.name: _targets(flow, matches, s, kind) for s in matches.sites})
    if kind == "module":
        found = _of_modules(flow, matches, found)
    alone = [f for f in blocks.sites if sharer(f, blocks.sites) is None]
    found |= {f.name: _block_targets(flow, matches, f) if f in alone else () for f in blocks.sites}
    return {s: tuple(n for n in names if s not in limits or limits[s](n)) for s, names in found.items()}


def limits_of_modules(
    model: Any, flow: Flow, matches: Matches, blocks: FeedForwards, call: tuple[Sequence[Any], Mapping[str, Any]]
) -> dict[str, Limit]:
    """Which targets are left to attentions whose module no other can be called in the place of, to those that hand on
    attention weights, and to feed-forward blocks that have no module; by name. What has no limits is left out."""
    from rewriter.install.call_record import record_calls
    from rewriter.install.expert_mixing import block_modules, candidates
    from rewriter.install.own_module import owner_of, read_calls
    from rewriter.install.stand_in import REASON, not_called_by_place
    from rewriter.install.stored_heads import stores_heads

    try:
        owned = {s.name: owner_of(flow, s) for s in matches.sites}
        owners = dict.fromkeys([*owned.values(), *candidates(model, flow, blocks.sites)])
        records = record_calls(model, owners, *call) if owners else {}
        placed = block_modules(model, flow, blocks.sites, records)
        read, unread = read_calls(flow, matches.sites, records)
        fixed = not_called_by_place(model, records.keys() & set(owned.values()), *call)
        unread |= {name: REASON.format(owner=owner) for name, owner in owned.items() if owner in fixed}
    except UnsupportedModel:
        return dict.fromkeys([*(s.name for s in matches.sites), *(b.name for b in blocks.sites)], shares_heads)
    stored = {s.name: stores_heads(flow, s) for s in matches.sites if s.name in unread}
    limits: dict[str, Limit] = {name: shares_heads if stored[name] else _nothing for name in unread}
    limits |= dict.fromkeys([b.name for b in blocks.sites if b.name not in placed], shares_heads)
    weighed = [name for name, protocol in read.items() if "weights" in protocol.returns]
    return limits | dict.fromkeys(weighed, lambda name: name != LinearHeads().name)


def _targets(flow: Flow, matches: Matches, site: AttentionSite, kind: Kind) -> tuple[str, ...]:
    """Names of the targets that would change this site."""
    names: list[str] = []
    if GroupedQuery(1).refuses(site) is None:
        names += [GroupedQuery(n).name for n in GroupedQuery(1).legal(site) if n < site.kv_heads]
    if Fourier().refuses(site) is None:
        with contextlib.suppress(NoSublayer):
            sublayer(flow, site, matches.evidence[site.name])
            names += [t.name for t in (Fourier(), Fourier(keep=HYBRID), Fourier(hartley=True))]
            names += [LinearMixer(structure).name for structure in Structure]
            names += [t.name for t in SPARSE]
    if GatedUnit().refuses(site) is None:
        with contextlib.suppress(NoSublayer):
            sublayer(flow, site, matches.evidence[site.name])
            names += [GatedUnit(form).name for form in get_args(Form)]
    names += _conditional(flow, matches, site, kind)
    names += [t.name for t in IN_MODULES_OF_THEIR_OWN if t.refuses(site) is None]
    return tuple(names)


def _without_idle(sites: Sequence[AttentionSite], choices: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Without targets that keep the top attentions of a model, where these are all that it has or the others share
    weights with them; and without those that share, where there are more."""
    shared = sharing(sites)
    found = dict(choices)
    for name, target in _KEEPING:
        asked = [s for s in sites if name in choices[s.name]]
        kept = target.keeps(asked)
        stay = {s.name for s in asked if any(o.name in kept for o in shared[s.name])}
        bound = stay if len(stay) == len(asked) else stay - kept.keys()
        found |= {site: tuple(n for n in found[site] if n != name) for site in bound}
    return found


def _of_modules(flow: Flow, matches: Matches, choices: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """With those that only modules can be rewritten to, and without those that need one that cannot be generated."""
    from rewriter.install.own_module import obstacles
    from rewriter.install.stored_heads import stores_heads

    apart = DecoupledHeads()
    kept = obstacles(flow, matches.sites)
    without = {t.name for t in IN_MODULES_OF_THEIR_OWN}
    found: dict[str, tuple[str, ...]] = {}
    for site in matches.sites:
        names = choices[site.name]
        if site.name in kept:
            whole = not stores_heads(flow, site)
            found[site.name] = tuple(n for n in names if n not in without and not (whole and shares_heads(n)))
        else:
            able = apart.refuses(site) is None and apart.idle(site) is None
            found[site.name] = (*names, apart.name) if able else names
    return found


def shares_heads(name: str) -> bool:
    """Whether a target is one that a module's own forward can compute."""
    return name == "mqa" or name.startswith("gqa")


def _nothing(name: str) -> bool:
    """No target is left."""
    return False


def _conditional(flow: Flow, matches: Matches, site: AttentionSite, kind: Kind) -> tuple[str, ...]:
    target = Colt5()
    if site.cross:
        able = target.crossing.refuses(site) is None and target.crossing.idle(site) is None
        return (target.name,) if able else ()
    if target.mixing.refuses(site) is None:
        with contextlib.suppress(NoSublayer):
            target.mixing.transform(flow, site, matches.evidence[site.name])
            return (target.name,) if kind == "module" or padding_obstacle(flow, site) is None else ()
    return ()


def _block_targets(flow: Flow, matches: Matches, site: FeedForwardSite) -> tuple[str, ...]:
    around = surroundings(flow, matches, site)
    return tuple(t.name for t in _WHOLE if t.blocks.refuses(site, around) is None)
