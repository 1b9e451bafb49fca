"""A contraction with a constant matrix, and the bias that is added to it, as the projection they are."""

from __future__ import annotations

from dataclasses import replace

from passes.dataflow import Flow, Node
from passes.projections import layout_of
from passes.site import Projection
from passes.whole_projection import projection_at, rounded


def linear_map(flow: Flow, node: Node) -> Projection:
    """The projection of a node whose operands are (activation, weight), in this order."""
    output = node.outputs[0]
    found = projection_at(flow, output)
    if found is None:  # its bias is a separate node
        output = flow.readers(rounded(flow, output))[0].outputs[0]
        found = projection_at(flow, output)
    assert found is not None
    out_first = node.op == "Linear" or bool(node.attrs.get("transB", 0))
    features = flow.shape(node.inputs[1])[0 if out_first else -1]
    return Projection(node.index, node.inputs[0], output, node.inputs[1], out_first, found[1], features)


def output_map(flow: Flow, node: Node) -> Projection | None:
    """The same of an attention's output projection, which may sum over heads and features; None if it is none."""
    layout = layout_of(flow, node)
    if isinstance(layout, str) or not layout.features_last:
        return None
    return replace(
        linear_map(flow, node),
        out_first=layout.out_first,
        features=layout.features,
        weight_axes=layout.weight_axes,
        factor=layout.factor,
    )
