"""Attentions in modules of their own whose matrices are the same parameters.

Layers that share a module are rewritten once. Where only the parameters are shared, each module would get its own new
ones, and the layers would no longer be tied.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch

from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.site import AttentionSite, Refusal

REASON = (
    "its key and value matrices are made of parameters of other modules, too (tied parameters: {}); let these layers "
    "share the module itself, which is rewritten once, or rewrite the exported program (torch.export.export)"
)


def without_tied(module: torch.nn.Module, flow: Flow, matches: Matches) -> Matches:
    """Sites whose keys' or values' parameters several modules hold are refusals; graphs read a parameter by itself."""
    if isinstance(module, torch.fx.GraphModule):
        return matches
    names, holders = defaultdict(list), defaultdict(set)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names[id(parameter)].append(name)
        holders[id(parameter)].add(id(module.get_submodule(name.rpartition(".")[0])))

    def tied(site: AttentionSite) -> str | None:
        above = (v for _, o in site.shared for v in flow.weights_above(o.projection.weight))
        held = (parameters.get(flow.weights[v].name) for v in above)
        found = next((id(p) for p in held if p is not None and len(holders[id(p)]) > 1), None)
        return None if found is None else REASON.format(", ".join(names[found][:2]))

    refused = {s.name: reason for s in matches.sites if (reason := tied(s)) is not None}
    more = [Refusal.of(s, refused[s.name]) for s in matches.sites if s.name in refused]
    sites = tuple(s for s in matches.sites if s.name not in refused)
    return replace(matches, sites=sites, refusals=tuple(sorted((*matches.refusals, *more), key=lambda r: r.anchor)))
