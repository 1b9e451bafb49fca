"""Attentions that stay as they are and read the keys or values of some that do not.

Where heads are shared in the projection itself, all who read it see fewer of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from passes.dataflow import CONTRACTIONS, Flow, Node, Value
from passes.site import AttentionSite, Refusal

ALSO_READ = (
    "{}, which is not rewritten, reads the same keys or values and would change with them; export the model to ONNX "
    "and rewrite the file, where each reads its own"
)
"""Where a projection itself has to be changed; for the name of the attention."""

_PRODUCTS = CONTRACTIONS | {"Baddbmm"}


def refused_readers(flow: Flow, sites: Iterable[AttentionSite], refusals: Sequence[Refusal]) -> dict[str, str]:
    """By name of a site, the name of a refused attention whose products read the same projected keys or values."""
    products = {index: r.name for r in refusals for index in _products(flow, flow.nodes[r.anchor])}
    found: dict[str, str] = {}
    for site in sites:
        for _, operand in site.shared:
            for node in _behind(flow, [operand.projection.output], products.keys()):
                if node.index in products:
                    found[site.name] = products[node.index]
    return found


def _products(flow: Flow, anchor: Node) -> Iterator[int]:
    """What makes a softmax's scores and what mixes by its weights; a fused operator is both."""
    if "Softmax" not in anchor.op:
        yield anchor.index
        return
    for node in (*_above(flow, anchor), *_behind(flow, anchor.outputs, ())):
        yield node.index


def _behind(flow: Flow, values: Sequence[Value], ends: Collection[int]) -> Iterator[Node]:
    """The first products behind these values, and of the nodes with the numbers `ends`."""
    todo, seen = list(values), set(values)
    while todo:
        for node in flow.live_readers(todo.pop()):
            if node.op in _PRODUCTS or node.index in ends:
                yield node
                continue
            fresh = [v for v in node.outputs if v and v not in seen]
            seen.update(fresh)
            todo.extend(fresh)


def _above(flow: Flow, anchor: Node) -> Iterator[Node]:
    """The first products that an anchor's scores are made of."""
    todo, seen = list(anchor.inputs), set(anchor.inputs)
    while todo:
        node = flow.producer(todo.pop())
        if node is None:
            continue
        if node.op in _PRODUCTS:
            yield node
            continue
        fresh = [v for v in node.inputs if v and v not in seen]
        seen.update(fresh)
        todo.extend(fresh)
