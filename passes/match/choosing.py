"""Which keys a query sees, where hidden states choose them: the highest of an indexer's scores, a dynamic mask."""

from __future__ import annotations

from passes.dataflow import Flow, Node, Value
from passes.match.verdicts import CONTENT_BIAS

REASON = (
    "hidden states choose which keys each query sees (the highest of an indexer's scores, say), a mask that no "
    "attention written anew has; leave this attention as it is (layers= selects others)"
)
_CHOOSERS = frozenset({"topk", "sort", "argsort", "argmax", "kthvalue"})


def chooses(node: Node) -> bool:
    """Whether a node tells places by the size of what it reads."""
    return node.op.rpartition(".")[2].lower() in _CHOOSERS


def content_bias(flow: Flow, *values: Value) -> str:
    """What to say of scores to which one of these values is added, which hidden states reach."""
    return REASON if any(is_chosen(flow, value) for value in values) else CONTENT_BIAS


def is_chosen(flow: Flow, value: Value) -> bool:
    """Whether something is chosen between the nearest projections and `value`."""
    todo, met = [value], set[Value]()
    while todo:
        name = todo.pop()
        node = flow.producer(name)
        if name in met or node is None or flow.projection_operands(node) is not None:
            continue
        if chooses(node):
            return True
        met.add(name)
        todo += [v for v in node.inputs if v]
    return False


def only_chooses(flow: Flow, node: Node) -> bool:
    """Whether what a node gives is read to choose by and for nothing else: it weighs no values."""
    todo, met, found = list(node.outputs), set[Value](), False
    while todo:
        value = todo.pop()
        if not value or value in met:
            continue
        met.add(value)
        if value in flow.outputs:
            return False
        for reader in flow.readers(value):
            if chooses(reader):
                found = True
                todo += reader.outputs[:1] if len(reader.outputs) > 1 else ()  # the numbers, beside their places
            elif flow.projection_operands(reader) is not None:
                return False
            else:
                todo += reader.outputs
    return found
