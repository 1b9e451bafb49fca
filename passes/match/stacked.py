"""Attentions whose weights are stored by heads, for doors that write plain matrices only: found, and refused."""

from __future__ import annotations

from dataclasses import replace

from passes.match.attention import Matches
from passes.site import AttentionSite, Refusal

REASON = (
    "the weights of its projections are no plain matrices (Einsum, or a stack of them with an axis for heads), which "
    "are rewritten in .onnx files only: export the model, or write the same numbers as linear layers"
)


def without_stacked(matches: Matches) -> Matches:
    """`matches` with a refusal for each attention that has such weights."""
    stacked = [s for s in matches.sites if _is_stacked(s)]
    refused = [Refusal(s.name, s.layer, REASON, s.anchor, s.owner, s.heads, s.head_dim) for s in stacked]
    kept = tuple(s for s in matches.sites if s not in stacked)
    return replace(matches, sites=kept, refusals=tuple(sorted((*matches.refusals, *refused), key=lambda r: r.anchor)))


def _is_stacked(site: AttentionSite) -> bool:
    maps = (site.q.projection, site.k.projection, site.v.projection)
    return any(p.weight_axes is not None or p.factor != 1.0 for p in maps)
