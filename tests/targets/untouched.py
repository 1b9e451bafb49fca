"""What may a rewrite of an ONNX file change? Worked out here from the two files alone, by graph reachability.

The region of a site is every node on a way from the input of its projections to the input of its output projection.
Nodes in a region, and nodes that feed nothing but regions, may go or change; everything else must stand as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import networkx as nx
import onnx

from passes.dataflow import Flow
from passes.site import AttentionSite

Key = tuple[str, ...]


def outputs(node: onnx.NodeProto) -> Key:
    """What identifies a node: the names of what it computes."""
    return tuple(node.output)


def nodes(model: onnx.ModelProto) -> dict[Key, onnx.NodeProto]:
    return {outputs(node): node for node in model.graph.node}


def weights(model: onnx.ModelProto) -> dict[str, bytes]:
    """Type, shape and bits of every stored tensor, serialised."""
    return {tensor.name: tensor.SerializeToString(deterministic=True) for tensor in model.graph.initializer}


def changeable(flow: Flow, sites: Iterable[AttentionSite]) -> set[int]:
    """Indices of nodes that lie in a site's region or feed regions only."""
    graph = flow.graph
    region: set[int] = set()
    for site in sites:
        assert site.merged is not None
        last = flow.producer(site.merged)
        assert last is not None
        above = nx.ancestors(graph, last.index) | {last.index}
        for projection in (site.q.projection, site.k.projection, site.v.projection):
            region |= (nx.descendants(graph, projection.node) | {projection.node}) & above
        region |= set(_presents(flow, site))
    outside = graph.subgraph(set(graph) - region)
    final = {n.index for n in flow.nodes if set(n.outputs) & set(flow.outputs)}
    needed: set[int] = set()
    for index in final & set(outside):
        needed |= nx.ancestors(outside, index) | {index}
    return set(graph) - needed


def _presents(flow: Flow, site: AttentionSite) -> Iterator[int]:
    """Nodes of the cache, from the projection to the output that hands it back."""
    for operand in (site.k, site.v):
        for name, _ in operand.presents:
            node = flow.producer(name)
            assert node is not None
            below = nx.descendants(flow.graph, operand.projection.node)
            yield from (nx.ancestors(flow.graph, node.index) & below) | {node.index}


def altered(before: onnx.ModelProto, after: onnx.ModelProto) -> set[Key]:
    """Nodes of `before` that `after` lacks or holds with another operator, attribute, input or metadata."""
    new = nodes(after)

    def same(key: Key, node: onnx.NodeProto) -> bool:
        return key in new and _bits(new[key]) == _bits(node)

    return {key for key, node in nodes(before).items() if not same(key, node)}


def _bits(node: onnx.NodeProto) -> bytes:
    """Without its name and documentation; attributes and metadata in a fixed order."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.ClearField("name")
    attributes = sorted(copy.attribute, key=lambda a: a.name)
    del copy.attribute[:]
    copy.attribute.extend(attributes)
    metadata = sorted(copy.metadata_props, key=lambda p: p.key)
    del copy.metadata_props[:]
    copy.metadata_props.extend(metadata)
    while copy.input and not copy.input[-1]:
        del copy.input[-1]
    bits: bytes = copy.SerializeToString(deterministic=True)
    return bits
