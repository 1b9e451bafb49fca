"""Low-rank adapters beside projections in a file (LoRA, 2106.09685; DoRA, VeRA), written into those projections.

What `rewriter.capture.folded_adapters` is to graphs of torch: an adapter that was not merged adds to a product what
other products make of the same input, and a sum of linear maps is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array
from rewriter.capture.onnx_constants import weight_numbers, weight_tensor
from rewriter.onnx_nodes import NodeWriter, input_at

_DEEPEST = 8
"""How many nodes lie between a sum and its input, at most: one for each rank, factor, bias, cast and sum."""
_LEAST_BYTES = 2
"""Of a number in floating point that is no code of a quantised one."""


@dataclass(frozen=True)
class Adapted:
    """A sum of linear maps of one value.

    Attributes:
        node: the last Add.
        source: the value, [..., in].
        nodes: all that computes the sum from it, readers first.
        base: the matrix of the first product.
    """

    node: ir.Node
    source: ir.Value
    nodes: tuple[ir.Node, ...]
    base: ir.Value

    @property
    def constants(self) -> list[ir.Value]:
        """What it reads of the file's weights."""
        return [v for n in self.nodes for v in n.inputs if v is not None and weight_tensor(v) is not None]

    def write(self, graph: ir.Graph, writer: NodeWriter) -> str:
        """Put one product in the sum's place; returns the product's name."""
        old, stored = self.node.outputs[0], weight_tensor(self.base)
        assert stored is not None
        kind = (self.source.dtype or stored.dtype).numpy()
        matrix, offset = _map(old, self.source)
        nodes: list[ir.Node] = []
        weight = writer.constant(np.ascontiguousarray(matrix).astype(kind), f"{self.base.name}/merged")
        made = writer.op(nodes, "MatMul", [self.source, weight], f"{self.node.name}/product")
        if offset is not None:
            made = writer.op(nodes, "Add", [made, writer.constant(offset.astype(kind), f"{self.base.name}/added")],
                             f"{self.node.name}/sum")  # fmt: skip
        if any(map(_is_cast, self.nodes)) and old.dtype != self.source.dtype:
            assert old.dtype is not None
            made = writer.op(nodes, "Cast", [made], f"{self.node.name}/cast", to=int(old.dtype))
        graph.insert_before(self.node, nodes)
        made.type, made.shape = old.type, old.shape
        old.replace_all_uses_with(made)
        old.name, made.name = None, old.name
        left = [*self.nodes]
        while unread := [n for n in left if not any(v.uses() or v.is_graph_output() for v in n.outputs)]:
            graph.remove(unread, safe=True)
            left = [n for n in left if n not in unread]
        assert nodes[0].name is not None
        return nodes[0].name


def adapted_sums(graph: ir.Graph) -> Iterator[Adapted]:
    """The sums of linear maps of one value that are no part of a larger one."""
    inside: set[ir.Node] = set()
    for node in reversed(graph):
        if node in inside or not _is(node, "Add") or node.outputs[0].is_graph_output():
            continue
        value = node.outputs[0]
        found = _sources(value, _DEEPEST) if _addends(node) is not None else []
        nodes = tuple(dict.fromkeys(_between(value, found[0]))) if found else ()
        if found and (_is_typed(value, found[0]) or not any(map(_is_cast, nodes))):
            inside.update(nodes)
            yield Adapted(node, found[0], nodes, _base(value))


def _sources(value: ir.Value, depth: int) -> list[ir.Value]:
    """All values of which a value is a linear map, nearest first."""
    value = _unchanged(value)
    node = value.producer()
    if node is None or not depth:
        return []
    if _matrix(node) is not None:
        read = node.inputs[0]
        assert read is not None
        read = _unchanged(read)
        before = _uncast(read.producer())
        return [read, *([] if before is None else [before]), *_sources(read, depth - 1)]
    if (before := _uncast(node)) is not None:
        return _sources(before, depth - 1)
    if (addends := _addends(node)) is not None:
        first, second = (_sources(v, depth - 1) for v in addends)
        same = bool(first and second) and _features(addends[0]) == _features(addends[1])
        return [v for v in first if v in second] if same else []
    step = _with_numbers(node)
    return [] if step is None else _sources(step[0], depth - 1)


def _map(value: ir.Value, source: ir.Value) -> tuple[Array, Array | None]:
    """([in, out], what is added to each feature) of a value that is a linear map of another, float32."""
    node = _unchanged(value).producer()
    assert node is not None
    if (before := _uncast(node)) is not None:
        return _map(before, source)
    if (matrix := _matrix(node)) is not None:
        read, numbers = node.inputs[0], weight_numbers(matrix)
        assert read is not None
        read = _unchanged(read)
        if source in (read, _uncast(read.producer())):
            return numbers, None
        inner, offset = _map(read, source)
        return inner @ numbers, None if offset is None else offset @ numbers
    if (addends := _addends(node)) is not None:
        (first, one), (second, other) = (_map(v, source) for v in addends)
        parts = [p for p in (one, other) if p is not None]
        return first + second, sum(parts[1:], parts[0]) if parts else None
    step = _with_numbers(node)
    assert step is not None
    matrix_before, offset = _map(step[0], source)
    numbers = weight_numbers(step[1]).reshape(-1)
    if node.op_type == "Add":
        added = np.broadcast_to(numbers, matrix_before.shape[1:])
        return matrix_before, added if offset is None else offset + added
    factor = 1 / numbers if node.op_type == "Div" else numbers
    return matrix_before * factor, None if offset is None else offset * factor


