"""Rows of ``rewriter inspect --json``: a site, a feed-forward block, a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passes.feed_forward_site import FeedForwardSite
from passes.site import AttentionSite, Refusal


def site_row(site: AttentionSite, choices: Sequence[str]) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": "attention",
        "layer": site.layer,
        "status": "rewritable",
        "reason": None,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "causal": site.causal,
        "cross": site.cross,
        "cached": site.cached,
        "rotary": site.k.rotary.kind if site.k.rotary is not None else None,
        "qk_norm": site.qk_norm,
        "score_modifiers": [m.kind for m in site.modifiers],
        "layout": _layout(site),
        "replay_error": site.replay_error,
        "targets": list(choices),
    }


def _layout(site: AttentionSite) -> str:
    """Which projections feed the site and how heads lie in them."""
    nodes = {site.q.projection.node, site.k.projection.node, site.v.projection.node}
    fused = {1: "fused qkv", 2: "two projections share q, k, v", 3: "separate q, k, v"}[len(nodes)]
    late = "keys run as they are" if site.k.headwise else "keys repeated before they are rotated"
    keys = f"keys {' '.join(site.k.seam_axes)}" if site.k.seam else late
    joined = f", tokens of {len(site.k.parts)} streams joined" if site.joined else ""
    return f"{fused}, {keys}{joined}"


def feed_forward_row(site: FeedForwardSite, choices: Sequence[str]) -> dict[str, Any]:
    activation = site.activation.name or "an activation without a name"
    shape = f"{site.width} → {site.hidden} → {site.width}"
    described = {"layer": site.layer, "layout": f"{site.style}, {activation}, {shape}"}
    measured = {"replay_error": site.replay_error, "targets": list(choices)}
    return {**_blank_row(site.name, "feed_forward"), "status": "rewritable", **described, **measured}


def refusal_row(refusal: Refusal, kind: str) -> dict[str, Any]:
    seen = {"heads": refusal.heads, "head_dim": refusal.head_dim}
    why = {"layer": refusal.layer, "status": "refused", "reason": refusal.reason}
    return {**_blank_row(refusal.name, kind), **why, **seen}


def _blank_row(name: str, kind: str) -> dict[str, Any]:
    """The keys of every row, empty: what has no meaning for a site, or is not known of it, stays so."""
    return {
        "name": name,
        "kind": kind,
        "layer": None,
        "status": "",
        "reason": None,
        "heads": None,
        "kv_heads": None,
        "head_dim": None,
        "causal": None,
        "cross": None,
        "cached": None,
        "rotary": None,
        "qk_norm": None,
        "score_modifiers": [],
        "layout": "",
        "replay_error": None,
        "targets": [],
    }
