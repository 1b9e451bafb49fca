"""Which values of a graph are recorded: those around every anchor, from projections to projection."""

from __future__ import annotations

from passes.dataflow import CONTRACTIONS, LAYOUT, Flow, Node, Value, unflattened
from passes.match.masked_weights import MEET, OF_SUMS, SUMS
from passes.match.scores import anchors
from passes.operator_kinds import PASS_THROUGH

_BEHIND = frozenset({"IsNaN", "Add", "Sub"})
"""What mixed values meet: a test for rows without keys, what is mixed of other keys."""
_COMBINED = frozenset({"Add", "Sub", "Mul"})
"""How weights meet other numbers, those of another softmax, say."""


def around_anchors(flow: Flow) -> set[Value]:
    """Values around every anchor: up to the projections it reads, down to the projection that reads it, biased."""
    wanted: set[Value] = set()

    def stop(node: Node) -> bool:
        operands = flow.projection_operands(node)
        if operands is None or _projects_tokens(flow, node, operands[0]):
            return False
        # a constant of more axes may be queries that are learned, or their product with a weight: keys lie above
        return node.op != "MatMul" or len(flow.shape(node.inputs[operands[1]])) <= 2

    around = [node for anchor in anchors(flow) for node in _downstream(flow, anchor)]
    biases = [n for p in around if stop(p) for n in flow.consumers(p.outputs[0]) if n.op == "Add"]
    for node in (*around, *biases):
        wanted.update(v for v in (*node.inputs, *node.outputs) if v)
    for above in flow.ancestors(*(v for node in around for v in node.inputs), stop=stop):
        wanted.update(v for v in (*above.inputs, *above.outputs) if v)
        wanted.update(unflattened(flow, above.inputs[0]) if stop(above) else ())
    return wanted


def _projects_tokens(flow: Flow, node: Node, data: int) -> bool:
    """Whether features leave the last axis in front of a product and come back behind it, or behind its bias."""
    before = flow.producer(node.inputs[data])
    if before is None or not _moves_features(before):
        return False
    readers = flow.consumers(node.outputs[0])
    behind = [r for n in readers for r in (flow.consumers(n.outputs[0]) if n.op == "Add" else (n,))]
    return len(behind) > 0 and all(_moves_features(r) for r in behind)


def _moves_features(node: Node) -> bool:
    perm = node.attrs.get("perm") if node.op == "Transpose" else None
    return perm is not None and perm[-1] != len(perm) - 1


def _downstream(flow: Flow, anchor: Node) -> list[Node]:
    """The anchor and what its output flows through until a projection reads it."""
    found, todo = {anchor.index: anchor}, [(anchor, anchor.op != "Softmax", False)]
    while todo:
        node, mixed, summed = todo.pop()
        follows = LAYOUT | PASS_THROUGH | (_BEHIND if mixed else MEET | _COMBINED) | (OF_SUMS if summed else set())
        for value in node.outputs:
            for reader in flow.consumers(value):
                if reader.index in found:
                    continue
                found[reader.index] = reader
                if reader.op in CONTRACTIONS:
                    if flow.projection_operands(reader) is None and not mixed:
                        todo.append((reader, True, False))
                elif reader.op in follows:
                    todo.append((reader, mixed, summed or reader.op in SUMS))
    return list(found.values())
