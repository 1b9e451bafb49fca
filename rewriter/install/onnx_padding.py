"""Which tokens are padding, as a value of a file's graph: told by the masks of a matched attention.

Matching has seen that these hide keys from all queries and heads alike; here that is written down for any input, as
far as possible without a row for each query, of which long sequences have too many.
"""

from __future__ import annotations

import onnx_ir as ir

from passes.dataflow import Flow, Value
from passes.hidden_keys import HIDES, hiding
from passes.site import AttentionSite, Modifier
from rewriter.install.onnx_one_row import one_row
from rewriter.onnx_nodes import NodeWriter

AXES_ARE_INPUT = 18
"""The opset from which ReduceMax takes its axes as an input."""


def shown_tokens(
    write: NodeWriter, nodes: list[ir.Node], flow: Flow, site: AttentionSite, values: list[ir.Value], opset: int
) -> ir.Value | None:
    """bool [B or 1, S], False for padding; None where nothing hides any. `values` are those of `hiding`, in order."""
    found: ir.Value | None = None
    for modifier, mask in zip(hiding(flow, site), values, strict=True):
        value = one_row(write, nodes, flow, mask) or mask
        keys = _by_key(write, nodes, flow, site.name, modifier, value, opset)
        found = keys if found is None else write.op(nodes, "And", [found, keys], f"{site.name}.shown")
    return found


def _by_key(
    write: NodeWriter, nodes: list[ir.Node], flow: Flow, name: str, modifier: Modifier, value: ir.Value, opset: int
) -> ir.Value:
    wide, boolean = int(ir.DataType.FLOAT), int(ir.DataType.BOOL)
    if modifier.kind == "bias":
        number = write.op(nodes, "Cast", [value], f"{name}.mask_float", to=wide)
        limit = write.scalar(HIDES / (modifier.number or 1.0), ir.DataType.FLOAT, f"{name}.hides")
        kept = write.op(nodes, "Greater", [number, limit], f"{name}.kept")
    else:
        kept = write.op(nodes, "Cast", [value], f"{name}.kept", to=boolean)
        kept = write.op(nodes, "Not", [kept], f"{name}.kept") if modifier.kind == "unmask" else kept
    number = write.op(nodes, "Cast", [kept], f"{name}.kept_float", to=wide)
    of_queries = len(flow.shape(modifier.value or Value(""))) == 2
    highest = _highest(write, nodes, number, [0] if of_queries else [1, 2], name, opset, keep=of_queries)
    return write.op(nodes, "Cast", [highest], f"{name}.shown", to=boolean)


def _highest(
    write: NodeWriter, nodes: list[ir.Node], value: ir.Value, axes: list[int], name: str, opset: int, *, keep: bool
) -> ir.Value:
    if opset >= AXES_ARE_INPUT:
        given = [value, write.ints(axes, f"{name}.axes")]
        return write.op(nodes, "ReduceMax", given, f"{name}.highest", keepdims=int(keep))
    return write.op(nodes, "ReduceMax", [value], f"{name}.highest", axes=axes, keepdims=int(keep))
