"""The stretch of an attention from its projections to the input of its output projection, run on other numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from passes.dataflow import Array, Flow, Node, Value
from passes.match.linear_map import output_map
from passes.match.origins import described
from passes.match.verdicts import NotUnderstood
from passes.site import Projection
from passes.whole_projection import projections_above

_LONGEST = 1500
"""Nodes of a stretch; more are several layers'."""
_MOST_PROJECTIONS = 9
"""Queries, keys and values of three kinds of tokens."""


@dataclass(frozen=True)
class Stretch:
    """What lies between the projections nearest above an attention's merged heads and these.

    Attributes:
        projections: plain maps of features, in execution order; one of them may be a gate, say.
        merged: [..., features], what the output projection reads.
        out: the output projection.
    """

    flow: Flow
    projections: tuple[Projection, ...]
    merged: Value
    out: Projection

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """In execution order."""
        return self.between(p.output for p in self.projections)

    @property
    def above(self) -> tuple[Node, ...]:
        """All nodes between the projections and the merged heads, those included that no data reaches."""
        ends = {p.node for p in self.projections}
        return tuple(self.flow.ancestors(self.merged, stop=lambda n: n.index in ends))

    def between(self, starts: Iterable[Value]) -> tuple[Node, ...]:
        """Nodes on any route from `starts` to the merged heads, shape subgraphs included."""
        below = set(starts)
        first = min((n.index for v in below if (n := self.flow.producer(v)) is not None), default=-1)
        ends = {p.node for p in self.projections}
        found = []
        for node in self.flow.ancestors(self.merged, stop=lambda n: n.index <= first or n.index in ends):
            if any(v in below for v in node.inputs) and not below.intersection(node.outputs):
                below.update(node.outputs)
                found.append(node)
        return tuple(found)

    @cached_property
    def size(self) -> int:
        """Numbers that a run of it computes, as far as they were recorded."""
        total = 0
        for value in (v for node in self.nodes for v in node.outputs if v):
            with contextlib.suppress(LookupError):
                total += math.prod(self.flow.shape(value))
        return total

    def run(self, given: Mapping[Value, Array]) -> Array:
        """The merged heads [rows, features] where these values are others; each is forgotten behind its last reader."""
        nodes = [node for node in self.nodes if not any(v in given for v in node.outputs)]
        last = {v: node.index for node in nodes for v in node.inputs}
        held = dict(given)
        for node in nodes:
            arguments = [held[v] if v in held else self.flow.value(v) if v else None for v in node.inputs]
            with np.errstate(all="ignore"):  # zeros may be normalised
                held.update(zip(node.outputs, node.evaluate(arguments), strict=False))
            for value in node.inputs:
                if last.get(value) == node.index and value != self.merged:
                    held.pop(value, None)
        out = held[self.merged] if self.merged in held else self.flow.value(self.merged)
        return np.asarray(out, dtype=np.float64).reshape(-1, out.shape[-1])


def stretch_of(flow: Flow, anchor: Node) -> Stretch | None:
    """The stretch that a softmax or a fused operator lies in; None if it has no such ends."""
    end = _output_projection(flow, anchor)
    if end is None:
        return None
    merged, out = end
    projections = _plain_projections(flow, merged)
    if projections is None:
        return None
    stretch = Stretch(flow, projections, merged, out)
    inside = {n.index for n in stretch.nodes}
    return stretch if anchor.index in inside and len(inside) <= _LONGEST else None


def _output_projection(flow: Flow, anchor: Node) -> tuple[Value, Projection] | None:
    """(what it reads, the one projection that all of an anchor's result ends in)."""
    found: dict[Value, Projection] = {}
    todo, seen = [v for v in anchor.outputs if v], set[Value]()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        for node in flow.live_readers(value):
            operands = flow.projection_operands(node)
            if operands is None or _is_computed(flow, node.inputs[operands[1]]):
                todo += [v for v in node.outputs if v]
                continue
            out = output_map(flow, node) if operands == (0, 1) else None
            if out is None or node.inputs[0] != value:
                return None
            found[value] = out
        if len(found) > 1 or len(seen) > _LONGEST:
            return None
    return next(iter(found.items()), None)


def _is_computed(flow: Flow, matrix: Value) -> bool:
    """Whether a constant is a product of several stored matrices, as learned tokens that are projected are."""
    return matrix not in flow.weights and sum(len(flow.shape(w)) > 1 for w in flow.weights_above(matrix)) > 1


def _plain_projections(flow: Flow, merged: Value) -> tuple[Projection, ...] | None:
    """The nearest projections above that are plain maps of features; others (of tokens, of queries to positions, by
    channel) are part of the stretch."""
    passed: set[Value] = set()
    while True:
        nearest = set(projections_above(flow, merged, passed, _MOST_PROJECTIONS))
        if not nearest or len(nearest) > _MOST_PROJECTIONS:
            return None
        plain = {v: p for v in nearest if (p := _plain(flow, v)) is not None}
        further = {v for v in nearest if v not in plain or _follows(flow, plain[v], nearest - {v})}
        if not further:
            return tuple(sorted(plain.values(), key=lambda p: p.node))
        passed |= further


def _plain(flow: Flow, value: Value) -> Projection | None:
    try:
        projection, layout = described(flow, value)
    except (NotUnderstood, LookupError, ValueError):
        return None
    return projection if layout.features_last else None


def _follows(flow: Flow, projection: Projection, others: set[Value]) -> bool:
    """Whether a projection reads what one of these gives, no other one in between."""
    return not others.isdisjoint(projections_above(flow, projection.input, most=_MOST_PROJECTIONS))
