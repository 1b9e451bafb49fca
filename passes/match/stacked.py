"""Attentions whose weights are stored by heads, for doors that write plain matrices only: found, and refused."""

from __future__ import annotations

from dataclasses import replace

from passes.dataflow import Flow
from passes.match.attention import Matches, find_attention
from passes.site import Projection, Refusal

REASON = (
    "the weights of its projections are no plain matrices (Einsum, or a stack of them with an axis for heads), which "
    "are rewritten in .onnx files only: export the model, or write the same numbers as linear layers"
)


def find_plain_attention(flow: Flow) -> Matches:
    """As `find_attention`, with a refusal for each attention whose heads are stored so; such an output projection is
    left aside."""
    matches = find_attention(flow)
    stacked = [s for s in matches.sites if any(_is_stacked(o.projection) for o in (s.q, s.k, s.v))]
    refused = [Refusal(s.name, s.layer, REASON, s.anchor, s.owner, s.heads, s.head_dim) for s in stacked]
    kept = tuple(
        replace(s, out=None, merged=None) if s.out is not None and _is_stacked(s.out) else s
        for s in matches.sites
        if all(s is not other for other in stacked)
    )
    return replace(matches, sites=kept, refusals=tuple(sorted((*matches.refusals, *refused), key=lambda r: r.anchor)))


def _is_stacked(projection: Projection) -> bool:
    return projection.weight_axes is not None or projection.factor != 1.0
