"""Bodies of control-flow nodes: what they read from outside, and whether they hold an attention."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from codegen.ops.grouped_query_attention.onnx_body import DOMAIN


def hidden_anchors(model: ir.Model) -> list[tuple[str, str]]:
    """(node name, operator) of control-flow nodes in whose bodies a softmax or an attention stands."""
    found = []
    for node in model.graph:
        if any(holds_anchor(body) for body in bodies_of(node)):
            found.append((node.name or node.op_type, node.op_type))
    return found


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def holds_anchor(graph: ir.Graph, *, deep: bool = True) -> bool:
    """Whether a softmax or an attention stands in a graph; if `deep`, in bodies within it, too."""
    return any(_is_anchor(n) or (deep and any(holds_anchor(body) for body in bodies_of(n))) for n in graph)


def _is_anchor(node: ir.Node) -> bool:
    operator = node.op_type
    return node.domain == DOMAIN or "Attention" in operator or ("Softmax" in operator and operator != "LogSoftmax")


def everything_read(node: ir.Node) -> tuple[str, ...]:
    """Everything that a node reads: its inputs, and what its bodies read that are no inputs of it."""
    return (*(v.name for v in node.inputs if v is not None and v.name), *read_in_bodies(node, ()))


def read_in_bodies(node: ir.Node, explicit: tuple[str, ...]) -> tuple[str, ...]:
    """Outer values that the bodies of a control-flow node read, and the bodies in them; none that are `explicit`."""
    names = dict.fromkeys(name for body in bodies_of(node) for name in _read_from_outside(body))
    return tuple(n for n in names if n not in explicit)


def _read_from_outside(body: ir.Graph) -> Iterator[str]:
    own = {v.name for n in body for v in n.outputs} | {v.name for v in body.inputs} | set(body.initializers)
    read = (name for node in body for name in everything_read(node))
    yield from (name for name in read if name not in own)
