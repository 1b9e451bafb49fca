"""Fused attention operators, written out in standard operators so that matching can read them.

com.microsoft's Attention, MultiHeadAttention and GroupQueryAttention and the standard Attention with a cache of its own
are written out where their semantics are covered; others stay, and are refused with a reason. Only operators whose site
is going to be rewritten are written out in the model that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir

from rewriter.capture.cache_sizes import count
from rewriter.capture.fused.attention import PackedAttention, attention_obstacle
from rewriter.capture.fused.group_query import GroupQuery, group_query_obstacle
from rewriter.capture.fused.multi_head import MultiHead, multi_head_obstacle
from rewriter.capture.fused.reads import keeps_cache
from rewriter.capture.fused.standard import Standard, standard_obstacle
from rewriter.capture.fused.writer import Writer
from rewriter.capture.fused.written_out import DOMAIN, WrittenOut

_OPERATORS: Mapping[str, tuple[Callable[[ir.Node], str | None], type[Writer]]] = {
    "Attention": (attention_obstacle, PackedAttention),
    "MultiHeadAttention": (multi_head_obstacle, MultiHead),
    "GroupQueryAttention": (group_query_obstacle, GroupQuery),
    "StandardAttention": (standard_obstacle, Standard),
}
"""What keeps an operator from being written out, and what writes it."""

_COUNTS = {
    "Attention": ("num_heads",),
    "MultiHeadAttention": ("num_heads",),
    "GroupQueryAttention": ("num_heads", "kv_num_heads"),
}
"""Attributes that number heads."""


def fused_nodes(model: ir.Model) -> list[ir.Node]:
    """Fused attention operators that `unfuse` can write out."""
    return [n for n in model.graph if _kind(n) and obstacle(n) is None]


def unfuse(model: ir.Model, only: Collection[str] | None = None) -> dict[str, WrittenOut]:
    """Write fused operators out in place, all or those of these scopes; what was written out, by scope.

    Unnamed operators are named first. The written-out softmax is called ``<name>/Softmax``; its scope is `scope(name)`.
    """
    _name_nodes(model)
    done: dict[str, WrittenOut] = {}
    for node in fused_nodes(model):
        assert node.name is not None
        if only is None or scope(node.name) in only:
            done[scope(node.name)] = _OPERATORS[_kind(node)][1](model, node).write()
    return done


def scope(name: str) -> str:
    """A node's name as matching names what it was written out into."""
    return name.strip("/").replace("/", ".")


def obstacle(node: ir.Node) -> str | None:
    """Why a fused operator is not written out; None if it is."""
    kind = _kind(node)
    found = (_uncounted(node, kind) or _OPERATORS[kind][0](node)) if kind else None
    return None if found is None else f"the operator {node.domain or 'ai.onnx'}::{node.op_type} is not read: {found}"


def _kind(node: ir.Node) -> str:
    """The operator if it may be written out, else ""."""
    if node.domain == DOMAIN and node.op_type in {"Attention", "MultiHeadAttention", "GroupQueryAttention"}:
        return node.op_type
    if node.domain in {"", "ai.onnx"} and node.op_type == "Attention" and keeps_cache(node):
        return "StandardAttention"
    return ""


def _uncounted(node: ir.Node, kind: str) -> str | None:
    """Which number of heads an operator has to say and does not."""
    both = ("q_num_heads", "kv_num_heads")  # of the standard operator, where heads lie side by side
    for name in _COUNTS.get(kind, both if any(n in node.attributes for n in both) else ()):
        if count(node, name) is None:
            return f"its attribute {name} is no number of heads; export the model again"
    return None


def _name_nodes(model: ir.Model) -> None:
    taken = {n.name for n in model.graph}
    for number, node in enumerate(model.graph):
        if not node.name:
            name = f"{node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
