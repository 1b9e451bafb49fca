"""Convolutions and batch norms that attentions project by, written as linear layers into a copy of a flat graph.

The graph door edits what it is given, so only what projects for attentions that are rewritten may stay written so: the
rest is the person's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule

from passes.dataflow import Flow
from passes.site import AttentionSite
from rewriter.capture.folded_norms import fold_norms
from rewriter.capture.pointwise import STANDS_FOR, write_as_linear
from rewriter.install.fx_graph import is_flat
from rewriter.install.fx_store import ModuleStore, ProgramStore

Kind = TypeVar("Kind", bound=torch.export.ExportedProgram | GraphModule)


def with_linear_projections(model: Kind, only: Collection[str] | None = None) -> Kind:
    """A copy of `model` in which such projections, or those of these nodes, are linear layers; itself if none are.

    The copy computes the same and is called the same way.
    """
    if isinstance(model, GraphModule) and not is_flat(model):
        return model
    store: Any = ModuleStore(model) if isinstance(model, GraphModule) else ProgramStore(model)
    graph: Graph = store.graph
    written = write_as_linear(graph, only) | fold_norms(graph, only)
    made: Kind = store.finish() if written else model
    return made


def written_projections(model: torch.export.ExportedProgram | GraphModule) -> dict[str, str]:
    """The node that each such linear layer stands for, by the layer's node."""
    return {n.name: str(n.meta[STANDS_FOR]) for n in model.graph.nodes if STANDS_FOR in n.meta}


def projections_of(flow: Flow, sites: Iterable[AttentionSite]) -> set[str]:
    """Nodes of the graph that project for these sites, by name."""
    return {flow.nodes[o.projection.node].name for site in sites for o in site.operands}
