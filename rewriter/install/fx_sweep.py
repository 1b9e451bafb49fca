"""Takes out of an aten graph what nothing reads behind an edit."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from torch.fx import Node as FxNode

from passes.feed_forward_site import FeedForwardSite
from passes.site import AttentionSite
from rewriter.install.fx_emit import aten

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor


def sweep(editor: Editor, site: AttentionSite | FeedForwardSite) -> None:
    """Erase the site's nodes that nothing reads, and what only they read."""
    numbers = {*site.nodes}
    if isinstance(site, AttentionSite):
        numbers |= {o.projection.node for o in site.operands} | {i for o in site.operands for i in o.path}
    matched = {n for i in numbers if (n := editor.of(i)) is not None}
    matched |= {u for n in matched for u in n.users if u.target is operator.getitem}
    todo = [editor.node(site.output), *matched, *editor.replaced]
    editor.replaced = []
    erased: set[FxNode] = set()
    alive = set(editor.graph.nodes)
    while todo:
        node = todo.pop()
        if node in erased or node not in alive or not _removable(editor, node, matched):
            continue
        for check in [*node.users]:
            editor.graph.erase_node(check)
            erased.add(check)
        inputs = node.all_input_nodes
        erased.add(node)
        if editor.store.is_weight(node):
            editor.store.drop(node)
        else:
            editor.graph.erase_node(node)
        todo += inputs


def _removable(editor: Editor, node: FxNode, matched: set[FxNode]) -> bool:
    if any(u.target is not aten._assert_tensor_metadata.default for u in node.users):
        return False
    if editor.store.is_weight(node):
        return True
    return node.op in {"call_function", "get_attr"} and (node in matched or not node.is_impure())
