"""Attentions whose query is learned instead of computed: a probe, a latent array, object queries.

Seen as one more input of the program, such a parameter is a query like any other.
"""

from __future__ import annotations

from dataclasses import replace

from passes.dataflow import CONTRACTIONS, LAYOUT, Flow, Value
from passes.operator_kinds import NORMS, PASS_THROUGH, data_operands


def with_learned_queries(flow: Flow, query: Value) -> Flow | None:
    """The same program with the parameters that `query` is projected from among its inputs; None if there are none."""
    found: list[Value] = []
    for node in flow.ancestors(query):
        if node.op not in CONTRACTIONS or flow.is_fed(node.outputs[0]) or len(node.inputs) < 2:
            continue
        x, matrix = node.inputs[:2]
        root = _root(flow, x)
        if root is not None and len(flow.shape(matrix)) == 2 and flow.is_constant(matrix):
            found.append(root)
    if not found:
        return None
    weights = {name: weight for name, weight in flow.weights.items() if name not in found}
    return replace(flow, inputs=(*flow.inputs, *dict.fromkeys(found)), weights=weights)


def _root(flow: Flow, value: Value) -> Value | None:
    """The float parameter that a value is a re-layout, a sum or a norm of: of two axes or more, or one token's features
    where nothing else is added."""
    candidates, least = [value], 1
    while candidates:
        name = candidates.pop()
        if name in flow.weights:
            if len(flow.shape(name)) >= least and flow.value(name).dtype.kind == "f":
                return name
            continue
        node = flow.producer(name)
        if node is None:
            continue
        if node.op == "Add":
            candidates.extend(v for v in node.inputs if v)
            least = 2  # one of them may be a bias
        elif node.op in NORMS:
            candidates.append(node.inputs[0])
        elif node.op in LAYOUT | PASS_THROUGH:
            candidates.extend(node.inputs[i] for i in data_operands(node) if node.inputs[i])
    return None
