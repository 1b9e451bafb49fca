"""Where a source's elements lie in the projection that they come from, through a norm or a rotation in front of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import PACKED_WEIGHTS, Array, Flow, Node, Value
from passes.forms import Form, Source
from passes.match.operand_sources import form_of
from passes.match.verdicts import NotUnderstood
from passes.projections import Layout, layout_of
from passes.provenance import Tracer
from passes.site import Norm, Projection
from passes.whole_projection import projection_at


@dataclass(frozen=True)
class Origin:
    """What lies under a source.

    Attributes:
        places: (row, column) in the projection's output for each flat element of the source and of those under it.
        ground: the source that is the projection, its bias included.
        norm: a norm between the two, if there is one.
        turn: a rotation in front of that norm, if there is one.
    """

    projection: Projection
    places: Mapping[Value, tuple[Array, Array]]
    ground: Value
    norm: Norm | None = None
    turn: Turn | None = None

    def settled(self, source: Source, flat: Array, rows: Array, columns: Array) -> Origin:
        """Places in the norm `source` once the rotation in front of it is known; `flat` is [B, H, T, D].

        Raises NotUnderstood if other elements are normalised too.
        """
        to_rows, to_columns = (np.full(source.size, -1) for _ in range(2))
        to_rows[flat], to_columns[flat] = rows[:, None, :, None], columns[None, :, None, :]
        if (to_rows < 0).any():
            raise NotUnderstood("what is normalised is more than its heads")
        return replace(self, places={**self.places, source.value: (to_rows, to_columns)})


@dataclass(frozen=True)
class Turn:
    """Rotated pairs that are normalised: for each flat element of the norm's input two ids of `source`, and factors."""

    source: Source
    ids: tuple[Array, ...]
    coefficients: tuple[Array, ...]


def origin_of(tracer: Tracer, source: Source) -> Origin:
    """The projection under a source, and what is done to it first."""
    if source.kind == "projection":
        projection, layout = described(tracer.flow, source.value)
        return Origin(projection, {source.value: (layout.rows, layout.columns)}, source.value)
    assert source.under is not None
    inner = form_of(tracer, source.under)
    if source.kind == "norm" and len(inner.ids) > 1:
        return _turned_origin(tracer, source, inner)
    below = tracer.source_of(inner.ids[0]) if inner.plain else []
    if len(below) != 1 or below[0].kind not in {"projection", "biased"}:
        raise NotUnderstood("what is normalised is not one plain projection")
    origin = origin_of(tracer, below[0])
    flat = inner.ids[0].reshape(-1) - below[0].base
    rows, columns = origin.places[below[0].value]
    origin = replace(origin, places={**origin.places, source.value: (rows[flat], columns[flat])})
    if source.kind == "biased":
        projection = replace(origin.projection, bias=source.bias, bias_index=source.bias_index)
        return replace(origin, projection=projection, ground=source.value)
    assert source.norm is not None
    return replace(origin, norm=Norm(source.norm, True, source.under, source.value))


def _turned_origin(tracer: Tracer, source: Source, inner: Form) -> Origin:
    """Under a norm of what was rotated before. Raises NotUnderstood."""
    active = [t for t, c in enumerate(inner.coefficients) if (c * (inner.ids[t] > 0)).any()]
    active.sort(key=lambda t: int((inner.ids[t] == 0).sum()))
    ids = tuple(np.broadcast_to(inner.ids[t], inner.shape).reshape(-1) for t in active)
    below = {s.value: s for i in ids for s in tracer.source_of(i)}
    ground = next(iter(below.values()))
    if len(active) != 2 or inner.bias is not None or len(below) != 1 or ground.kind == "norm" or (ids[0] == 0).any():
        raise NotUnderstood("what is normalised is neither one plain projection nor a rotated one")
    assert source.norm is not None and source.under is not None
    origin = origin_of(tracer, ground)
    rows, columns = origin.places[ground.value]
    first = ids[0] - ground.base
    return replace(
        origin,
        places={**origin.places, source.value: (rows[first], columns[first])},
        norm=Norm(source.norm, True, source.under, source.value),
        turn=Turn(ground, ids, tuple(inner.coefficients[t].reshape(-1) for t in active)),
    )


def described(flow: Flow, output: Value) -> tuple[Projection, Layout]:
    """The projection whose complete output this is, and how that is laid out. Raises NotUnderstood."""
    found = projection_at(flow, output)
    assert found is not None
    node, bias = found
    operands = flow.projection_operands(node)
    assert operands is not None
    x, w = (node.inputs[i] for i in operands)
    if node.op in PACKED_WEIGHTS:
        raise NotUnderstood(
            f"the projection's weight is stored for {node.op}; rewrite the float model and quantise it afterwards"
        )
    if node.op == "Conv":
        raise NotUnderstood(_convolved(flow, node, w))
    layout = layout_of(flow, node)
    if isinstance(layout, str):
        raise NotUnderstood(layout)
    if layout.summed != 1:
        raise NotUnderstood("the projection sums over two axes, so its heads would not be found at its input")
    axes, factor = layout.weight_axes, layout.factor
    return Projection(
        node.index, x, output, w, layout.out_first, bias, layout.features, weight_axes=axes, factor=factor
    ), layout


def _convolved(flow: Flow, node: Node, weight: Value) -> str:
    """Why a convolution's heads are not read, and what would be."""
    shape = flow.shape(weight)
    inputs = flow.shape(node.inputs[0])[1]
    if any(n != 1 for n in shape[2:]):
        return f"the projection is a convolution over {' x '.join(map(str, shape[2:]))} tokens, so it mixes tokens too"
    if shape[1] != inputs:
        return (
            f"the projection is a convolution in {inputs // shape[1]} groups, of which each sees its own part of the "
            "features: heads of different groups cannot be merged"
        )
    return (
        "the projection is written as a convolution of kernel size 1; write it as a linear layer over the last axis "
        "(nn.Linear with the same weights, features transposed to the end), which is the same map and is rewritten"
    )
