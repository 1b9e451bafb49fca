"""Keeps weights that nothing reads from onnxruntime, which takes them out one by one, each with a search through all of
them (1.31): 40,000 empty ones take 6 s, and a file of a few megabytes can hold that many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import onnx


def drop_unread(proto: onnx.ModelProto, model: ir.Model) -> frozenset[str]:
    """Take initializers that nothing reads out of `proto`, which is `model` written out; returns their names."""
    unread = frozenset(
        name
        for name, value in model.graph.initializers.items()
        if not (value.uses() or value.is_graph_output() or value.is_graph_input())
    )
    if unread:
        read = [tensor for tensor in proto.graph.initializer if tensor.name not in unread]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(read)
    return unread
