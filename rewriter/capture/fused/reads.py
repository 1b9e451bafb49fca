"""What is read off a fused operator: inputs, ranks, types, and what it keeps."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.onnx_nodes import input_at

_UPSTREAM = 64
"""Values that are looked at for an operator's type."""


def keeps_cache(node: ir.Node) -> bool:
    return any(v is not None for v in node.inputs[4:]) or any(is_read(o) for o in node.outputs[1:])


def is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def present(node: ir.Node, position: int) -> bool:
    return len(node.outputs) > position and is_read(node.outputs[position])


def mask_obstacle(mask: ir.Value | None) -> str | None:
    if mask is None or rank(mask) in (1, 2, 3):
        return None
    return "the form of its mask is not known"


def sliding(node: ir.Node) -> int:
    """Tokens that its cache holds, where that forgets those outside a window; else 0."""
    slides = node.attributes.get_int("sliding_window_cache", 0)
    return max(node.attributes.get_int("local_window_size", 0), 0) if slides else 0


def _dropped_axes(node: ir.Node) -> int:
    """How many axes a sum leaves out (as lengths counted off a mask are summed); 0 for other nodes."""
    if node.op_type != "ReduceSum" or node.attributes.get_int("keepdims", 1) != 0:
        return 0
    axes = node.attributes.get("axes")
    if axes is not None:
        return len(axes.as_ints())
    stored = input_at(node, 1)
    return int(stored.const_value.size) if stored is not None and stored.const_value is not None else 0


def rank(value: ir.Value) -> int | None:
    """Rank of a value, declared or told from what makes it; None if unknown."""
    if value.shape is not None:
        return value.shape.rank()
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "EmbedLayerNormalization":
        return 1
    if node.op_type in {"Cast", "Identity", "Slice", "ReduceSum"} and (given := input_at(node, 0)) is not None:
        before = rank(given)
        return before if before is None else before - _dropped_axes(node)
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return len(node.attributes["perm"].as_ints())
    if node.op_type == "Reshape" and node.inputs[1] is not None and node.inputs[1].shape is not None:
        size = node.inputs[1].shape[0]
        return size if isinstance(size, int) else None
    return None


def float_type(node: ir.Node) -> ir.DataType:
    """The type an operator computes in: declared, or of the caches and weights that its operands are made with."""
    seen: list[ir.Value] = [v for v in (node.outputs[0], *node.inputs[:5]) if v is not None]
    for value in seen:  # grows
        known = value.const_value.dtype if value.const_value is not None else value.dtype
        if known is not None and known.is_floating_point():
            return known
        maker = value.producer()
        if maker is None or maker is node or len(seen) > _UPSTREAM:
            continue
        if maker.op_type == "Cast" and "to" in maker.attributes:
            cast = ir.DataType(maker.attributes["to"].as_int())
            if cast.is_floating_point():
                return cast
            continue
        seen += [v for v in maker.inputs if v is not None and not any(v is s for s in seen)]
    return ir.DataType.FLOAT
