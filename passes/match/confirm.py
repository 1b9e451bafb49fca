"""A description that holds at one size only is no description: sites must read the same at two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from passes.match.attention import Matches
from passes.site import AttentionSite, Operand, Refusal


def confirm(first: Matches, second: Matches) -> Matches:
    """`first` with every site that `second`, the same program recorded at another size, does not confirm refused."""
    others = {s.anchor: s for s in second.sites}
    reasons = {r.anchor: r.reason for r in second.refusals}
    sites: list[AttentionSite] = []
    refusals = list(first.refusals)
    for site in first.sites:
        other = others.get(site.anchor)
        if other is None:
            reason = reasons.get(site.anchor, "there is no attention at another size")
            refusals.append(Refusal.of(site, f"it does not replay at a second size: {reason}"))
        elif difference := _difference(site, other):
            refusals.append(Refusal.of(site, f"its {difference} differs from one size to another"))
        else:
            worst = max(site.replay_error, other.replay_error)
            sites.append(replace(site, replay_error=worst, causal=site.causal and other.causal))
    return replace(first, sites=tuple(sites), refusals=tuple(sorted(refusals, key=lambda r: r.anchor)))


def _difference(a: AttentionSite, b: AttentionSite) -> str | None:
    for name in ("heads", "kv_heads", "head_dim", "value_dim", "group", "output_axes"):
        if getattr(a, name) != getattr(b, name):
            return name.replace("_", " ")
    if abs(a.scale - b.scale) > 1e-5 * abs(a.scale):
        return "scale"
    for role, x, y in (("query", a.q, b.q), ("key", a.k, b.k), ("value", a.v, b.v)):
        if what := _operand_difference(x, y):
            return f"{role} {what}"
    return None


def _operand_difference(a: Operand, b: Operand) -> str | None:
    if not np.array_equal(a.columns, b.columns):
        return "row map"
    for name in ("rotary", "stem", "seam", "stem_axes", "seam_axes", "stem_features", "batch_first", "past"):
        if getattr(a, name) != getattr(b, name):
            return name.replace("_", " ")
    if len(a.streams) != len(b.streams):
        return "number of streams"
    differing = (_operand_difference(x, y) for x, y in zip(a.streams, b.streams, strict=True))
    return next((what for what in differing if what), None)
