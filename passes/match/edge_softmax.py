"""Attention along the edges of a graph: scores are normalised by sums that an index scatters, one for each node.

There is no matrix of scores and no product with values: every edge's value is weighed by itself, then scattered and
summed. None of it is rewritten, and none is overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator

from passes.dataflow import LAYOUT, Flow, Node, Value
from passes.operator_kinds import PASS_THROUGH, SCATTERING

REASON = (
    "its softmax runs along the edges of a graph (sums that an index scatters, as in a graph attention or a graph "
    "transformer), so values are weighed edge by edge and there is no matrix of scores to write anew; leave this "
    "attention as it is"
)


def edge_softmaxes(flow: Flow) -> Iterator[tuple[Node, str]]:
    """Where each such softmax divides by its sums, and what to say of it.

    Pooling, where what is summed or a learned projection of it is its own score, is none.
    """
    for node in flow.nodes:
        if node.op != "Div" or not all(flow.data_dependent(v) for v in node.inputs[:2]):
            continue
        power = flow.producer(_laid_out_from(flow, node.inputs[0]))
        if power is None or power.op != "Exp" or not _scattered(flow, node.inputs[1], power):
            continue
        scores = _laid_out_from(flow, power.inputs[0], LAYOUT | PASS_THROUGH | {"Sub", "Mul"})
        made = flow.producer(scores)
        projected = made is not None and flow.projection_operands(made) is not None
        if not projected and _weighs(flow, node, scores):
            yield node, REASON


def _laid_out_from(flow: Flow, value: Value, passed: frozenset[str] = LAYOUT | PASS_THROUGH) -> Value:
    """What a value is laid out (or shifted and scaled) from."""
    while (node := flow.producer(value)) is not None and node.op in passed:
        fed = [v for v in node.inputs if v and flow.is_fed(v)]
        if node.op == "Mul" and len(fed) > 1:
            break
        value = fed[0] if node.op == "Mul" and fed else node.inputs[0]
    return value


def _scattered(flow: Flow, value: Value, power: Node) -> bool:
    """Whether a value is made of sums of these powers that an index scatters."""
    below = set(power.outputs)
    for node in flow.ancestors(value, stop=lambda n: n.index <= power.index):
        if below.intersection(node.inputs):
            if _scatters(node):
                return True
            below.update(node.outputs)
    return False


def _weighs(flow: Flow, node: Node, scores: Value) -> bool:
    """Whether the weights are multiplied by something fed that is not their scores, and scattered behind that."""
    todo, met = [(node, False)], {node.index}
    while todo:
        current, multiplied = todo.pop()
        if multiplied and _scatters(current):
            return True
        for reader in (r for v in current.outputs for r in flow.readers(v)):
            others = [v for v in reader.inputs if v and v not in current.outputs and flow.is_fed(v)]
            values = reader.op == "Mul" and any(_laid_out_from(flow, v) != scores for v in others)
            if reader.index not in met and (values or _scatters(reader) or reader.op in LAYOUT | PASS_THROUGH):
                met.add(reader.index)
                todo.append((reader, multiplied or values))
    return False


def _scatters(node: Node) -> bool:
    return node.op.rpartition(".")[2] in SCATTERING or node.attrs.get("reduction") in ("add", b"add")
