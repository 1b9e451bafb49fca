"""Attentions of modules that matching tells nothing of: not captured, not called, or without scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.match.names import layer_of
from passes.site import AttentionSite, NotAttention, Refusal


def not_captured(model: Any, reason: str) -> Iterator[Refusal]:
    """Attentions of a model that cannot be seen through."""
    for number, path in enumerate(_like_attention(model)):
        yield Refusal(path, number, reason, -1, path)


def not_called(model: Any, flow: Flow) -> Iterator[Refusal]:
    """Attentions of which the recorded call ran no node and read no weight."""
    reason = (
        "it was not called with these inputs; pass example_inputs that use it "
        "(a decoder's cross-attention needs encoder_hidden_states)"
    )
    seen = {n.owner for n in flow.nodes} | {w.name for w in flow.weights.values() if w.readers}
    for path in _like_attention(model):
        if path and not any(s == path or s.startswith(f"{path}.") for s in seen):
            yield Refusal(path, layer_of(path, 0), reason, -1, path)


def without_scores(model: Any, flow: Flow, matches: Matches) -> Iterator[Refusal]:
    """Attentions that were called and hold nothing that matching looks at."""
    reason = (
        "it is called an attention, yet no scores of queries with keys weigh values in it (additive attention, a gate "
        "or a recurrence, say), so it has no heads to share; leave it as it is"
    )
    found: list[AttentionSite | Refusal | NotAttention] = [*matches.sites, *matches.refusals, *matches.not_attention]
    held = {flow.nodes[f.anchor].owner for f in found if f.anchor >= 0} | {f.name.partition("#")[0] for f in found}
    called = {n.owner for n in flow.nodes}
    for path in _like_attention(model):
        inside = [names for names in (called, held) if any(n == path or n.startswith(f"{path}.") for n in names)]
        if path and inside == [called]:
            yield Refusal(path, layer_of(path, 0), reason, -1, path)


def _like_attention(model: Any) -> Iterator[str]:
    """Paths of modules that are called attention and project at least queries, keys and values."""
    import torch

    for path, module in model.named_modules():
        projections = [c for c in module.children() if isinstance(c, torch.nn.Linear)]
        packed = getattr(module, "in_proj_weight", None) is not None
        if "attention" in type(module).__name__.lower() and (len(projections) >= 3 or packed):
            yield path
