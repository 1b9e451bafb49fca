"""Which module computes an attention, and what keeps a generated one from taking its place; asked before any edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from passes.dataflow import Flow
from passes.site import AttentionSite, Operand
from passes.weights.head_gains import stored_gains
from rewriter.errors import UnsupportedModel
from rewriter.install.call_record import CallRecord
from rewriter.install.protocol import Protocol, read_protocol


def owner_of(flow: Flow, site: AttentionSite) -> str:
    """The innermost module that holds the anchor and the projections of q, k and v."""
    paths = [site.owner.split(".")] if site.owner else []
    for operand in site.operands:
        weight = flow.weights.get(operand.projection.weight)
        if weight is not None and weight.name:
            parts = weight.name.split(".")
            # the projection is a module of its own, or the weight is a bare parameter of the owner
            paths.append(parts[:-2] if parts[-1] == "weight" and len(parts) > 1 else parts[:-1])
    common: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) != 1:
            break
        common.append(level[0])
    return ".".join(common)


def obstacles(flow: Flow, sites: Sequence[AttentionSite]) -> dict[str, str]:
    """By name, why a site gets no module of its own; sites that could get one are left out."""
    groups: dict[str, list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault(owner_of(flow, site), []).append(site)
    found: dict[str, str] = {}
    for path, group in groups.items():
        for site in group:
            reason = crowd(path, group) or layout_obstacle(flow, site) or form_obstacle(site)
            if reason is not None:
                found[site.name] = reason
    return found


def read_calls(
    flow: Flow, sites: Sequence[AttentionSite], records: Mapping[str, CallRecord]
) -> tuple[dict[str, Protocol], dict[str, str]]:
    """By name, how the module that computes each site is called, and why no other could be in its place for the rest.

    Args:
        records: calls of the sites' owners (`owner_of`), by path.
    """
    read: dict[str, Protocol] = {}
    found: dict[str, str] = {}
    for site in sites:
        owner = owner_of(flow, site)
        if (record := records.get(owner)) is None:
            found[site.name] = f"{owner or 'the model'} was not called by the model's forward"
            continue
        if not record.alike:
            found[site.name] = f"{owner} is called with different arguments in one forward"
            continue
        try:
            protocol = read_protocol(record, owner, heads=site.heads, causal=site.causal)
        except UnsupportedModel as error:
            found[site.name] = str(error)
            continue
        hidden = record.arguments.get(protocol.name("hidden") or "")
        if isinstance(hidden, Tensor) and hidden.dim() not in (2, 3):
            found[site.name] = f"{owner} is called with hidden states of {hidden.dim()} dimensions"
        else:
            read[site.name] = protocol
    return read, found


def crowd(path: str, sites: Sequence[AttentionSite]) -> str | None:
    """Whether the module at `path` computes more attentions than one: sites that share all weights are one."""
    weights = {(s.k.projection.weight, s.v.projection.weight) for s in sites}
    return f"{path or 'the model'} computes {len(sites)} attentions in one forward" if len(weights) > 1 else None


def layout_obstacle(flow: Flow, site: AttentionSite) -> str | None:
    """What no module but the one that is there can read: its projections, and the order of its heads."""
    if any(_convolves(flow, o) for o in site.operands):
        return (
            "its projections are convolutions or parts of a stack of matrices, which a module of its own does not have"
        )
    if site.joined:
        return "tokens of several projections are joined, as its forward does"
    if site.interleaved:
        return "query heads that share a key/value head are no neighbours, as its forward lays them out"
    return None


def form_obstacle(site: AttentionSite) -> str | None:
    """What attention in a generated module does not compute, and a model's own may where its config is edited."""
    if any(o.norm is not None and o.norm.kind == "clip" for o in site.operands):
        return "what it projects is kept within bounds (clipped), which its forward does"
    if any(o.norm is not None and not o.norm.per_head for o in (site.q, site.k, site.v)):
        return "a norm spans the features of all its heads, which is kept in the module's forward"
    if any(stored_gains(o) for o in (site.k, site.v)):
        return "a norm multiplies each of its heads by numbers of their own"
    if site.hidden_bias:
        return "its scores get a bias that is computed from hidden states, as its forward does"
    if site.headwise:
        return f"{site.stays}, as its forward does"
    if site.weights_read:
        return "its attention weights are read elsewhere, too, which its forward hands on"
    if any(m.kind == "sinks" for m in site.modifiers):
        return "its attention sinks can only be kept where the model's own config sets the head count"
    if site.temperature is not None:
        return "each head's scores have a temperature of their own, kept in the module's forward"
    if abs(site.v.gain - 1.0) > 1e-6:
        return "values are scaled between projection and contraction"
    return None


def _convolves(flow: Flow, operand: Operand) -> bool:
    """Whether a projection's matrix is stored as the kernel of a convolution."""
    node = flow.producer(operand.projection.weight)
    if node is not None and node.op == "Mul":  # by the factors of a norm behind it
        node = flow.producer(node.inputs[0])
    return node is not None and node.op == "Reshape" and len(flow.shape(node.inputs[0])) > 2
