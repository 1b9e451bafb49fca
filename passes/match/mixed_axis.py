"""Along which axis does a contraction add things up: tokens, or streams that each token has?

Two neighbours along it are followed upwards. Where both come from one element (copies of a token), or from several
values that were stacked (what layers made of it), the axis holds no tokens: hyper-connections and connections across
depth mix so.
"""

from __future__ import annotations

import numpy as np

from passes.dataflow import LAYOUT, Flow, Node, Value
from passes.operator_kinds import data_operands
from passes.projections import einsum_terms

Place = tuple[int, ...]
Pair = tuple[Value, Place, Place]
"""A value, and two places in it."""

_MOST = 500
_EXACT = 1 << 24
"""Whole numbers that float32 holds."""


def mixes_no_tokens(flow: Flow, node: Node) -> bool:
    """Whether the axis that a product of two operands sums over surely is none of tokens; False if that is not told."""
    try:
        found = _summed(flow, node)
        return found == () or (found is not None and _of_one_token(flow, *found))
    except (LookupError, ValueError, RuntimeError):  # not recorded, or an operator that takes no numbers of elements
        return False


def _summed(flow: Flow, node: Node) -> tuple[Pair, ...] | None:
    """Neighbours along the summed axis of each operand, nothing where none is summed; None if that is not told."""
    a, b = node.inputs[:2]
    if node.op == "Einsum":
        try:
            first, second, result = einsum_terms(flow, node)
        except ValueError:
            return None
        sizes = dict(zip(first, flow.shape(a), strict=True))
        summed = [c for c in first if c in second and c not in result and sizes[c] > 1]
        axes = [(v, term.index(c)) for c in summed for v, term in ((a, first), (b, second))]
    elif node.op == "MatMul" and min(len(flow.shape(v)) for v in (a, b)) > 1:
        axes = [(a, len(flow.shape(a)) - 1), (b, len(flow.shape(b)) - 2)]
        axes = axes if flow.shape(a)[-1] > 1 else []
    else:
        return None
    return tuple(_neighbours(flow, v, axis) for v, axis in axes) if len(axes) < 3 else None


def _neighbours(flow: Flow, value: Value, axis: int) -> Pair:
    rank = len(flow.shape(value))
    return value, (0,) * rank, tuple(int(a == axis) for a in range(rank))


def _of_one_token(flow: Flow, *start: Pair) -> bool:
    """Whether one way upwards ends in one token: whatever else is added there has the same axis."""
    todo, seen = list(start), set[Pair]()
    while todo and len(seen) < _MOST:
        pair = todo.pop()
        value, first, second = pair
        if first == second:
            return True
        node = flow.producer(value)
        if pair in seen or node is None or not flow.is_fed(value):
            continue
        seen.add(pair)
        above = _above(flow, node, value, (first, second))
        if above is None:
            return True
        todo += above
    return False


def _above(flow: Flow, node: Node, value: Value, places: tuple[Place, Place]) -> list[Pair] | None:
    """The two places in what a node reads, for each that has the axis; None if they are told to be one token's."""
    if node.op in LAYOUT:
        return _laid(flow, node, value, places)
    if node.op in {"Linear", "MatMul", "Gemm"}:
        x, matrix = node.inputs[:2]
        lead = len(flow.shape(x)) - 1
        rows = [place[:lead] for place in places]
        compared = flow.is_fed(matrix) or rows[0] == rows[1]  # features of one head, say
        return [] if compared else [(x, (*rows[0], 0), (*rows[1], 0))]
    if node.op == "Einsum":
        return _of_terms(flow, node, places)
    same = [v for v in node.inputs if v and flow.is_fed(v) and flow.shape(v) == flow.shape(value)]
    return [(v, *places) for v in same]


def _of_terms(flow: Flow, node: Node, places: tuple[Place, Place]) -> list[Pair]:
    """In the operands of an Einsum in which the two places differ."""
    try:
        *terms, result = einsum_terms(flow, node)
    except ValueError:
        return []
    pairs: list[Pair] = []
    for value, term in zip(node.inputs, terms, strict=False):
        first, second = (tuple(p[result.index(c)] if c in result else 0 for c in term) for p in places)
        if first != second and flow.is_fed(value):
            pairs.append((value, first, second))
    return pairs


def _laid(flow: Flow, node: Node, value: Value, places: tuple[Place, Place]) -> list[Pair] | None:
    """Through a layout operator, run on numbers of elements."""
    data = [i for i in data_operands(node) if i < len(node.inputs) and flow.is_fed(node.inputs[i])]
    numbers, start = {}, [1]  # 0 is what is filled in
    for i in data:
        shape = flow.shape(node.inputs[i])
        numbers[i] = np.arange(start[-1], start[-1] + int(np.prod(shape))).reshape(shape)
        start.append(start[-1] + numbers[i].size)
    moved = node.evaluate([numbers.get(i, flow.value(v) if v else None) for i, v in enumerate(node.inputs)])
    laid = np.asarray(moved[node.outputs.index(value)])
    if laid.dtype.kind == "f" and start[-1] > _EXACT:  # beside a filled-in fraction numbers of elements are floats
        raise ValueError("numbers of elements were rounded")
    if not all(1 <= laid[place] < start[-1] for place in places):
        return []
    found = [int(laid[place]) for place in places]
    held = [int(np.searchsorted(start, n, side="right")) - 1 for n in found]
    if held[0] != held[1]:
        return None if node.op == "Concat" and _stacked(flow, node, value) else []
    source = node.inputs[data[held[0]]]
    shape = flow.shape(source)
    first, second = (tuple(int(n) for n in np.unravel_index(n - start[held[0]], shape)) for n in found)
    return [(source, first, second)]


def _stacked(flow: Flow, node: Node, value: Value) -> bool:
    """Whether what is joined has one place each along the axis that it is joined along, and is no cache beside it."""
    size = int(np.prod(flow.shape(value)))
    shapes = {flow.shape(v) for v in node.inputs}
    axis = int(node.attrs.get("axis", 0))
    whole = flow.shape(value)
    one = {(*whole[: axis % len(whole)], *rest, *whole[axis % len(whole) + 1 :]) for rest in ((), (1,))}
    return size == len(node.inputs) * int(np.prod(next(iter(shapes)))) and shapes <= one