def _between(value: ir.Value, source: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute a sum from its source, readers first."""
    node = value.producer()
    if value is source or node is None or weight_tensor(value) is not None:
        return
    yield node
    for read in node.inputs:
        if read is not None:
            yield from _between(read, source)


def _base(value: ir.Value) -> ir.Value:
    """The matrix of the first product of a sum."""
    node = _unchanged(value).producer()
    assert node is not None
    if (matrix := _matrix(node)) is not None:
        return matrix
    if (before := _uncast(node)) is not None:
        return _base(before)
    addends, step = _addends(node), _with_numbers(node)
    assert addends is not None or step is not None
    return _base(addends[0] if addends is not None else step[0])  # type: ignore[index]


# --- single nodes --------------------------------------------------------------------------------


def _is(node: ir.Node, *kinds: str) -> bool:
    return node.op_type in kinds and node.domain in {"", "ai.onnx"}


def _unchanged(value: ir.Value) -> ir.Value:
    """The value whose numbers a value holds."""
    node = value.producer()
    while node is not None and _is(node, "Identity", "Dropout") and len(node.inputs) < 3 and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_cast(node: ir.Node) -> bool:
    return _is(node, "Cast")


def _uncast(node: ir.Node | None) -> ir.Value | None:
    """What a node casts, if that is floats to floats."""
    read = None if node is None or not _is_cast(node) else node.inputs[0]
    return None if node is None or read is None or not _is_typed(read, node.outputs[0]) else _unchanged(read)


def _is_typed(*values: ir.Value) -> bool:
    """Whether all are known to be floats that are no codes of quantised ones."""
    kinds = [v.dtype for v in values]
    return all(k is not None and k.is_floating_point() and k.itemsize >= _LEAST_BYTES for k in kinds)


def _matrix(node: ir.Node) -> ir.Value | None:
    """The stored matrix of floats that a product multiplies by, if it is one."""
    weight = input_at(node, 1)
    stored = weight_tensor(weight) if weight is not None and _is(node, "MatMul") else None
    floats = stored is not None and stored.dtype.is_floating_point() and stored.dtype.itemsize >= _LEAST_BYTES
    return weight if stored is not None and floats and len(stored.shape) == 2 else None


def _addends(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The two values that an Add adds, if neither is stored."""
    first, second = (input_at(node, i) for i in (0, 1))
    if not _is(node, "Add") or first is None or second is None:
        return None
    return None if any(weight_tensor(v) is not None for v in (first, second)) else (first, second)


def _with_numbers(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(value, stored numbers) of a node that adds a number to each feature, or multiplies or divides it by one."""
    first, second = (input_at(node, i) for i in (0, 1))
    if not _is(node, "Add", "Mul", "Div") or first is None or second is None:
        return None
    for value, numbers in ((first, second), (second, first))[: 1 if node.op_type == "Div" else 2]:
        stored = weight_tensor(numbers)
        if stored is not None and weight_tensor(value) is None and stored.dtype.is_floating_point():
            fits = stored.size == 1 or _is_row(stored, _features(value))
            return (value, numbers) if fits and _adds_no_axis(stored, value) else None
    return None


def _is_row(stored: ir.TensorProtocol, wide: int | None) -> bool:
    """Whether numbers belong to the features of the last axis, one each."""
    return wide is not None and stored.size == wide and len(stored.shape) > 0 and stored.shape[-1] == wide


def _adds_no_axis(stored: ir.TensorProtocol, value: ir.Value) -> bool:
    """Whether numbers have no more axes than the value that they meet: the result would have them, too."""
    return len(stored.shape) <= (1 if value.shape is None else value.shape.rank())


def _features(value: ir.Value) -> int | None:
    """How many features a linear map gives."""
    node = _unchanged(value).producer()
    if node is None:
        return None
    if (matrix := _matrix(node)) is not None:
        stored = weight_tensor(matrix)
        return None if stored is None else _sizes(stored)[1]
    if (addends := _addends(node)) is not None:
        return _features(addends[0])
    if (before := _uncast(node)) is not None:
        return _features(before)
    for read in node.inputs[:2] if _is(node, "Add", "Mul", "Div") else ():
        if read is not None and weight_tensor(read) is None:
            return _features(read)
    return None


def _sizes(stored: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(n for n in stored.shape if isinstance(n, int))
