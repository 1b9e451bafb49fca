"""Weights that are cut at places read off an input's shape (``in_proj_weight[: query.size(-1)]``).

No stored number says where such a matrix begins and ends, but sizes that stay when everything open about the inputs
changes are constants all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from passes.dataflow import Array, Flow, Node, Value

_CUTS = frozenset({"Slice", "Split"})


def cutting_sizes(flow: Flow) -> set[Value]:
    """What tells where constant matrices and vectors are cut, if it is read off the shape of an input."""
    return {v for node in flow.nodes for v in _bounds(flow, node)}


def _bounds(flow: Flow, node: Node) -> Iterator[Value]:
    if node.op in _CUTS and node.inputs and flow.is_constant(node.inputs[0]):
        yield from (v for v in node.inputs[1:] if v and not flow.is_constant(v) and not flow.is_fed(v))


def unchanged(first: Flow, other: Flow | None, names: set[Value]) -> Mapping[Value, Array]:
    """Those of these sizes that two recordings agree on; all of them where the program runs at one size only."""
    recorded = {name: first.value(name) for name in names}
    return {n: a for n, a in recorded.items() if other is None or np.array_equal(a, other.value(n))}
