"""Queries that share a key head, folded into the rows of one longer query: read as the heads that they are.

Programs that never repeat keys write q [B, H, S, D] as [B, KV, G * S, D], and scores, masks and output alike. All of it
is described as if nothing were folded: the query by heads, masks and output by the values before and after the fold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from passes.dataflow import LAYOUT, Flow, Value
from passes.match.head_axis import with_heads_together
from passes.match.operands import Traced
from passes.match.repeats import trace_repeated
from passes.match.scores import ScorePath
from passes.match.verdicts import NotUnderstood
from passes.operator_kinds import PASS_THROUGH
from passes.provenance import Tracer
from passes.site import Modifier

STEPS = 6
"""Layout operators between a folded value and the same one unfolded; more than any program needs."""

Shape = tuple[int, int, int, int]


def unfolded(tracer: Tracer, path: ScorePath) -> tuple[ScorePath, Traced] | None:
    """The path and its query, read as unfolded; None if the query is not folded.

    Raises NotUnderstood if it is, and its masks or its output are not.
    """
    flow = tracer.flow
    if len(flow.shape(path.q.value)) < 3:  # no axis of heads that more could be folded out of
        return None
    rows = flow.shape(path.q.value)[path.q.token_axis]
    for group in range(2, rows + 1):
        if path.q.heads or rows % group:
            continue
        view = replace(path.q, fold=group)
        try:
            query = trace_repeated(tracer, view, shared_heads=False)
        except NotUnderstood:
            continue
        batch, tokens = query.tokens.rows.shape
        keys = flow.shape(path.k.value)[path.k.token_axis]
        shape = (batch, query.operand.heads, tokens, keys)
        modifiers = tuple(_modifier(flow, m, group, shape) for m in path.modifiers)
        output = replace(path.output_view, fold=group)
        found = with_heads_together(flow, replace(path, q=view, modifiers=modifiers, output_view=output), query.tokens)
        if found is None:
            raise NotUnderstood("query heads are folded into rows, and the output is not unfolded")
        return found, query
    return None


def _modifier(flow: Flow, modifier: Modifier, group: int, shape: Shape) -> Modifier:
    """A mask or bias by the value that it was before it was folded; one for all rows needs no unfolding."""
    batch, heads, tokens, keys = shape
    if modifier.value is None or flow.shape(modifier.value)[-2:-1] in ((), (1,)):
        return modifier
    width = flow.shape(modifier.value)[-1] if modifier.kind == "sinks" else keys
    folded = (batch, heads // group, group * tokens, width)
    seen = np.broadcast_to(flow.value(modifier.value), folded)
    for value in _above(flow, modifier.value):
        array = flow.value(value)
        try:
            plain = np.broadcast_to(array, (batch, heads, tokens, width))
        except ValueError:
            continue
        if array.ndim <= 4 and np.array_equal(plain.reshape(folded), seen, equal_nan=True):
            return replace(modifier, value=value)
    raise NotUnderstood("a mask is folded over query heads in a way that is not read")


def _above(flow: Flow, value: Value) -> Iterator[Value]:
    """What a value was before layout operators, nearest first."""
    for _ in range(STEPS):
        node = flow.producer(value)
        if node is None or node.op not in LAYOUT | PASS_THROUGH:
            return
        value = node.inputs[0]
        yield value
