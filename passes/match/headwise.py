"""Operands that are run instead of read: what lies before them treats every head by itself, and all heads alike.

Pooling over tokens, convolutions by channel, projected tokens and scales by position are no affine form of one token.
Heads behind them can be shared all the same: repeated right behind their projection they come out equal. Which columns
of the projection make which head is found by running what lies in between with all other columns at zero; that heads
are treated alike, by giving each head the columns of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array, Flow, Node, Value
from passes.match.canonical_order import Axes
from passes.match.column_tables import laid_out
from passes.match.operand_path import path_between
from passes.match.operand_view import OperandView
from passes.match.operands import Tokens, Traced
from passes.match.origins import described
from passes.match.verdicts import NotUnderstood
from passes.provenance import Tracer
from passes.replay import TOLERANCES, columns_alone, recorded, relative, run_between
from passes.site import Operand, Projection
from passes.whole_projection import projections_above

_LONGEST = 60
"""Nodes between a projection and its heads; more are another layer's."""
_DEPTH = 3
"""Maps of tokens (a projection of tokens, a convolution by channel) that may lie on top of each other."""


def trace_headwise(tracer: Tracer, view: OperandView, *, shared_heads: bool) -> Traced | None:
    """As `trace_operand`, of an operand of this kind; None if it is of another.

    `Tokens.rows` counts sequences and tokens only: which rows of the projection a token is made of is not told.
    """
    flow = tracer.flow
    if flow.dtype == "int8":
        return None
    passed: set[Value] = set()
    for _ in range(_DEPTH):
        nearest = projections_above(flow, view.value, passed)
        if len(nearest) == 1 and (ground := _ground(flow, nearest[0], view)) is not None:
            try:
                found = _Search(_stirred(flow, *ground), view, *ground).traced(shared_heads)
            except (ArithmeticError, LookupError, ValueError, RuntimeError):  # not recorded, or an operator's own
                return None
            if found is not None:
                return found
        passed.update(nearest)
    return None


def _ground(flow: Flow, output: Value, view: OperandView) -> tuple[Projection, tuple[Node, ...]] | None:
    """(a projection that is a plain map of features, what lies between it and the operand), if it is one."""
    try:
        projection, layout = described(flow, output)
    except NotUnderstood:
        return None
    nodes = tuple(flow.nodes[i] for i in path_between(flow, output, view.value))
    if not layout.features_last or not nodes or len(nodes) > _LONGEST:
        return None
    if any("Softmax" in node.op or "ttention" in node.op for node in nodes):
        return None
    return projection, nodes


def _stirred(flow: Flow, projection: Projection, nodes: tuple[Node, ...]) -> Flow:
    """The flow with noise on what is projected: heads whose weights are equal are told apart then."""
    given = np.asarray(flow.value(projection.output))
    noise = np.random.default_rng(0).normal(size=given.shape) * max(float(given.std()), 1e-3)
    return run_between(flow, nodes, projection.output, given + noise)


@dataclass(frozen=True)
class _Candidate:
    """Columns [N, D] of distinct heads, the distinct head of each head at the anchor, and the operand's axes."""

    columns: Array
    group: tuple[int, ...]
    axes: Axes


