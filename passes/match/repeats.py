"""Layers that repeat are read once: what was found for one is renamed for the next.

What provenance says of a value depends on the nodes between it and its projections, on how these are put together, and
on the numbers that no hidden state reaches (shapes, positions, rotation tables). Where all of that is equal, so is the
answer but for names. Replay proves every layer by itself, renamed or not.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from passes.dataflow import Flow, Value, read_inputs
from passes.match.operand_path import path_between
from passes.match.operand_view import OperandView
from passes.match.operands import Traced, trace_operand
from passes.operator_kinds import NORMS
from passes.provenance import Tracer, cache_root
from passes.site import Norm, Operand
from passes.whole_projection import projection_at

_ENOUGH = 200
"""Values between an operand and its projections; more than any attention that is understood has."""


def trace_repeated(tracer: Tracer, view: OperandView, *, shared_heads: bool) -> Traced:
    """What `trace_operand` says, from an operand of the same structure where there was one before.

    Raises NotUnderstood with the reason.
    """
    cone = _cone(tracer, view.value)
    if cone is None:
        return trace_operand(tracer, view, shared_heads=shared_heads)
    key = ("operand", replace(view, value=""), shared_heads, cone.structure)
    known = tracer.memory.known.get(key)
    if known is not None:
        before, traced = known
        renamed = _renamed(tracer.flow, before, cone, traced, view.value)
        if renamed is not None:
            return renamed
    traced = trace_operand(tracer, view, shared_heads=shared_heads)
    if not traced.streams:
        tracer.memory.known.setdefault(key, (cone, traced))
    return traced


@dataclass(frozen=True)
class _Cone:
    """What stands between an operand and its projections.

    Attributes:
        structure: equal for two operands of which provenance says the same.
        values, nodes: in the order in which they were met; those at one position play the same part.
    """

    structure: Hashable
    values: tuple[Value, ...]
    nodes: tuple[int, ...]


class _Walk:
    """Goes up from one value, numbering what it meets."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.flow = tracer, tracer.flow
        self.values: list[Value] = []
        self.nodes: list[int] = []
        self.number: dict[Value, int] = {}
        self.cached: set[Value] = set()

    def of(self, value: Value) -> int:
        if value not in self.number:
            self.number[value] = len(self.values)
            self.values.append(value)
        return self.number[value]

    def run(self, start: Value) -> _Cone | None:
        self.of(start)
        entries: list[Hashable] = []
        done = 0
        while done < len(self.values):
            entry = self._entry(self.values[done])
            if entry is None or done > _ENOUGH:
                return None
            entries.append(entry)
            done += 1
        ends = [self._projection(v) for v in tuple(self.values)]
        return _Cone(tuple(entries + ends), tuple(self.values), tuple(self.nodes))

    def _entry(self, value: Value) -> Hashable | None:
        flow = self.flow
        node = flow.producer(value)
        if value in self.cached:
            if node is None:
                return ("cache", flow.shape(value))
            self.cached.add(node.inputs[0])
        elif not flow.data_dependent(value):
            return self.tracer.memory.contents.of(value)
        if node is None or (likeness := node.likeness()) is None:
            return None
        self.nodes.append(node.index)
        shapes = tuple(flow.shape(v) for v in node.outputs if v)
        returned = tuple(v in flow.outputs for v in node.outputs)
        what = (node.op, likeness, node.outputs.index(value), shapes, returned)
        if projection_at(flow, value) is not None:
            return ("projection", *what)
        read = node.inputs[:1] if node.op in NORMS else read_inputs(node)
        if node.op == "Concat":
            self.cached.update(v for v in read if v and self._is_cache(v))
        elif value not in self.cached and not self.cached.isdisjoint(read):
            return None  # a cache that is read as a number too
        return (*what, tuple(self.of(v) if v else -1 for v in read))

    def _is_cache(self, value: Value) -> bool:
        flow = self.flow
        return not flow.data_dependent(value) and flow.is_fed(value) and cache_root(flow, value) is not None

    def _projection(self, value: Value) -> Hashable:
        flow = self.flow
        found = projection_at(flow, value) if flow.data_dependent(value) else None
        if found is None:
            return None
        node, bias = found
        operands = flow.projection_operands(node)
        assert operands is not None
        x, w = (node.inputs[i] for i in operands)
        self.nodes.append(node.index)
        named = tuple(self.of(v) for v in (x, w, bias) if v is not None)
        return (node.op, node.likeness(), operands, named, *(flow.shape(v) for v in (w, bias) if v is not None))


def _cone(tracer: Tracer, value: Value) -> _Cone | None:
    try:
        return _Walk(tracer).run(value)
    except KeyError:  # something on the way was not recorded
        return None


def _renamed(flow: Flow, before: _Cone, now: _Cone, traced: Traced, end: Value) -> Traced | None:
    """What was read of `before`, said of `now`; None if something was read that lies in neither."""
    values = dict(zip(before.values, now.values, strict=True))
    nodes = dict(zip(before.nodes, now.nodes, strict=True))
    try:
        operand = _operand_renamed(traced.operand, values, nodes)
    except KeyError:
        return None
    path = path_between(flow, operand.projection.output, operand.seam or end)
    returned = {v for i in path for v in flow.nodes[i].outputs if v in flow.outputs}
    if returned != {v for v, _ in operand.presents}:
        return None
    return replace(traced, operand=replace(operand, path=path))


def _operand_renamed(operand: Operand, values: dict[Value, Value], nodes: dict[int, int]) -> Operand:
    """Raises KeyError."""
    old = operand.projection
    projection = replace(
        old,
        node=nodes[old.node],
        input=values[old.input],
        output=values[old.output],
        weight=values[old.weight],
        bias=None if old.bias is None else values[old.bias],
    )
    norm = None if operand.norm is None else _norm_renamed(operand.norm, values, nodes)
    return replace(
        operand,
        projection=projection,
        seam=values[operand.seam] if operand.seam else "",
        stem=values[operand.stem],
        norm=norm,
        past=None if operand.past is None else values[operand.past],
        presents=tuple((values[v], axis) for v, axis in operand.presents),
        reshapes=tuple((nodes[n], axis) for n, axis in operand.reshapes),
    )


def _norm_renamed(norm: Norm, values: dict[Value, Value], nodes: dict[int, int]) -> Norm:
    """Raises KeyError."""
    gains = norm.gains
    if gains is not None:
        shift = None if gains.shift is None else values[gains.shift]
        gains = replace(gains, gain=values[gains.gain], shift=shift, reader=nodes[gains.reader])
    return replace(norm, input=values[norm.input], output=values[norm.output], gains=gains)
