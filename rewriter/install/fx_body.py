"""A torch body in a flat aten graph: exported by itself, for any sizes, and copied node by node."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from rewriter.install.fx_emit import Emitter, aten


def exported_body(body: nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any) -> GraphModule:
    """A graph of the body's tensors, in order, without what nothing reads."""
    with torch.no_grad():
        program = torch.export.export(body, arguments, dynamic_shapes=dynamic_shapes, strict=False)
    graph: GraphModule = program.graph_module
    graph.graph.eliminate_dead_code()
    return graph


def copied(emitter: Emitter, like: FxNode, body: GraphModule, operands: list[FxNode]) -> FxNode:
    """The body's nodes on these operands, but for its checks."""
    given = [n for n in body.graph.nodes if n.op == "placeholder" and n.meta.get("val") is not None]
    known: dict[FxNode, FxNode] = dict(zip(given, operands, strict=True))
    for node in body.graph.nodes:
        if node.op == "call_function" and not _is_check(node):
            arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            if "device" in keywords:
                keywords = {**keywords, "device": _device(emitter, operands[0])}
            known[node] = emitter.call(like, node.target, *arguments, **keywords)
        elif node.op == "output":
            (result,) = torch.fx.node.map_arg(node.args[0], known.__getitem__)
    answer: FxNode = result
    return answer


def _is_check(node: FxNode) -> bool:
    return (not node.users and node.is_impure()) or node.target is aten._assert_tensor_metadata.default


def _device(emitter: Emitter, like: FxNode) -> Any:
    value = like.meta.get("val")
    return emitter.device if value is None else value.device
