"""Operators by what they do to elements, by their canonical names; contractions and layout are in `passes.dataflow`."""

from __future__ import annotations

from collections.abc import Mapping

from passes.dataflow import Node

NORMS = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization", "GroupNormalization"}
)
PASS_THROUGH = frozenset({"Cast", "CastLike", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"})
"""Operators that keep every element, up to rounding."""

CHOOSERS: Mapping[str, tuple[int, ...]] = {
    "Gather": (1,), "GatherND": (1,), "GatherElements": (1,), "ScatterND": (1,), "ScatterElements": (1,),
    "Where": (0,), "MaskedFill": (1, 2),
}  # fmt: skip
"""Inputs that say which elements an operator takes: indices and conditions."""

COMPLEX_VIEWS = frozenset({"ViewAsComplex", "ViewAsReal"})
"""Pairs of features seen as complex numbers and back; the form of a complex value keeps the axis of pairs."""

POOLING = frozenset({"amax", "ReduceMax", "MaxPool", "max_pool1d", "max_pool2d"})
AVERAGING = frozenset({"mean", "ReduceMean", "AveragePool", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d"})
"""Operators that give the largest, or the mean, of many elements."""

SCATTERING = frozenset({"index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "index_put"})
"""Operators that write elements to places that depend on data."""


def data_operands(node: Node) -> range | tuple[int, ...]:
    """Positions of the inputs that a layout node takes elements from (not shapes, indices or conditions)."""
    if node.op == "Concat":
        return range(len(node.inputs))
    if node.op == "Where":
        return (1, 2)
    if node.op in {"ScatterND", "ScatterElements"}:
        return (0, 2)
    if node.op in {"SliceScatter", "SelectScatter"}:
        return (0, 1)
    return (0,)
