"""A mask of a file for one query, where it is spread over queries before the operators that make it: what works element
by element is written once more, on what is not spread yet."""

from __future__ import annotations

import onnx_ir as ir

from passes.dataflow import Flow, Value
from rewriter.onnx_nodes import NodeWriter

BY_ELEMENT = frozenset(
    {
        "Add", "And", "Cast", "CastLike", "Div", "Equal", "Greater", "GreaterOrEqual", "Identity", "Less",
        "LessOrEqual", "Max", "Min", "Mul", "Neg", "Not", "Or", "Sub", "Where",
    }
)  # fmt: skip


def one_row(write: NodeWriter, nodes: list[ir.Node], flow: Flow, value: ir.Value) -> ir.Value | None:
    """[..., 1, keys] of a mask [..., queries, keys] with equal rows; None where these are not seen to be equal."""
    try:
        shape = _shape(flow, value)
        if len(shape) < 2 or shape[-2] == 1:
            return value
        node = value.producer()
        if node is None or node.domain:
            return None
        if node.op_type == "Expand" and node.inputs[0] is not None:
            given = _shape(flow, node.inputs[0])
            return node.inputs[0] if len(given) == len(shape) and given[-2:] == (1, shape[-1]) else None
    except KeyError:  # it was not recorded
        return None
    if node.op_type not in BY_ELEMENT:
        return None
    inputs = [one_row(write, nodes, flow, v) for v in node.inputs if v is not None]
    rows = [v for v in inputs if v is not None]
    return write.again(nodes, node, rows) if len(rows) == len(node.inputs) else None


def _shape(flow: Flow, value: ir.Value) -> tuple[int, ...]:
    return flow.shape(Value(value.name or ""))
