"""A learned projection's complete output: its contraction, the bias that is added further on, and what rounds it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from passes.dataflow import Flow, Node, Value
from passes.projections import einsum_features


def projection_at(flow: Flow, value: Value) -> tuple[Node, Value | None] | None:
    """(contraction, bias value) if `value` is a learned projection's complete output, bias included.

    A contraction whose only reader adds a constant vector is one source with it: a bias that is added
    before a rotation gets rotated.
    """
    if value not in flow.projections:
        flow.projections[value] = _find_projection(flow, value)
    return flow.projections[value]


def projections_above(flow: Flow, value: Value, passed: Collection[Value] = (), most: int | None = None) -> list[Value]:
    """What the nearest learned projections above a value give, those in `passed` seen through.

    Args:
        most: where there are more, one more than so many, and no others.
    """
    found: dict[Value, None] = {}
    todo, seen = [value], {value}
    while todo and (most is None or len(found) <= most):
        current = todo.pop()
        if not flow.data_dependent(current):
            continue
        if current not in passed and projection_at(flow, current) is not None:
            found[current] = None
            continue
        node = flow.producer(current)
        above = [v for v in (node.inputs if node is not None else ()) if v and v not in seen]
        seen.update(above)
        todo.extend(above)
    return list(found)


def _find_projection(flow: Flow, value: Value) -> tuple[Node, Value | None] | None:
    node = flow.producer(value)
    if node is None:
        return None
    if flow.projection_operands(node) is not None:
        matrix = rounded(flow, value)
        readers = flow.readers(matrix)
        if len(readers) == 1 and _bias_of(flow, readers[0], matrix, _features(flow, node)) is not None:
            return None
        held = node.op in {"Gemm", "Linear"} and len(node.inputs) > 2 and node.attrs.get("beta", 1.0) != 0
        bias = node.inputs[2] if held and node.inputs[2] else None
        return node, bias
    if node.op == "Add":
        for matrix in node.inputs:
            inner = flow.producer(unrounded(flow, matrix))
            if inner is not None and flow.projection_operands(inner) is not None:
                bias = _bias_of(flow, node, matrix, _features(flow, inner))
                if bias is not None and len(flow.readers(matrix)) == 1:
                    return inner, bias
    return None


def unrounded(flow: Flow, value: Value) -> Value:
    """What was quantised and dequantised to give `value`; itself if nothing was."""
    node = flow.producer(value)
    if node is not None and node.op == "DequantizeLinear":
        before = flow.producer(node.inputs[0])
        if before is not None and before.op == "QuantizeLinear":
            return before.inputs[0]
    return value


def rounded(flow: Flow, value: Value) -> Value:
    """`value` after a quantisation and dequantisation that are its only reader; itself if there is none."""
    readers = flow.readers(value)
    if len(readers) == 1 and readers[0].op == "QuantizeLinear":
        after = flow.readers(readers[0].outputs[0])
        if len(after) == 1 and after[0].op == "DequantizeLinear":
            return after[0].outputs[0]
    return value


def _features(flow: Flow, node: Node) -> int:
    """Output features of a projection, from its weight."""
    operands = flow.projection_operands(node)
    assert operands is not None
    shape = flow.shape(node.inputs[operands[1]])
    if node.op == "Einsum":
        return einsum_features(node, operands[1], shape)
    if len(shape) == 1:  # packed
        return int(node.attrs.get("N", 0))
    if node.op != "Conv" and len(shape) > 2:  # a stack of matrices, one for each head
        return int(np.prod(shape)) // shape[-1 if node.attrs.get("transB", 0) else -2]
    return shape[0 if node.op in {"Linear", "Conv"} or node.attrs.get("transB", 0) else -1]


def _bias_of(flow: Flow, node: Node, matrix: Value, features: int) -> Value | None:
    if node.op != "Add" or matrix not in node.inputs:
        return None
    other = node.inputs[1 - node.inputs.index(matrix)]
    if not flow.is_constant(other):
        return None
    shape = flow.shape(other)
    return other if shape and shape[-1] == features and int(np.prod(shape)) == features else None
