"""The standard Attention, where it has a cache of its own."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.capture.fused.reads import present
from rewriter.capture.fused.writer import Writer
from rewriter.onnx_nodes import input_at


def standard_obstacle(node: ir.Node) -> str | None:
    if input_at(node, 6) is not None:
        return "it counts the keys of each sequence"
    if present(node, 3):
        return "it returns its scores"
    pasts = [input_at(node, 4), input_at(node, 5)]
    if not all(v is None or v.is_graph_input() for v in pasts):
        return "its cache is changed before it is read"
    return None if "q_num_heads" in node.attributes or _heads_declared(node) else "no shape says how many heads it has"


def _heads_declared(node: ir.Node) -> bool:
    """Whether 4-D operands, or caches, declare their heads."""
    return _declared_heads(node, 0) is not None and _declared_heads(node, 1) is not None


def _declared_heads(node: ir.Node, position: int) -> int | None:
    """Heads of the queries (0) or the keys (1), from a 4-D shape or the keys' cache."""
    for value in (input_at(node, position), input_at(node, 4) if position else None):
        if value is not None and value.shape is not None and value.shape.rank() == 4:
            size = value.shape[1]
            if isinstance(size, int):
                return size
    return None


class Standard(Writer):
    """The standard Attention with past inputs or present outputs."""

    def _head_counts(self) -> tuple[int, int]:
        attributes = self.node.attributes
        if "q_num_heads" in attributes:
            return attributes["q_num_heads"].as_int(), attributes["kv_num_heads"].as_int()
        q, k = _declared_heads(self.node, 0), _declared_heads(self.node, 1)
        assert q is not None and k is not None
        return q, k

    @property
    def _flat(self) -> bool:
        return "q_num_heads" in self.node.attributes

    def _operands(self) -> list[ir.Value]:
        operands = [v for v in self.node.inputs[:3] if v is not None]
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return [self._split(x, n) for x, n in zip(operands, counts, strict=True)] if self._flat else operands

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return input_at(self.node, 4), input_at(self.node, 5)

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        found = []
        mask = input_at(self.node, 3)
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            mask = self._op("Where", [mask, self._number(0.0), self._lowest()], "mask")
        if mask is not None:
            found.append(mask)
        if self.node.attributes.get_int("is_causal", 0):
            found.append(self._causal(q, k))
        return found

    def _merged(self, mixed: ir.Value) -> ir.Value:
        return super()._merged(mixed) if self._flat else mixed