@dataclass(frozen=True)
class _Search:
    flow: Flow
    view: OperandView
    projection: Projection
    nodes: tuple[Node, ...]

    def traced(self, shared_heads: bool) -> Traced | None:
        for candidate in self._candidates(shared_heads):
            tokens = self._tokens(candidate)
            if self._by_itself(candidate, tokens) and self._alike(candidate, tokens):
                return Traced(self._operand(candidate), tokens, candidate.group, 1.0)
        return None

    def _candidates(self, shared_heads: bool) -> Iterator[_Candidate]:
        """Those whose columns alone make the operand, and the first head of it where it is said to be."""
        flow, features = self.flow, self.projection.features
        shape = flow.shape(self.view.value)
        if self.view.heads:
            dim = shape[-1] // self.view.heads
            places: list[tuple[int, Axes]] = [(self.view.heads, ("b", "h", "s", "d"))]
        else:
            arranged = self.view.arranged(np.empty(shape, np.bool_)).shape
            dim = arranged[-1]
            places = list(_places(arranged[:-2]))
        for count in sorted({n for heads, _ in places for n in _distinct(heads, shared_heads)}, reverse=True):
            for columns in _tables(features, count, dim):
                if not self._same(self._shown(self._kept(columns)), self._shown(None)):
                    continue
                first = self._kept(columns[:1])
                for heads, axes in (p for p in places if p[0] % count == 0):
                    for group in _groups(heads, count):
                        candidate = _Candidate(columns, group, axes)
                        here = [h for h, g in enumerate(group) if g == 0]
                        tokens = self._tokens(candidate)
                        if self._same(*(recorded(f, self.view, tokens)[:, here] for f in (first, flow))):
                            yield candidate

    def _by_itself(self, candidate: _Candidate, tokens: Tokens) -> bool:
        """Whether every head is made of its own columns."""
        seen = recorded(self.flow, self.view, tokens)
        for head, columns in enumerate(candidate.columns):
            mine = [h for h, g in enumerate(candidate.group) if g == head]
            if not self._same(recorded(self._kept(columns[None]), self.view, tokens)[:, mine], seen[:, mine]):
                return False
        return True

    def _alike(self, candidate: _Candidate, tokens: Tokens) -> bool:
        """Whether each head becomes what the next one was when it is given that one's columns."""
        count = len(candidate.columns)
        given = np.array(self.flow.value(self.projection.output), copy=True)
        original = given.copy()
        given[..., candidate.columns] = original[..., np.roll(candidate.columns, -1, axis=0)]
        moved = recorded(run_between(self.flow, self.nodes, self.projection.output, given), self.view, tokens)
        seen, first = recorded(self.flow, self.view, tokens), {g: candidate.group.index(g) for g in range(count)}
        wished = seen[:, [first[(g + 1) % count] for g in candidate.group]]
        return self._same(moved, wished) and not self._same(seen, wished)

    def _kept(self, columns: Array) -> Flow:
        """The flow as it is where all other columns are zero."""
        given = columns_alone(self.flow.value(self.projection.output), columns)
        return run_between(self.flow, self.nodes, self.projection.output, given)

    def _shown(self, flow: Flow | None) -> Array:
        return np.asarray((flow or self.flow).value(self.view.value), dtype=np.float64)

    def _same(self, mine: Array, seen: Array) -> bool:
        return mine.size > 0 and relative(mine, seen) <= TOLERANCES[self.flow.dtype]

    def _tokens(self, candidate: _Candidate) -> Tokens:
        columns = candidate.columns[list(candidate.group)]
        bare = Tokens(np.zeros((1, 1), int), columns, np.ones(1), None, None, slice(0, 0), candidate.axes)
        batch, _, tokens, _ = recorded(self.flow, self.view, bare).shape
        rows = np.arange(batch * tokens).reshape(batch, tokens)
        return Tokens(
            rows, columns, np.ones((batch, tokens, columns.shape[1])), None, None, slice(0, tokens), bare.axes
        )

    def _operand(self, candidate: _Candidate) -> Operand:
        return Operand(
            projection=self.projection,
            columns=candidate.columns,
            seam="",
            seam_axes=(),
            path=tuple(n.index for n in self.nodes),
            stem=self.projection.output,
            stem_axes=("bs", "hd"),
            stem_features=tuple(range(candidate.columns.shape[1])),
            batch_first=True,
            headwise=True,
        )


def _places(lead: tuple[int, ...]) -> Iterator[tuple[int, Axes]]:
    """(heads, axes): where heads may lie along an operand's leading axes."""
    if len(lead) == 1:
        for heads in range(2, lead[0] + 1):
            if lead[0] % heads == 0:
                yield heads, ("bh", "s", "d")
                if heads != lead[0]:
                    yield heads, ("hb", "s", "d")
    elif len(lead) in (2, 3):
        for axis in sorted(range(len(lead)), key=lambda a: a != 1):
            if lead[axis] > 1:
                yield lead[axis], (*("h" if a == axis else "b" for a in range(len(lead))), "s", "d")


def _distinct(heads: int, shared_heads: bool) -> list[int]:
    """How many distinct heads there may be."""
    return [n for n in range(heads, 1, -1) if heads % n == 0] if shared_heads else [heads]


def _groups(heads: int, count: int) -> Iterator[tuple[int, ...]]:
    """The distinct head of each head, neighbours sharing one or taking turns."""
    yield tuple(h * count // heads for h in range(heads))
    if count != heads:
        yield tuple(h % count for h in range(heads))


def _tables(features: int, heads: int, dim: int) -> Iterator[Array]:
    """Columns [heads, dim] as a projection may have them: parts, heads and features within each other."""
    if features % (heads * dim):
        return
    seen: set[bytes] = set()
    for group in laid_out(features, heads, features // (heads * dim)):
        for table in group:
            if table.tobytes() not in seen:
                seen.add(table.tobytes())
                yield table
