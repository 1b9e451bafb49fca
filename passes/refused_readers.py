"""Attentions that stay as they are and read the keys or values of some that do not.

Where heads are shared in the projection itself, all who read it see fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from passes.dataflow import PRODUCTS, Flow, Node, Value
from passes.site import AttentionSite, Operand, Refusal

ALSO_READ = (
    "{}, which is not rewritten, reads the same keys or values and would change with them; rewrite the exported "
    "program (torch.export.export) or .onnx file, where each reads its own"
)
"""Where a projection itself has to be changed; for the name of the attention."""


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


def read_elsewhere(flow: Flow, site: AttentionSite) -> bool:
    """Whether products that lead to something else than a site's output read its projected keys or values."""
    own = {node.index for node in flow.ancestors(site.output)}
    own |= {site.out.node} if site.out is not None else set()  # which values may reach by a way beside the weights
    outputs = [operand.projection.output for _, operand in site.shared]
    return any(node.index not in own for node in _behind(flow, outputs, ()))


def path_read_elsewhere(flow: Flow, site: AttentionSite, operand: Operand) -> bool:
    """Whether another attention reads what lies between an operand's stem and its seam, or the scores made of it."""
    between = [v for i in site.nodes for v in flow.nodes[i].outputs if v and v != site.output]
    if any(reader.index not in site.nodes for reader in _readers(flow, between)):
        return True
    behind, path = {operand.stem}, list[Value]()
    for index in operand.path:
        node = flow.nodes[index]
        if operand.stem not in node.outputs and behind.intersection(node.inputs):
            behind.update(node.outputs)
            path += node.outputs
    return any(node.index not in site.nodes for node in _behind(flow, path, ()))


def caches_read_elsewhere(flow: Flow, sites: Sequence[AttentionSite]) -> frozenset[str]:
    """Names of those sites whose cached keys or values an attention reads that is none of them."""
    ends = {i for s in sites for i in s.nodes}
    own = ends.union(i for s in sites for o in s.operands for i in o.path)

    def outside(site: AttentionSite) -> bool:
        cached = [o.projection.output for _, o in site.shared if o.past is not None or o.presents]
        return any(node.index not in own for node in _behind(flow, cached, ends))

    return frozenset(site.name for site in sites if outside(site))


def _products(flow: Flow, anchor: Node) -> Iterator[int]:
    """What makes a softmax's scores and what mixes by its weights; a fused operator is both."""
    if "Softmax" not in anchor.op:
        yield anchor.index
        return
    above = _nearest(_sources(flow, anchor), lambda node: _sources(flow, node), ())
    for node in (*above, *_behind(flow, anchor.outputs, ())):
        yield node.index


def _behind(flow: Flow, values: Iterable[Value], ends: Collection[int]) -> Iterator[Node]:
    return _nearest(_readers(flow, values), lambda node: _readers(flow, node.outputs), ends)


def _sources(flow: Flow, node: Node) -> list[Node]:
    return [p for v in node.inputs if v and (p := flow.producer(v)) is not None]


def _readers(flow: Flow, values: Iterable[Value]) -> list[Node]:
    return [r for v in values if v for r in flow.live_readers(v)]


def _nearest(first: list[Node], step: Callable[[Node], list[Node]], ends: Collection[int]) -> Iterator[Node]:
    """The first products in one direction, and of the nodes with the numbers `ends`."""
    todo, seen = first, set[int]()
    while todo:
        node = todo.pop()
        if node.index in seen:
            continue
        seen.add(node.index)
        if node.op in PRODUCTS or node.index in ends:
            yield node
        else:
            todo.extend(step(node))
