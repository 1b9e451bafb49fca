"""Softmaxes written out in parts, seen as the one operator that they are.

Covered are ``exp(x) / sum(exp(x))``, usually of scores minus their largest, ``exp(x - logsumexp(x))`` and
``exp(log_softmax(x))``. Exponentials that are masked before they are divided by their sum stand for a softmax
themselves, since what divides them later divides any multiple of them. Over which axis sums run is not looked at here:
what is no softmax over the last axis does not replay as attention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from passes.dataflow import Node, Value, unlike


def with_softmaxes(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The same nodes; the last of each softmax written out in parts is shown as a Softmax of what enters it."""
    producers = {out: node for node in nodes for out in node.outputs if out}
    masked = set(_masked_exponentials(nodes, producers))
    return tuple(
        node
        if (entering := _entering(node, producers, masked)) is None
        else replace(node, op="Softmax", domain="", attrs=entering.attrs, inputs=(entering.value,), likeness=unlike)
        for node in nodes
    )


@dataclass(frozen=True)
class _Entering:
    """What enters a softmax, and the operator's attributes."""

    value: Value
    attrs: Mapping[str, Any] = field(default_factory=lambda: {"axis": -1})


def _entering(node: Node, producers: Mapping[Value, Node], masked: Collection[Value]) -> _Entering | None:
    if any(out in masked for out in node.outputs):
        return _Entering(node.inputs[0])
    if node.op == "Div" and len(node.inputs) == 2:
        top, total = producers.get(node.inputs[0]), _before_spreading(node.inputs[1], producers)
        summed = total is not None and total.op == "ReduceSum" and total.inputs[0] == node.inputs[0]
        return _Entering(top.inputs[0]) if top is not None and top.op == "Exp" and summed else None
    if node.op == "Exp":
        shifted = producers.get(node.inputs[0])
        if shifted is not None and shifted.op == "LogSoftmax":
            return _Entering(shifted.inputs[0], shifted.attrs)
        if shifted is not None and shifted.op == "Sub" and len(shifted.inputs) == 2:
            total = _before_spreading(shifted.inputs[1], producers)
            if total is not None and total.op == "ReduceLogSumExp" and total.inputs[0] == shifted.inputs[0]:
                return _Entering(shifted.inputs[0])
    return None


def _masked_exponentials(nodes: Sequence[Node], producers: Mapping[Value, Node]) -> Iterator[Value]:
    """Exponentials that a mask, written as one operator, sets to zero before they are divided by their sum."""
    for node in nodes:
        top = producers.get(node.inputs[0]) if node.op == "Div" and len(node.inputs) == 2 else None
        if top is None or top.op not in {"Where", "Mul", "MaskedFill"}:
            continue
        total = producers.get(node.inputs[1])
        while total is not None and total.op in {"Reshape", "Unsqueeze", "Expand", "Identity", "Add", "Max", "Clip"}:
            total = producers.get(total.inputs[0])
        if total is not None and total.op in {"ReduceSum", "ReduceL1"} and total.inputs[0] == node.inputs[0]:
            yield from (v for v in top.inputs if v in producers and producers[v].op == "Exp")


def _before_spreading(value: Value, producers: Mapping[Value, Node]) -> Node | None:
    """What makes one number per row, which may then be written out for each element of the row (as JAX does)."""
    node = producers.get(value)
    while node is not None and node.op in {"Reshape", "Unsqueeze", "Expand", "Identity"}:
        node = producers.get(node.inputs[0])
    return node
