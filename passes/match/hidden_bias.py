"""Biases of scores that are computed from hidden states: of which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from passes.dataflow import Flow, Value
from passes.site import Modifier, Operand, Source


def with_sources(
    flow: Flow, modifiers: Iterable[Modifier], query: Operand, shared: Iterable[Operand]
) -> tuple[Modifier, ...]:
    """Modifiers that say what makes their values; `shared` are keys and values, of every stream of tokens."""
    operands = tuple(shared)
    return tuple(replace(m, source=_source(flow, m.value, query, operands)) for m in modifiers)


def _source(flow: Flow, value: Value | None, query: Operand, shared: tuple[Operand, ...]) -> Source:
    if value is None or not flow.data_dependent(value):
        return ""
    # queries may come from one projection with the keys: what reads them alone reads no keys
    above = flow.ancestors(value, stop=lambda node: query.stem in node.outputs)
    projections, past = {o.projection.node for o in shared}, {o.past for o in shared if o.past is not None}
    reads = any((n.index in projections and query.stem not in n.outputs) or past & set(n.inputs) for n in above)
    return "keys" if reads else "hidden"
