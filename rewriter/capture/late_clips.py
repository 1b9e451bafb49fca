"""Bounds on a projection's whole output, written behind the cuts that make queries, keys and values of it.

A clamp treats every number alike, so clipping first and cutting then is the same as cutting first. Done to the graph
that a module was exported to for analysis, and to a copy of a graph that is edited itself.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch.fx import Graph
from torch.fx import Node as FxNode

from rewriter.capture.pointwise import STANDS_FOR, called, operator_name

_CLIPS = frozenset({"clamp", "clip", "hardtanh"})
_LAYOUT = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "unflatten", "unsqueeze"),
        *("transpose", "permute", "movedim", "contiguous", "clone"),
    }
)
_PARTS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split"})
_CUTS = frozenset({"slice", "select", "narrow"})


def clip_behind_cuts(graph: Graph, only: Collection[str] | None = None) -> bool:
    """Move, in place, clamps of linear layers' outputs behind cuts, or those of the layers with these node names;
    whether there were any."""
    moved = False
    for clip in [n for n in graph.nodes if operator_name(n) in _CLIPS]:
        layer = clip.args[0]
        if not isinstance(layer, FxNode) or operator_name(layer) != "linear" or len(layer.users) != 1:
            continue
        parts = _parts(clip) if only is None or layer.name in only else None
        if parts is not None and all(not isinstance(b, FxNode) for b in (*clip.args[1:], *clip.kwargs.values())):
            _move(graph, clip, layer, parts)
            moved = True
    if moved:
        graph.lint()
    return moved


def _parts(value: FxNode) -> list[FxNode] | None:
    """What a value is cut into, through layout; None if it is used whole."""
    users = list(value.users)
    if len(users) == 1 and operator_name(users[0]) in _LAYOUT:
        return _parts(users[0])
    if len(users) == 1 and operator_name(users[0]) in _PARTS:
        taken = list(users[0].users)
        return taken if all(n.target is operator.getitem for n in taken) else None
    return users if len(users) > 1 and all(operator_name(n) in _CUTS for n in users) else None


def _move(graph: Graph, clip: FxNode, layer: FxNode, parts: list[FxNode]) -> None:
    bounds = [*clip.args[1:], *(clip.kwargs[name] for name in ("min", "max") if name in clip.kwargs)]
    clip.replace_all_uses_with(layer)
    for part in parts:
        with graph.inserting_after(part):
            clipped = called(part, clip.target, part, *bounds)
        for user in [n for n in part.users if n is not clipped]:
            user.replace_input_with(part, clipped)
    graph.erase_node(clip)
    layer.meta[STANDS_FOR] = layer.name
