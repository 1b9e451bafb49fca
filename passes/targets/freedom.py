"""What may be done to one attention's heads beyond averaging them, read off the site and its evidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passes.dataflow import Flow
from passes.match.attention import Evidence
from passes.match.operands import Traced
from passes.projections import layout_of
from passes.site import AttentionSite, Modifier, Projection
from passes.weights.merge import Freedom

BIASED = "its scores get a bias that is computed from hidden states, from its queries or keys mostly"
_EVEN = 2e-2
"""Spread up to which the factors on a head's features count as equal; half precisions round rotations."""


def freedom_of(flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()) -> Freedom:
    """The freedom of one site. `sharing`: all sites that use the same weights, this one among them."""
    alike = [s for s in sharing if s.name != site.name]
    return Freedom(
        partner=None if site.k.rotary is None else site.k.rotary.partner,
        keys=_keys(flow, site, evidence, alike),
        values=_values(flow, site, evidence, alike),
        centred=all(m.kind not in {"softcap", "sinks"} for m in site.modifiers),
        order=_order(flow, site, evidence, alike),
    )


def _order(flow: Flow, site: AttentionSite, evidence: Evidence, alike: Sequence[AttentionSite]) -> str | None:
    """Query heads change places with their rows of the query projection and their columns of the output projection;
    whatever else treats heads apart would have to follow."""
    if alike:
        return "other attentions use the same weights"
    if site.bent:
        return "a norm stands between projection and score, and may differ from head to head"
    if site.hidden_bias:
        return BIASED
    if site.stays:
        return f"its attention stays as it is: {site.stays}"
    if any(_by_head(flow, m) for m in site.modifiers):
        return "its scores get a bias or a mask for each head"
    if evidence.q.tokens.offset is not None:
        return "a bias is added to the query heads after their projection"
    return _shared(flow, site.q.projection, "query", 1) or _values(flow, site, evidence, alike)


def _by_head(flow: Flow, modifier: Modifier) -> bool:
    """Whether a step between score and softmax has numbers for each head, equal or not."""
    if modifier.kind == "sinks":
        return True
    if modifier.value is None:
        return False
    shape = flow.shape(modifier.value)
    if modifier.apart is not None:
        return any(size != 1 for size in shape[-4:-2])
    return len(shape) >= 3 and shape[-3] != 1


def _keys(flow: Flow, site: AttentionSite, evidence: Evidence, alike: Sequence[AttentionSite]) -> str | None:
    if site.k.norm is not None or site.q.norm is not None:
        return "a norm stands between projection and score, which turned heads would not pass unchanged"
    if site.hidden_bias:
        return BIASED
    if site.q.headwise or site.k.headwise or site.scores_rounded:
        return f"its attention stays as it is: {site.stays}"
    turns = [None if o.rotary is None else o.rotary.partner for o in (site.q, site.k)]
    if turns[0] != turns[1]:
        return "queries and keys are rotated differently"
    for role, traced in (("query", evidence.q), ("key", evidence.k)):
        if traced.tokens.offset is not None:
            return f"a bias is added to the {role} heads after their projection"
        if not _even(traced):
            return f"the {role} features are scaled apart from each other"
    if any(s.q.projection.weight != site.q.projection.weight for s in alike):
        return "other attentions with queries of their own read the same keys"
    return _shared(flow, site.q.projection, "query", len(alike) + 1)


def _values(flow: Flow, site: AttentionSite, evidence: Evidence, alike: Sequence[AttentionSite]) -> str | None:
    if site.v.headwise or site.scores_rounded or (site.hidden_bias == "keys" and _in_biases(flow, site)):
        return f"its attention stays as it is: {site.stays}"
    if site.v.norm is not None:
        return "a norm follows the value projection"
    if evidence.v.tokens.offset is not None:
        return "a bias is added to the value heads after their projection"
    if not _even(evidence.v):
        return "the value features are scaled apart from each other"
    return output_stays(flow, site, alike)


def output_stays(flow: Flow, site: AttentionSite, alike: Sequence[AttentionSite] = ()) -> str | None:
    """Why an attention's output projection cannot change, None if it can; `alike` are others with its weights."""
    if site.out is None:
        return "no output projection reads the heads alone"
    if not _plain(flow, site.out):
        return "the output projection is not a plain matrix product"
    if any(s.out is None or s.out.weight != site.out.weight for s in alike):
        return "other attentions with output projections of their own read the same values"
    return _shared(flow, site.out, "output", len(alike) + 1)


def _in_biases(flow: Flow, site: AttentionSite) -> bool:
    """Whether values, not only keys, are among what biases the scores."""
    stems, numbers = {site.q.stem, site.k.stem}, {o.projection.node for o in site.v.parts}
    past = {o.past for o in site.v.parts if o.past is not None}
    biases = [m.value for m in site.modifiers if m.source == "keys" and m.value is not None]
    above = [n for v in biases for n in flow.ancestors(v, stop=lambda node: bool(stems & set(node.outputs)))]
    return any((n.index in numbers and not stems & set(n.outputs)) or past & set(n.inputs) for n in above)


def _plain(flow: Flow, projection: Projection) -> bool:
    """Whether the projection is x @ W + b and nothing else, however W is stored."""
    return not isinstance(layout_of(flow, flow.nodes[projection.node]), str)


def _even(traced: Traced) -> bool:
    """Whether every feature of the heads is scaled by the same factor."""
    own, other = traced.tokens.own, traced.tokens.other
    size = np.abs(own) if other is None else np.sqrt(own**2 + other**2)
    return bool(np.abs(size - size[..., :1]).max(initial=0.0) <= _EVEN * max(float(size.max(initial=0.0)), 1e-30))


def _shared(flow: Flow, projection: Projection, role: str, users: int) -> str | None:
    """Other readers of a weight would see it change."""
    for value in (projection.weight, projection.bias):
        weight = flow.weights.get(value) if value is not None else None
        if weight is not None and weight.readers > users:
            return f"the {role} projection's weight is read elsewhere too"
    return None
