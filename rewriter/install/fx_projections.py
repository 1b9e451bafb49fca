"""Convolutions, adapters and batch norms that attentions project by, written as linear layers in a flat graph's copy.

Bounds on what is projected go behind the cuts there.

The graph door edits what it is given, so only what projects for attentions that are rewritten may stay written so: the
rest is the person's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx import Node as FxNode
from torch.fx.node import map_arg

from passes.dataflow import Flow
from passes.site import AttentionSite
from rewriter.capture.folded_adapters import MERGED, erase_unread, fold_adapters
from rewriter.capture.folded_norms import fold_norms
from rewriter.capture.late_clips import clip_behind_cuts
from rewriter.capture.pointwise import STANDS_FOR, write_as_linear
from rewriter.capture.score_order import order_scores
from rewriter.install.fx_graph import is_flat
from rewriter.install.fx_store import ModuleStore, ProgramStore, Store

Kind = TypeVar("Kind", bound=torch.export.ExportedProgram | GraphModule)


def with_linear_projections(model: Kind, only: Collection[str] | None = None) -> Kind:
    """A copy of `model` in which such projections, or those of these nodes, are linear layers; itself if none are.

    The copy computes the same and is called the same way.
    """
    if isinstance(model, GraphModule) and not is_flat(model):
        return model
    store: Any = ModuleStore(model) if isinstance(model, GraphModule) else ProgramStore(model)
    graph: Graph = store.graph
    written = write_as_linear(graph, only)
    if fold_adapters(graph, _inputs(model), only):
        written = True
        for node in [n for n in graph.nodes if MERGED in n.meta]:
            _store_merged(store, node)
        for key in store.dropped():
            store.remove(key)
    written |= fold_norms(graph, only)
    written |= clip_behind_cuts(graph, only)
    written |= order_scores(graph, only)
    made: Kind = store.finish() if written else model
    return made


def _inputs(model: torch.export.ExportedProgram | GraphModule) -> set[str]:
    """Names of the placeholders that hold no weights."""
    if isinstance(model, GraphModule):
        return {n.name for n in model.graph.nodes if n.op == "placeholder"}
    return {s.arg.name for s in model.graph_signature.input_specs if s.target is None}


def _store_merged(store: Store, layer: FxNode) -> None:
    """Store the matrix and offset of a layer that adapters went into, so that no call adds them up again."""
    base = store.key(layer.meta[MERGED])
    held = store.get(base)
    for place, leaf in ((1, "merged_weight"), (2, "merged_bias")):
        made = layer.args[place] if len(layer.args) > place else None
        if not isinstance(made, FxNode) or store.is_weight(made):
            continue
        with torch.no_grad():
            numbers = _numbers(store, made)
        new = store.read(f"{layer.name}_{leaf}")
        new.meta["val"] = made.meta.get("val")
        layer.replace_input_with(made, new)
        trainable = held is not None and held.requires_grad
        store.put(new, _free(store, base, leaf), nn.Parameter(numbers, requires_grad=trainable))
        erase_unread(store.graph, made, store.drop)


def _free(store: Store, base: str, leaf: str) -> str:
    """A key beside a weight's; several layers may share that weight, each with an adapter of its own."""
    beside = base.rpartition(".")[0]
    wanted = f"{beside}.{leaf}" if beside else leaf
    names = itertools.chain([wanted], (f"{wanted}_{n}" for n in itertools.count(1)))
    return next(name for name in names if store.get(name) is None)


def _numbers(store: Store, node: FxNode) -> Tensor:
    """What a node gives that depends on weights alone."""
    if store.is_weight(node):
        held = store.get(store.key(node))
        assert held is not None
        return held
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: _numbers(store, n))
    assert callable(node.target)
    made: Tensor = node.target(*args, **kwargs)
    return made


def written_projections(model: torch.export.ExportedProgram | GraphModule) -> dict[str, str]:
    """The node that each such linear layer stands for, by the layer's node; softmaxes of ordered scores, themselves."""
    return {n.name: str(n.meta[STANDS_FOR]) for n in model.graph.nodes if STANDS_FOR in n.meta}


def projections_of(flow: Flow, sites: Iterable[AttentionSite]) -> set[str]:
    """Nodes of the graph that project for these sites, and their softmaxes, by name."""
    nodes = {i for site in sites for i in (site.anchor, *(o.projection.node for o in site.operands))}
    return {flow.nodes[i].name for i in nodes}
