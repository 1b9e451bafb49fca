"""Attentions whose query is learned instead of computed: a probe, a latent array, object queries.

Seen as one more input of the program, such a parameter is a query like any other.
"""

from __future__ import annotations

from dataclasses import replace

from passes.dataflow import CONTRACTIONS, LAYOUT, Flow, Value
from passes.operator_kinds import PASS_THROUGH


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
    """The float parameter of two axes or more that a value is a re-layout, a sum or a norm of."""
    candidates = [value]
    while candidates:
        name = candidates.pop()
        if name in flow.weights:
            if len(flow.shape(name)) >= 2 and flow.value(name).dtype.kind == "f":
                return name
            continue
        node = flow.producer(name)
        if node is not None and node.op in LAYOUT | PASS_THROUGH | {"Add", "LayerNormalization", "RMSNormalization"}:
            candidates.extend(v for v in node.inputs if v)
    return None
